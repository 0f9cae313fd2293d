"""The conformance suite over many cases, in several processes and up to a deadline.

``python -m elasticore.testing BACKEND`` is its command line.
"""

from __future__ import annotations

import queue
import random
import re
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
import torch.multiprocessing

from elasticore.errors import UnsupportedRequest
from elasticore.patterns import HeadMode
from elasticore.testing.cases import PAGED, PAIRS, Case, matrix
from elasticore.testing.checks import (
    check_checkpointing,
    check_gradients,
    check_output,
    check_pages,
    check_repeatable,
    check_same_alone,
)

__all__ = ["DTYPES", "Job", "Outcome", "all_jobs", "run_job", "run_jobs", "summary"]

DTYPES = ("float64", "float32", "bfloat16", "float16")
CHECKS: dict[str, Callable[..., None]] = {
    "output": check_output,
    "same alone": check_same_alone,
    "repeatable": check_repeatable,
    "pages": check_pages,
    "gradients": check_gradients,
    "repeatable gradients": partial(check_repeatable, gradients=True),
    "checkpointing": check_checkpointing,
}
LISTED = 50
"""Failures that a summary describes."""


@dataclass(frozen=True)
class Job:
    """One check of one case; ``lanes`` are those of the plan, (retrieval, sparse)."""

    check: str
    case: Case
    dtype: str
    lanes: tuple[HeadMode, HeadMode]

    def __str__(self) -> str:
        pair = "-".join(lane.name for lane in self.lanes)
        return f"{self.check} {pair} {self.dtype} {self.case}"


Result: TypeAlias = Literal["passed", "failed", "unsupported", "out of memory"]


@dataclass(frozen=True)
class Outcome:
    """What came of a job; None as the job is a process that died."""

    job: Job | None
    result: Result
    message: str = ""


def all_jobs(
    dtypes: Collection[str],
    *,
    gradients: bool = False,
    cases: str = "",
    full: bool = True,
    seed: int = 0,
) -> list[Job]:
    """Every check of every case in a random order, so that a deadline leaves a sample.

    Parameters
    ----------
    dtypes
        Out of ``DTYPES``.
    gradients
        Whether gradients are checked as well. Outputs and gradients are held to the dense
        computation for all three pairs of lanes; the other checks take one pair for each case.
    cases
        A regular expression that the names of the cases must hold, such as ``"d128.*-all-b128"``.
    full
        Every combination of the matrix, not the pairwise cover.
    seed
        Of the order.

    Raises
    ------
    ValueError
        If a dtype is none of them, or no case is left.
    """
    for name in dtypes:
        if name not in DTYPES:
            raise ValueError(f"dtype {name!r} is unknown; there are: {', '.join(DTYPES)}.")
    try:
        wanted = [case for case in matrix(full) if re.search(cases, str(case))]
    except re.error as error:
        raise ValueError(f"cases {cases!r} is no regular expression: {error}.") from None
    if not wanted:
        raise ValueError(f"cases {cases!r} leaves none; they look like {matrix()[0]}.")
    jobs = []
    for dtype in dict.fromkeys(dtypes):
        for index, case in enumerate(wanted):
            checks = ["output", "same alone", "repeatable"]
            if gradients:
                checks += ["gradients", "repeatable gradients", "checkpointing"]
            for check in checks:
                every = check in ("output", "gradients")
                pairs = PAIRS if every else PAIRS[index % len(PAIRS) :][:1]
                jobs += [Job(check, case, dtype, lanes) for lanes in pairs]
            if case.layout in PAGED:
                jobs.append(Job("pages", case, dtype, PAIRS[0]))
    random.Random(seed).shuffle(jobs)
    return jobs


def run_job(backend: str, device: str, job: Job) -> Outcome:
    """Run one check; whatever it raises becomes an outcome."""
    options = {"dtype": getattr(torch, job.dtype), "device": device, "lanes": job.lanes}
    for wait in (1, 2, 0):  # the other processes may need the memory just now
        try:
            CHECKS[job.check](backend, job.case, **options)
        except UnsupportedRequest as error:
            return Outcome(job, "unsupported", str(error))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            time.sleep(wait)
        except Exception as error:
            return Outcome(job, "failed", f"{type(error).__name__}: {error}")
        else:
            return Outcome(job, "passed")
    return Outcome(job, "out of memory")


def run_jobs(
    backend: str,
    jobs: Sequence[Job],
    *,
    device: str = "cpu",
    processes: int = 1,
    seconds: float | None = None,
) -> Iterator[Outcome]:
    """Run jobs in processes of their own (with 1: in this one); yields outcomes as they come.

    Parameters
    ----------
    processes
        How many; each takes every ``processes``-th job, on one thread. They know the backends that
        installed packages bring, not those that were registered by a call.
    seconds
        When no further job is begun; None for no limit.
    """
    deadline = None if seconds is None else time.time() + seconds
    if processes == 1:
        for job in jobs:
            if deadline is not None and time.time() > deadline:
                return
            yield run_job(backend, device, job)
        return
    context = torch.multiprocessing.get_context("spawn")
    outcomes = context.Queue()
    workers = [
        context.Process(
            target=_work,
            args=(backend, jobs[rank::processes], device, deadline, outcomes),
            daemon=True,
        )
        for rank in range(processes)
    ]
    for worker in workers:
        worker.start()
    running = len(workers)
    while running:
        try:
            outcome = outcomes.get(timeout=1)
        except queue.Empty:
            # Who ends without a word was killed, by the system or by the engine.
            for worker in [w for w in workers if w.exitcode]:
                workers.remove(worker)
                running -= 1
                message = f"a process ended with exit code {worker.exitcode}."
                yield Outcome(None, "failed", message)
            continue
        if outcome is None:
            running -= 1
        else:
            yield outcome


def _work(
    backend: str, jobs: Sequence[Job], device: str, deadline: float | None, outcomes: Any
) -> None:
    torch.set_num_threads(1)
    for job in jobs:
        if deadline is not None and time.time() > deadline:
            break
        outcome = run_job(backend, device, job)
        outcomes.put(outcome)
        if "CUDA error" in outcome.message:
            break  # the context is lost, and every further job with it
    outcomes.put(None)


def summary(jobs: Collection[Job], outcomes: Sequence[Outcome]) -> dict[str, Any]:
    """The counts and the first failures, as JSON: what came of ``jobs``."""
    counts = Counter(outcome.result for outcome in outcomes)
    passed = Counter(o.job.check for o in outcomes if o.job and o.result == "passed")
    failed = [outcome for outcome in outcomes if outcome.result == "failed"]
    begun = sum(outcome.job is not None for outcome in outcomes)
    return {
        "checks": counts["passed"] + counts["failed"],
        "failed": counts["failed"],
        "by_check": {check: passed[check] for check in CHECKS if passed[check]},
        "unsupported": counts["unsupported"],
        "out_of_memory": counts["out of memory"],
        "left": len(jobs) - begun,
        "failures": [f"{o.job or 'process'}: {shortly(o.message)}" for o in failed[:LISTED]],
    }


def shortly(message: str, length: int = 240) -> str:
    """``message`` on one line."""
    text = " ".join(message.split())
    return text if len(text) <= length else text[: length - 1] + "…"
