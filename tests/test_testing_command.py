"""``python -m elasticore.testing``: many checks, counted, with failures told shortly."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from elasticore import AttentionRequest, HeadMode, Verdict, register_backend, testing
from elasticore.backends.serial import SerialAttention
from elasticore.testing import __main__ as command
from elasticore.testing import runner
from elasticore.testing.runner import Job, Outcome, all_jobs, run_job, run_jobs, summary

pytestmark = pytest.mark.usefixtures("clean_registry")

FEW = "dense-g1-d32-t127-(all|some)-b64"


class Negative(SerialAttention):
    """Wrong where there is more than one query; otherwise right."""

    def attend(self, q: Any, *args: Any, **kwargs: Any) -> Any:
        out = super().attend(q, *args, **kwargs)
        return -out if q.shape[2] > 1 else out


class ForwardOnly(SerialAttention):
    def supports(self, request: AttentionRequest) -> Verdict:
        return Verdict(not request.gradients, "inference only.")


class Hungry(SerialAttention):
    def attend(self, *args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory.")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(command.app, [*arguments, "--device", "cpu"])


def test_everything_passes_on_the_reference(tmp_path: Path) -> None:
    report = tmp_path / "new" / "report.json"
    result = run("serial", "--cases", FEW, "--gradients", "--json", str(report))
    assert result.exit_code == 0, result.output
    found = json.loads(report.read_text("utf-8"))
    # Two cases in float64 and float32.
    counts = {"output": 12, "same alone": 4, "repeatable": 4, "pages": 4, "gradients": 12}
    assert found["by_check"] == {**counts, "repeatable gradients": 4, "checkpointing": 4}
    assert found["checks"] == 44
    assert found["failed"] == found["unsupported"] == found["out_of_memory"] == found["left"] == 0
    assert found["failures"] == []
    for fact in ("date", "gpu", "versions", "commit", "command", "seconds"):
        assert fact in found
    assert found["versions"]["torch"]
    assert found["command"].startswith("python -m elasticore.testing")
    assert "44 passed, 0 failed" in result.stdout


def test_failures_are_listed_shortly_and_end_in_code_1(tmp_path: Path) -> None:
    register_backend("negative", Negative)
    report = tmp_path / "report.json"
    result = run("negative", "--cases", FEW, "--dtype", "float32", "--json", str(report))
    assert result.exit_code == 1
    found = json.loads(report.read_text("utf-8"))
    assert found["failed"] == len(found["failures"]) == 8
    right = {"repeatable": 2, "pages": 2}  # wrong the same way every time, but for pages
    assert found["by_check"] == right
    shown = " ".join(result.stdout.split())
    for case in ("dense-g1-d32-t127-all-b64", "dense-g1-d32-t127-some-b64"):
        assert (
            f"failed output FULL-SELECTED float32 {case}: AssertionError: output: max error"
            in shown
        )
    assert "Traceback" not in result.output


def test_what_is_not_supported_is_no_failure_unless_it_is_everything() -> None:
    register_backend("forward", ForwardOnly)
    result = run("forward", "--cases", FEW, "--gradients", "--dtype", "float64")
    assert result.exit_code == 0
    assert "12 passed, 0 failed, 10 not supported" in " ".join(result.stdout.split())
    result = run("serial", "--cases", FEW, "--dtype", "float64", "--seconds", "0")
    assert result.exit_code == 1, "nothing ran, so nothing was shown"
    assert "12 not begun" in " ".join(result.stdout.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tritn"], "backend 'tritn' is unknown; there are: auto"),
        (["serial", "--dtype", "int8"], "dtype 'int8' is unknown; there are: float64, float32"),
        (["serial", "--cases", "d1024"], "leaves none; they look like"),
        (["serial", "--cases", "("], "is no regular expression"),
    ],
)
def test_bad_input_ends_in_code_2(arguments: list[str], message: str) -> None:
    result = run(*arguments)
    assert result.exit_code == 2
    assert message in " ".join(result.stderr.split())


def test_a_lack_of_memory_is_retried_and_is_no_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    register_backend("hungry", Hungry)
    waited: list[float] = []
    monkeypatch.setattr(runner.time, "sleep", waited.append)
    (job, *_) = all_jobs(["float32"], cases=FEW)
    outcome = run_job("hungry", "cpu", job)
    assert outcome == Outcome(job, "out of memory")
    assert len(waited) == 3
    assert summary([job], [outcome])["out_of_memory"] == 1


def test_the_full_matrix_is_run_in_a_random_order_that_is_always_the_same() -> None:
    every = all_jobs(["float32", "float64"], full=True)
    cases = testing.matrix(full=True)
    paged = [case for case in cases if case.layout in ("dense", "packed")]
    assert len(every) == len(set(every)) == 2 * (5 * len(cases) + len(paged))
    assert all_jobs(["float32", "float64"], full=True) == every
    assert all_jobs(["float32", "float64"], full=True, seed=1) != every
    # The first hundred are a sample: of all layouts, checks and dtypes.
    sample = every[:100]
    assert {job.case.layout for job in sample} == {"dense", "left", "right", "packed"}
    assert len({(job.check, job.dtype) for job in sample}) == 8


@pytest.mark.parametrize("check", ["output", "gradients"])
def test_outputs_and_gradients_are_checked_for_all_pairs_of_lanes(check: str) -> None:
    jobs = all_jobs(["float32"], gradients=True, cases=FEW)
    full, streaming, selected = HeadMode
    pairs = {(full, streaming), (full, selected), (selected, streaming)}
    assert {(job.case, job.lanes) for job in jobs if job.check == check} == {
        (job.case, pair) for job in jobs for pair in pairs
    }
    assert sum(job.check == "checkpointing" for job in jobs) == 2


class Deadly:
    """Ends the process that receives it."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os._exit, (7,)


