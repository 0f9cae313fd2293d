"""An evaluation end to end: every method, resumed, in batches, and what it says of bad input."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

from huggingface_hub import constants
from lm_eval.api.instance import Instance
from transformers import GenerationConfig
from typer.testing import CliRunner

import elasticore as ec
from elasticore.assets import tiny
from elasticore.cli import app, console
from elasticore.eval.evaluate import Evaluation, evaluate
from elasticore.eval.journal import Journal
from elasticore.eval.language_model import ElasticLM
from elasticore.eval.methods import Method
from elasticore.eval.report import read_report
from elasticore.eval.suites import load_suites
from elasticore.models.elastic import is_elastic, routers, way_of
from elasticore.models.loading import load_backbone
from elasticore.router import write_duo, write_prulong
from tests.variants import QWEN, variant

STREAMING = "streaming:sink=32,local=64,block_size=32"
ROUTER = f"ours=router:path={tiny() / 'router'}"


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load_backbone("tiny", "float32")


def request(number: int, prompt: str, tokens: int = 5) -> Instance:
    settings = {"until": ["\n\n"], "do_sample": False, "max_gen_toks": tokens}
    return Instance("generate_until", {}, (prompt, settings), 0, ("task", number, 1))


PROMPTS = [
    "import os\nimport",
    "def double(x):\n    return",
    "The quick brown",
    "class A:\n    def",
]
REQUESTS = [request(i, prompt) for i, prompt in enumerate(PROMPTS)]


@pytest.mark.parametrize("method", ["full", STREAMING, ROUTER])
def test_a_batch_answers_as_single_requests_do(
    method: str, loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    seen = []
    with Method.parse(method).on(model):
        for size in (1, 4):
            journal = Journal(tmp_path / f"{size}.jsonl")
            answers = ElasticLM(model, tokenizer, journal, batch_size=size).generate_until(REQUESTS)
            costs = [
                (one.document, one.measures.prompt_tokens, one.measures.msr, one.measures.decisions)
                for one in sorted(journal.entries(), key=lambda one: one.document)
            ]
            seen.append((answers, costs))
    assert seen[0] == seen[1]
    assert not is_elastic(model)
    lengths = [len(tokenizer(prompt)["input_ids"]) for prompt in PROMPTS]
    assert [one[1] for one in seen[0][1]] == lengths


def test_only_what_is_not_answered_is_asked(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, tokenizer = loaded
    path = tmp_path / "answers.jsonl"
    whole = ElasticLM(model, tokenizer, Journal(path)).generate_until(REQUESTS)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:40])  # killed while it wrote the third
    asked = []
    generate = ElasticLM._model_generate

    def counted(self: Any, context: Any, *rest: Any, **settings: Any) -> Any:
        asked.append(context.shape[0])
        return generate(self, context, *rest, **settings)

    monkeypatch.setattr(ElasticLM, "_model_generate", counted)
    assert ElasticLM(model, tokenizer, Journal(path)).generate_until(REQUESTS) == whole
    assert asked == [1, 1]
    assert len(Journal(path)) == 4
    # Another way to generate is another request.
    ElasticLM(model, tokenizer, Journal(path)).generate_until([request(0, PROMPTS[0], tokens=3)])
    assert asked == [1, 1, 1]


def test_a_broken_journal_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    path.write_text('{"key": "of another version"}\n{"key": "x"}\n')
    with pytest.raises(ValueError, match=r"answers.jsonl line 1 is no answer of this version"):
        Journal(path)


def test_loglikelihoods_are_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    lm = ElasticLM(*loaded, Journal(tmp_path / "answers.jsonl"))
    with pytest.raises(ValueError, match="task task scores loglikelihoods"):
        lm.loglikelihood(REQUESTS[:1])


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 2},
        {"do_sample": True, "temperature": 2.0, "num_beams": 3},
        {"max_new_tokens": 2, "min_new_tokens": 25},
    ],
)
def test_answers_are_greedy_whatever_the_model_brings(
    settings: dict[str, Any], loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    model, tokenizer = loaded
    plain = ElasticLM(model, tokenizer, Journal(tmp_path / "plain")).generate_until(REQUESTS)
    own = model.generation_config
    model.generation_config = brought = GenerationConfig(**{**own.to_dict(), **settings})
    try:
        lm = ElasticLM(model, tokenizer, Journal(tmp_path / "brought"))
        assert lm.generate_until(REQUESTS) == plain
        assert model.generation_config is brought
    finally:
        model.generation_config = own


def test_prompts_get_no_end_of_text_and_their_first_token_once(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    """In one batch: a plain prompt, and one that begins with the first token."""
    tokenizer = variant(first=True, last=True)
    asked = [request(0, "import os"), request(1, f"{tokenizer.bos_token}import os, sys")]
    lm = ElasticLM(loaded[0], tokenizer, Journal(tmp_path / "answers"), batch_size=2)
    lm.generate_until(asked)
    text = [tokenizer(t, add_special_tokens=False)["input_ids"] for t in ("import os", ", sys")]
    sizes = {one.document: one.measures.prompt_tokens for one in lm.journal.entries()}
    assert sizes == {0: 1 + len(text[0]), 1: 1 + len(text[0]) + len(text[1])}


def test_a_tokenizer_without_an_end_is_refused(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="has no end-of-text token, which ends answers"):
        ElasticLM(loaded[0], variant(end=False), Journal(tmp_path / "answers"))


def test_thinking_is_off_unless_asked_for_and_written_down(
    loaded: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = variant(template=QWEN)
    monkeypatch.setattr(
        "elasticore.models.loading.load_backbone", lambda *_: (loaded[0], tokenizer)
    )
    asked: dict[bool, list[str]] = {}
    generate = ElasticLM.generate_until

    def noted(self: Any, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        asked[thinking] = [one.args[0] for one in requests]
        return generate(self, requests, disable_tqdm)

    monkeypatch.setattr(ElasticLM, "generate_until", noted)
    for thinking in (False, True):
        evaluation = Evaluation(
            "tiny",
            ("basic:needle", "ruler-like:vt"),
            lengths=(1024,),
            samples=1,
            chat=True,
            thinking=thinking,
        )
        evaluate(evaluation, tmp_path / str(thinking))
        settings = json.loads((tmp_path / str(thinking) / "evaluation.json").read_text("utf-8"))
        assert settings["thinking"] is thinking
    marks = "<think>\n\n</think>\n\n"
    assert [one.count(marks) for one in asked[False]] == [1, 1]
    assert [one.count(marks) for one in asked[True]] == [0, 0]
    assert asked[False][0].replace(marks, "") == asked[True][0]
    with pytest.raises(ValueError, match="thinking is a setting of the chat template"):
        Evaluation("tiny", ("basic",), thinking=True)


def test_an_evaluation_and_its_report(tmp_path: Path) -> None:
    out = tmp_path / "run"
    evaluation = Evaluation(
        "tiny",
        ("ruler-like:vt",),
        (STREAMING, ROUTER),
        lengths=(640,),
        samples=2,
        dtype="float32",
        batch_size=2,
    )
    evaluate(evaluation, out)
    rows = [json.loads(line) for line in (out / "ours" / "samples.jsonl").open(encoding="utf-8")]
    assert [row["document"] for row in rows] == [0, 1]
    assert all(0 < row["msr"] < 1 and row["backend"] and row["target"] for row in rows)
    metrics = json.loads((out / "ours" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["tasks"] == metrics["in_groups"] == ["ruler-like-640-vt"]
    found = read_report([out])
    assert found.columns[:3] == ("method", "ruler-like-640-vt", "ruler-like-640")
    streaming, ours = found.rows
    assert streaming[0] == "streaming-sink=32-local=64-block_size=32" and ours[0] == "ours"
    place = found.columns.index("Ω_MSR")
    assert streaming[place] == 1.0
    assert ours[place] == pytest.approx(sum(row["msr"] for row in rows) / 2)
    assert found.as_text("csv").splitlines()[0].startswith("method,ruler-like-640-vt,")
    assert found.as_text("markdown").splitlines()[1].startswith("| --- | --: |")
    assert r"\begin{tabular}{lrrrrr}" in found.as_text("latex")
    assert read_report([out], groups_only=True).columns[1] == "ruler-like-640"
    both = read_report([out], ["score", "msr"], groups_only=True)
    assert both.columns[:3] == ("method", "ruler-like-640", "ruler-like-640 Ω_MSR")
    assert both.rows[0][2] == 1.0 and both.rows[1][2] == ours[place]
    assert r"ruler-like-640 $\Omega_\mathrm{MSR}$ &" in both.as_text("latex")
    with pytest.raises(ValueError, match="metric loss of part 'score' is in none of the runs"):
        read_report([out], ["loss"])
    # The same again asks nothing; other settings are another evaluation's.
    before = (out / "ours" / "answers.jsonl").read_bytes()
    evaluate(evaluation, out)
    assert (out / "ours" / "answers.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match=r"evaluation: lengths \[640\] \(now \[700\]\)"):
        evaluate(dataclasses.replace(evaluation, lengths=(700,)), out)
    with pytest.raises(ValueError, match="holds answers of another method 'ours'"):
        evaluate(dataclasses.replace(evaluation, methods=("ours=full",)), out)
    shown = CliRunner().invoke(app, ["eval", "report", str(out), "--json"])
    assert [row["method"] for row in json.loads(shown.stdout)] == [streaming[0], "ours"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--tasks", "ruler", "--data", "nowhere"], "made for a tokenizer, not downloaded"),
        (["--tasks", "ruler"], "and pass the folder of the data, data"),
        (["--tasks", "longbench-e", "--data", "nowhere"], "download data.zip of the data set"),
        (["--tasks", "longbench-e"], "--repo-type dataset THUDM/LongBench data.zip'"),
        (["--tasks", "longbench-v2", "--data", "nowhere"], "longbench-v2/data.json is missing"),
        (["--tasks", "longbench-v2"], "--repo-type dataset THUDM/LongBench-v2 data.json'"),
        (["--tasks", "loogle"], "tasks name the unknown suite 'loogle'; there are: basic, ruler-l"),
        (["--tasks", "basic:nothing"], "tasks ['nothing'] are unknown; use any of needle"),
        (["--tasks", "ruler-like:nothing"], "task='nothing' is unknown"),
        (["--tasks", "ruler:nothing"], "tasks ['nothing'] are unknown; use any of niah_single_1"),
        (["--tasks", "longbench-e:nothing"], "tasks ['nothing'] are unknown; use any of qasper"),
        (["--tasks", "longbench-v2:law"], "longbench-v2 is one task; leave out ':law'"),
        (["--lengths", "64k"], "exceed the 4096 positions of tiny"),
        (["--lengths", "100"], "lengths [100] are too short for the basic tasks"),
        (["--lengths", "long"], "lengths must be a count such as 8192, 8k or 700m, got 'long'"),
        (["--method", "mamba"], "pattern 'mamba' is unknown"),
        (["--method", "streaming:treshold=1"], "pattern 'streaming' does not take these settings"),
        (["--method", "full", "--method", "router"], "method router needs path=DIRECTORY"),
        (["--method", "pattern"], "method pattern needs path=FILE.tsv or DIRECTORY"),
        (["--method", "pattern:path=nowhere"], "nowhere is neither a file nor a directory"),
        (["--method", "nsa"], "method nsa needs path=FILE.safetensors"),
        (["--method", "full", "--method", "full"], "call each by one of its own"),
        (["--method", "x=full:a=1,b"], "method 'x=full:a=1,b' must be"),
        (["--model", "nobody/nothing"], "model nobody/nothing is no directory with a model, and"),
    ],
)
def test_bad_input_ends_in_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(console.err, "width", 10_000)
    options = ["--dtype", "float32", "--samples", "1", "--output", str(tmp_path / "run")]
    result = CliRunner().invoke(app, ["eval", "--model", "tiny", *options, *arguments])
    assert result.exit_code == 2
    (line,) = [line for line in result.output.splitlines() if "Loading weights" not in line]
    assert line.startswith("error: ")
    assert said in line
    # The folder is still free for the right command, and nothing was asked.
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "kind", "settings"),
    [
        ("full", "full", {}),
        ("xattention:threshold=0.95", "xattention", {"threshold": 0.95}),
        ("router:path=runs/a=b", "router", {"path": "runs/a=b"}),
        ("late=trianglemix:local=256,from_layer=2", "trianglemix", {"local": 256, "from_layer": 2}),
    ],
)
def test_methods_are_read(text: str, kind: str, settings: dict[str, Any]) -> None:
    method = Method.parse(text)
    assert (method.kind, method.settings) == (kind, settings)
    assert "/" not in method.name


def test_a_selectors_own_settings_are_its_own(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    with Method.parse("trianglemix:sink=64,local=256,last=64,block_size=64,from_layer=6").on(model):
        way = way_of(model)
        assert (way.sparse, way.block_size) == (ec.TriangleMix(64, 256, last=64), 64)
        sparse = [int(policy.decisions.sum()) for policy in routers(model)]
        assert sparse == [0] * 6 + [4] * 2


def test_routers_can_be_asked_to_read_prompts_in_full(loaded: tuple[Any, Any]) -> None:
    model, _ = loaded
    for settings in (("full", "routed"), ("routed", "full")):
        text = "router:path=tiny,prefill={},decode={}".format(*settings)
        with Method.parse(text).on(model):
            assert (way_of(model).prefill, way_of(model).decode) == settings
    with pytest.raises(ValueError, match="prefill must be one of routed, full, got 'whole'"):
        Method.parse("router:path=tiny,prefill=whole").way(model)
    with pytest.raises(ValueError, match="turn"):
        Method.parse("router:path=tiny,turn=keep").way(model)


def test_suites_and_single_tasks_of_them_can_be_mixed(loaded: tuple[Any, Any]) -> None:
    _, tokenizer = loaded

    def names(*tasks: str, lengths: tuple[int, ...] = (700,)) -> set[str]:
        evaluation = Evaluation("tiny", tasks, lengths=lengths, samples=1)
        groups = load_suites(evaluation, tokenizer, 4096)
        return {task.task_name for group in groups for task in group.get_all_tasks()}

    two = {"ruler-like-700-vt", "ruler-like-700-qa_1"}
    assert names("ruler-like:vt", "ruler-like:qa_1", "ruler-like:vt") == two
    assert names("ruler-like:vt", "basic:code") == {"ruler-like-700-vt", "basic-700-code"}
    assert len(names("basic:code", "basic")) == 5  # a whole suite is whole
    evaluation = Evaluation("tiny", ("ruler-like:vt",), lengths=(700, 800), samples=1)
    (mean,) = load_suites(evaluation, tokenizer, 4096)
    assert mean.name == "ruler-like-mean"
    assert mean.child_names == ["ruler-like-700", "ruler-like-800"]


def test_a_published_pattern_is_a_method(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    model, _ = loaded
    scores = torch.arange(32).view(8, 4) / 32
    folder = write_duo(tmp_path / "duo", scores, 32, 64)
    mask = write_prulong(tmp_path / "masks_sp0.7.tsv", scores < 0.7)

    def sparse(text: str) -> list[list[int]]:
        with Method.parse(text).on(model):
            assert way_of(model).sparse in map(ec.Streaming, (32, 64, 128), (64, 256, 1024))
            return [policy.decisions.tolist() for policy in routers(model)]

    assert sparse(f"pattern:path={folder},sparsity=0.25") == (scores < 0.25).int().tolist()
    assert sparse(f"pattern:path={mask}") == (scores < 0.7).int().tolist()
    assert sparse(f"pattern:path={mask},sink=64,local=256") == (scores < 0.7).int().tolist()
    assert not is_elastic(model)


def test_files_that_have_changed_are_another_method(tmp_path: Path) -> None:
    mask = write_prulong(tmp_path / "masks.tsv", torch.ones(8, 4) > 0)
    before = Method.parse(f"pattern:path={mask}").digest()
    assert before == Method.parse(f"pattern:path={mask}").digest()
    write_prulong(mask, torch.ones(8, 4) < 0)
    assert Method.parse(f"pattern:path={mask}").digest() not in (before, None)
    assert Method.parse("full").digest() is None
    assert Method.parse("router:path=tiny").digest() is not None


def test_full_attention_is_pytorchs_in_batches_too(loaded: tuple[Any, Any], tmp_path: Path) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    ElasticLM(*loaded, journal, batch_size=4).generate_until(REQUESTS)
    assert {one.measures.backend for one in journal.entries()} == {"sdpa"}


def test_a_prompt_beyond_the_positions_is_refused_not_cut(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    journal = Journal(tmp_path / "answers.jsonl")
    lm = ElasticLM(*loaded, journal, max_length=20)
    with pytest.raises(ValueError, match=r"document 9: \d+ tokens of prompt and 5 of answer"):
        lm.generate_until([*REQUESTS, request(9, "one two " * 20)])
    assert not len(journal)
