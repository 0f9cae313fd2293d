"""Answers, decisions and sparsity do not depend on what runs the attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

from lm_eval.api.instance import Instance

import elasticore
from elasticore.choice import use_backend
from elasticore.eval.journal import Journal
from elasticore.eval.language_model import ElasticLM
from elasticore.eval.methods import Method
from elasticore.eval.tasks import make_sample
from elasticore.models.loading import load_backbone


def answers_with(backend: str, method: str, path: Path, lengths: tuple[int, int]) -> list[Any]:
    """Answers and decisions of a batch of two unequal prompts."""
    model, tokenizer = load_backbone("tiny", "float32")
    settings = {"until": [], "do_sample": False, "max_gen_toks": 2}
    requests = []
    for number, length in enumerate(lengths):
        sample = make_sample("needle", tokenizer, length, number)
        prompt = tokenizer.decode(sample.input_ids[: sample.start].tolist())
        about = ("needle", number, 1)
        requests.append(Instance("generate_until", {}, (prompt, settings), 0, about))
    with use_backend(backend), Method.parse(method).on(model):
        journal = Journal(path / f"{backend}.jsonl")
        ElasticLM(model, tokenizer, journal, batch_size=2).generate_until(requests)
    entries = sorted(journal.entries(), key=lambda one: one.document)
    assert all(one.measures.backend == backend for one in entries)
    return [(one.answer, one.measures.decisions, one.measures.msr) for one in entries]


def test_the_backend_changes_no_answer(tmp_path: Path) -> None:
    expected = answers_with("serial", "router:path=tiny", tmp_path, (150, 200))
    assert any("1" in layer for layer in expected[1][1])
    # On a CPU in Triton's interpreter.
    assert answers_with("triton", "router:path=tiny", tmp_path, (150, 200)) == expected


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "flex"])
@pytest.mark.parametrize(
    "method", ["router:path=tiny", "streaming:sink=64,local=256,block_size=64"]
)
def test_no_backend_changes_an_answer_on_a_gpu(backend: str, method: str, tmp_path: Path) -> None:
    if not {found.name: found.available for found in elasticore.list_backends()}[backend]:
        pytest.skip(f"{backend} is not available here")
    expected = answers_with("serial", method, tmp_path, (3000, 4000))
    try:
        found = answers_with(backend, method, tmp_path, (3000, 4000))
    except elasticore.UnsupportedRequest as error:
        pytest.skip(str(error))
    assert found == expected