def test_processes_share_the_work_and_one_that_dies_is_a_failure() -> None:
    jobs = all_jobs(["float64"], cases=FEW, full=True)
    outcomes = list(run_jobs("serial", jobs, processes=2))
    assert {outcome.job for outcome in outcomes} == set(jobs)
    assert all(outcome.result == "passed" for outcome in outcomes)

    # The second process gets the second job, and every second one after it.
    mixed: list[Any] = [jobs[0], Deadly(), jobs[1], jobs[2]]
    outcomes = list(run_jobs("serial", mixed, processes=2))
    assert {outcome.job for outcome in outcomes} == {jobs[0], jobs[1], None}
    counts = summary(mixed, outcomes)
    assert (counts["checks"], counts["failed"], counts["left"]) == (3, 1, 2)
    assert counts["failures"] == ["process: a process ended with exit code 7."]


# --- check_checkpointing -------------------------------------------------------------------------


class Forgetful(SerialAttention):
    """Computes something else when it runs again, as a backend with state of its own might."""

    runs = 0

    def attend(self, q: Any, *args: Any, **kwargs: Any) -> Any:
        type(self).runs += 1
        return super().attend(q if type(self).runs < 3 else 1.5 * q, *args, **kwargs)


def test_a_backend_that_changes_when_it_is_recomputed_is_rejected() -> None:
    (case,) = (case for case in testing.matrix(True) if str(case) == "dense-g1-d32-t127-all-b64")
    testing.check_checkpointing("serial", case)
    register_backend("forgetful", Forgetful)
    with pytest.raises(AssertionError, match="checkpointing changes the gradient of"):
        testing.check_checkpointing("forgetful", case)


def test_a_job_says_what_it_is() -> None:
    case = testing.matrix()[0]
    pair = (HeadMode.FULL, HeadMode.SELECTED)
    assert str(Job("gradients", case, "float16", pair)) == f"gradients FULL-SELECTED float16 {case}"
