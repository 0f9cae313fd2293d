"""Processes share the samples of an evaluation: the scores are those of one process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from elasticore.cli.console import app
from elasticore.eval.evaluate import Evaluation, evaluate

SETTINGS = [
    *("--model", "tiny", "--router", "tiny", "--tasks", "basic:needle,basic:prose"),
    *("--lengths", "512", "--dtype", "float32", "--samples", "5"),
]


def together(count: int, *words: str) -> subprocess.CompletedProcess[str]:
    """A module or script in processes that ``torchrun`` starts."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
    return subprocess.run(
        [sys.executable, *launch, *words],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def found(output: Path) -> tuple[Any, list[Any]]:
    """Scores, and what does not tell of time of every sample."""
    scores = json.loads((output / "elastic" / "metrics.json").read_text("utf-8"))["scores"]
    rows = [json.loads(line) for line in (output / "elastic" / "samples.jsonl").open()]
    kept = ("task", "document", "scores", "answer", "target", "decisions", "msr", "esr")
    return scores, [{name: row[name] for name in kept if name in row} for row in rows]


def answers(output: Path) -> list[str]:
    files = sorted((output / "elastic").glob("answers*.jsonl"))
    return [json.loads(line)["key"] for file in files for line in file.open()]


def test_two_processes_answer_what_one_does_and_one_goes_on(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    done = CliRunner().invoke(app, ["eval", *SETTINGS, "--output", str(one)])
    assert done.exit_code == 0, done.output
    done = together(2, "-m", "elasticore", "eval", *SETTINGS, "--output", str(two))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("basic-512-needle") == 1  # one speaks for both
    expected, rows = found(one)
    scores, shared = found(two)
    assert shared == rows and len(rows) == 10
    for task, metrics in expected.items():  # sums in another order
        assert scores[task] == pytest.approx(metrics, rel=1e-12)
    assert set(Counter(answers(two)).values()) == {1} and len(answers(two)) == 10
    # The second process was stopped while it wrote its fourth answer; one process does the rest.
    second = two / "elastic" / "answers-1.jsonl"
    lines = second.read_text("utf-8").splitlines(keepends=True)
    second.write_text("".join(lines[:3]) + lines[3][:20], "utf-8")
    (two / "elastic" / "metrics.json").unlink()
    done = CliRunner().invoke(app, ["eval", *SETTINGS, "--output", str(two)])
    assert done.exit_code == 0, done.output
    assert found(two) == (expected, rows)


FAILS = """
import os, sys
from elasticore.eval.language_model import ElasticLM
from elasticore.cli import app

if os.environ["RANK"] == "1":
    def fails(self, *args, **kwargs):
        raise OSError("the disk of the second process is gone")
    ElasticLM._model_generate = fails
app(["eval", *sys.argv[1:]])
"""


def test_a_process_that_fails_ends_the_run_and_what_is_answered_stays(tmp_path: Path) -> None:
    script, output = tmp_path / "fails.py", tmp_path / "run"
    script.write_text(FAILS, "utf-8")
    done = together(2, str(script), *SETTINGS, "--output", str(output))  # else it waits for days
    assert done.returncode != 0
    assert "the disk of the second process is gone" in done.stderr
    assert not (output / "elastic" / "samples.jsonl").exists()
    done = CliRunner().invoke(app, ["eval", *SETTINGS, "--output", str(output)])
    assert done.exit_code == 0, done.output
    assert len(answers(output)) == len(found(output)[1]) == 10


def test_more_processes_than_samples_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from contextlib import nullcontext

    from elasticore.processes import Launched

    monkeypatch.setattr("elasticore.eval.evaluate.joined", lambda: nullcontext(Launched(0, 3)))
    small = Evaluation("tiny", ("basic:needle",), lengths=(512,), samples=2, dtype="float32")
    with pytest.raises(ValueError, match="basic-512-needle has 2 samples for 3 processes"):
        evaluate(small, tmp_path)
    assert not list(tmp_path.iterdir())
