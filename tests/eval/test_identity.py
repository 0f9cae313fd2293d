"""A folder holds the answers to one evaluation: of one model, one tokenizer, one set of data."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

from safetensors.torch import load_file, save_file

from elasticore.assets import tiny
from elasticore.eval import identity
from elasticore.eval.evaluate import Evaluation, evaluate
from elasticore.eval.journal import Journal
from elasticore.eval.language_model import ElasticLM
from elasticore.eval.methods import Method
from elasticore.models.loading import load_backbone
from elasticore.places import held
from tests.eval.test_evaluate import request


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evaluation, Path]:
    """A finished evaluation, and its folder with the model and the data in it."""
    place = tmp_path_factory.mktemp("asked")
    shutil.copytree(tiny() / "backbone", place / "backbone")
    file = place / "data" / "ruler" / "backbone" / "512" / "vt" / "validation.jsonl"
    file.parent.mkdir(parents=True)
    row = {"input": "Name the capital of France.", "answer_prefix": " It is", "outputs": ["Paris"]}
    file.write_text(json.dumps(row))
    made = evaluation(place)
    evaluate(made, place / "run")
    return made, place


def evaluation(place: Path) -> Evaluation:
    return Evaluation(
        str(place / "backbone"),
        ("ruler:vt",),
        lengths=(512,),
        data=str(place / "data"),
        dtype="float32",
    )


@pytest.fixture
def copied(asked: tuple[Evaluation, Path], tmp_path: Path) -> Path:
    """A copy of all that, with another place in its record."""
    place = Path(shutil.copytree(asked[1], tmp_path / "copy"))
    file = place / "run" / "evaluation.json"
    record = json.loads(file.read_text("utf-8"))
    record |= {"model": str(place / "backbone"), "data": str(place / "data")}
    file.write_text(json.dumps(record))
    return place


def refused(place: Path, says: str) -> None:
    before = {file: file.read_bytes() for file in (place / "run").rglob("*") if file.is_file()}
    with pytest.raises(ValueError, match=says):
        evaluate(evaluation(place), place / "run")
    assert {
        file: file.read_bytes() for file in (place / "run").rglob("*") if file.is_file()
    } == before


def test_the_same_again_asks_nothing(copied: Path) -> None:
    before = (copied / "run" / "full" / "answers.jsonl").read_bytes()
    evaluate(evaluation(copied), copied / "run")
    assert (copied / "run" / "full" / "answers.jsonl").read_bytes() == before


@pytest.mark.parametrize("part", ["embed_tokens", "layernorm", "o_proj"])
def test_a_model_that_was_changed_in_its_place_is_another(copied: Path, part: str) -> None:
    # Training changes everything; an adapter that is merged leaves embeddings and norms alone.
    file = copied / "backbone" / "model.safetensors"
    weights = load_file(file)
    for name in weights:
        if part in name:
            weights[name] = weights[name] * 1.25
    save_file(weights, file, {"format": "pt"})
    refused(copied, r"holds another evaluation: backbone.weights '\w+' \(now '\w+'\)")


def test_a_tokenizer_that_was_changed_is_another(copied: Path) -> None:
    file = copied / "backbone" / "tokenizer_config.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    refused(copied, r"holds another evaluation: tokenizer.chat_template None \(now '")


@pytest.mark.parametrize("change", [{"input": "Of Spain?"}, {"outputs": ["Paris", "Lutetia"]}])
def test_data_that_were_changed_in_their_place_are_others(
    copied: Path, change: dict[str, Any]
) -> None:
    (file,) = (copied / "data").rglob("*.jsonl")
    file.write_text(json.dumps({**json.loads(file.read_text("utf-8")), **change}))
    refused(copied, r"holds another evaluation: rows '\w+' \(now '\w+'\)")


def test_another_elasticore_is_another_evaluation(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "__version__", "99.0")
    refused(copied, r"holds another evaluation: elasticore '[\d.]+' \(now '99.0'\)")


@pytest.mark.parametrize("text", ["", "[]", '{"model": "tiny"}'])
def test_a_record_that_is_damaged_is_named(copied: Path, text: str) -> None:
    (copied / "run" / "evaluation.json").write_text(text)
    refused(copied, r"evaluation.json is damaged \(.*name another folder")


def test_a_folder_takes_one_evaluation_at_a_time(copied: Path) -> None:
    with held(copied / "run"), pytest.raises(BlockingIOError, match="is being written by process"):
        evaluate(evaluation(copied), copied / "run")


def test_methods_still_join_and_batches_may_differ(copied: Path) -> None:
    more = dataclasses.replace(evaluation(copied), methods=("twin=full",), batch_size=2)
    evaluate(more, copied / "run")
    record = json.loads((copied / "run" / "evaluation.json").read_text("utf-8"))
    assert list(record["methods"]) == ["full", "twin"]


def test_an_answer_is_told_by_its_prompt_not_by_its_number(tmp_path: Path) -> None:
    model, tokenizer = load_backbone("tiny", "float32")
    one, other = request(0, "import os\nimport"), request(0, "The quick brown fox jumps over")
    journal = Journal(tmp_path / "answers.jsonl")
    ElasticLM(model, tokenizer, journal).generate_until([one])
    ElasticLM(model, tokenizer, journal).generate_until([other])
    again = ElasticLM(model, tokenizer, journal)
    (answer,) = again.generate_until([one])
    assert len(journal) == 2
    entry = again.answered["task", 0]
    assert (entry.answer, entry.measures.prompt_tokens) == (
        answer,
        len(tokenizer(one.args[0])["input_ids"]),
    )


def test_routers_of_a_hub_that_were_changed_are_another_method(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny() / "router", tmp_path / "downloaded")
    monkeypatch.setattr("elasticore.models.files._download", lambda *_: tmp_path / "downloaded")
    method = Method.parse("router:path=somebody/routers")
    before = method.digest()
    file = tmp_path / "downloaded" / "router.safetensors"
    save_file({name: one * 1.25 for name, one in load_file(file).items()}, file)
    assert None not in (before, method.digest())
    assert before != method.digest()


@pytest.mark.parametrize("name", ["run #2", "a: b", "0123", "null", "1_000", "[v2]", "x=y", "a,b"])
def test_a_path_is_a_path(name: str) -> None:
    assert Method.parse(f"mine=router:path=runs/{name}").settings == {"path": f"runs/{name}"}
    assert Method.parse(f"router:path={name}").settings == {"path": name}
    both = Method.parse(f"pattern:path={name},sparsity=0.5,sink=64")
    assert both.settings == {"path": name, "sparsity": 0.5, "sink": 64}
