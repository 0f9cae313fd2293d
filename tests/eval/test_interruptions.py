"""What stops an evaluation costs no answer, and changes none: kills, full memory, other batches."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("lm_eval", reason="pip install 'elasticore[eval]'")

import torch
from typer.testing import CliRunner

from elasticore.cli import app
from elasticore.errors import UnsupportedRequest
from elasticore.eval.benchmarks.basic import load_basic
from elasticore.eval.evaluate import Evaluation, evaluate
from elasticore.eval.journal import Journal
from elasticore.eval.language_model import ElasticLM
from elasticore.models.loading import load_backbone

TIMES = {"first_token_seconds", "tokens_per_second", "peak_gb"}
EVALUATION = Evaluation(
    "tiny",
    ("basic:multikey", "basic:prose"),
    ("ours=router:path=tiny",),
    lengths=(288, 384),
    samples=2,
    dtype="float32",
    batch_size=2,
    backend="serial",
)


def without_times(found: Any) -> Any:
    if isinstance(found, dict):
        return {k: without_times(v) for k, v in found.items() if k not in TIMES}
    return [without_times(v) for v in found] if isinstance(found, list) else found


def finished(folder: Path) -> tuple[str, list[Any]]:
    """The bytes of metrics.json but for the times, and the samples."""
    method = folder / "ours"
    metrics = json.loads((method / "metrics.json").read_text(encoding="utf-8"))
    lines = (method / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return json.dumps(without_times(metrics)), [without_times(json.loads(line)) for line in lines]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return evaluate(EVALUATION, tmp_path_factory.mktemp("whole") / "run")


def test_a_killed_evaluation_resumes_to_the_same_metrics(
    uninterrupted: Path, tmp_path: Path
) -> None:
    out, answers = tmp_path / "run", tmp_path / "run" / "ours" / "answers.jsonl"
    code = (
        "import sys; from elasticore.eval.evaluate import *\n"
        f"evaluate(Evaluation(**{dataclasses.asdict(EVALUATION)!r}), sys.argv[1])"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(out)], cwd=Path.cwd())
    until = time.monotonic() + 120
    while child.poll() is None and time.monotonic() < until:
        if answers.is_file() and answers.read_bytes().count(b"\n") >= 3:  # in the second batch
            os.kill(child.pid, signal.SIGKILL)
        time.sleep(0.005)
    assert child.wait() == -signal.SIGKILL
    left = len(Journal(answers))
    assert 3 <= left < 8
    with answers.open("a") as file:
        file.write('{"key": "cut off he')
    evaluate(EVALUATION, out)
    assert finished(out) == finished(uninterrupted)


def settled(found: Any) -> Any:
    """Without the size of the batch; Ω_ESR but for the last bits.

    It is the mean of 32 shares in float64, which PyTorch adds in an order that depends on the
    batch: 32 roundings of 2⁻⁵³ are less than 10⁻¹⁴.
    """
    if isinstance(found, dict):
        rounded = {k: round(v, 13) for k, v in found.items() if k in ("esr", "esr_last_query")}
        other = {k: settled(v) for k, v in found.items() if k not in rounded}
        return {k: v for k, v in {**other, **rounded}.items() if k != "batch_size"}
    return [settled(v) for v in found] if isinstance(found, list) else found


def test_four_at_a_time_are_four_single_runs(uninterrupted: Path, tmp_path: Path) -> None:
    # The prompts of a batch of four have two lengths: half of them are padded.
    expected, rows = finished(uninterrupted)
    for size in (1, 4):
        changed = dataclasses.replace(EVALUATION, batch_size=size)
        metrics, samples = finished(evaluate(changed, tmp_path / str(size)))
        assert all(sample["batch_size"] == size for sample in samples)
        assert settled(samples) == settled(rows)  # answers, decisions and all
        assert settled(json.loads(metrics)) == settled(json.loads(expected))


def test_another_batch_size_goes_on_where_the_first_stopped(
    uninterrupted: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    evaluate(EVALUATION, out)
    answers = out / "ours" / "answers.jsonl"
    lines = answers.read_bytes().splitlines(keepends=True)
    answers.write_bytes(b"".join(lines[:6]))
    evaluate(dataclasses.replace(EVALUATION, batch_size=1), out)
    assert [one.measures.batch_size for one in Journal(answers).entries()] == [2] * 6 + [1] * 2
    metrics, expected = (json.loads(finished(one)[0]) for one in (out, uninterrupted))
    assert settled(metrics) == settled(expected)


def test_full_memory_ends_in_one_line_and_keeps_the_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = ElasticLM._model_generate
    calls = []

    def limited(self: Any, context: Any, *rest: Any, **settings: Any) -> Any:
        calls.append(context.shape)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore")
        return generate(self, context, *rest, **settings)

    monkeypatch.setattr(ElasticLM, "_model_generate", limited)
    out = tmp_path / "run"
    options = ["--model", "tiny", "--router", "tiny", "--tasks", "basic:needle"]
    options += ["--lengths", "320", "--samples", "4", "--dtype", "float32"]
    command = ["eval", *options, "--output", str(out)]
    result = CliRunner().invoke(app, [*command, "--batch-size", "2"])
    said = " ".join(result.output.split())
    assert result.exit_code == 2
    assert "error: task basic-320-needle: a prompt of" in said
    assert "tokens in a batch of 2 does not fit into memory" in said
    assert "with a smaller --batch-size. The 2 answers so far are kept in" in said
    assert "Traceback" not in said and "CUDA" not in said
    # What it advises works, and asks the two that are left.
    result = CliRunner().invoke(app, [*command, "--batch-size", "1"])
    assert result.exit_code == 0, result.output
    assert [shape[0] for shape in calls] == [2, 2, 1, 1]
    assert len(Journal(out / "elastic" / "answers.jsonl")) == 4


@pytest.mark.parametrize("words", ["out of GPU", "DefaultCPUAllocator: can't allocate memory: you"])
def test_a_single_prompt_too_large_for_memory(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = torch.OutOfMemoryError if "GPU" in words else RuntimeError

    def failing(*_: Any, **__: Any) -> Any:
        raise kind(words)

    monkeypatch.setattr(ElasticLM, "_model_generate", failing)
    single = dataclasses.replace(EVALUATION, batch_size=1)
    with pytest.raises(UnsupportedRequest, match=r"batch of 1 .* use shorter --lengths") as caught:
        evaluate(single, tmp_path / "run")
    assert "\n" not in str(caught.value)


def test_other_errors_are_not_taken_for_full_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("a bug")

    monkeypatch.setattr(ElasticLM, "_model_generate", failing)
    with pytest.raises(RuntimeError, match="a bug"):
        evaluate(EVALUATION, tmp_path / "run")


def test_a_model_too_large_for_the_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from elasticore.models import loading

    def failing(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(loading, "load_backbone", failing)
    with pytest.raises(UnsupportedRequest, match="model tiny in float32 does not fit"):
        evaluate(EVALUATION, tmp_path / "run")


# ---- Seeds ----


def test_seeds_give_the_samples() -> None:
    _, tokenizer = load_backbone("tiny")

    def rows(seed: int) -> list[Any]:
        groups = load_basic(tokenizer, [300], 2, seed)
        return [task.rows for group in groups for task in group]

    assert rows(0) == rows(0)
    assert all(a != b for a, b in zip(rows(0), rows(2), strict=True))
    assert [task[1] for task in rows(0)] == [task[0] for task in rows(1)]  # one after the other
