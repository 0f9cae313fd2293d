"""The cases of ``elasticore bench`` as benchmarks for pytest: run with ``make bench``.

A test file names its suite; each of its tests is one engine on one case, grouped by case. The time
is wall time of the call and the wait for the device, with a GPU's L2 cache flushed before.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from elasticore.bench.cases import Case, Engine, Work, cases_of
from elasticore.bench.run import Record, run_engine
from elasticore.bench.timing import Clock

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "engine" in metafunc.fixturenames:
        cases = cases_of(metafunc.module.SUITE, DEVICE)
        pairs = [(case, engine) for case in cases for engine in case.engines()]
        names = [f"{case}-{engine}" for case, engine in pairs]
        metafunc.parametrize(("case", "engine"), pairs, ids=names)


@functools.lru_cache(maxsize=1)  # the engines of a case follow each other
def work(case: Case) -> Work:
    return case.build(DEVICE)


@pytest.fixture
def timed(benchmark: BenchmarkFixture) -> Callable[[Case, Engine], Record]:
    """Compare and time one engine; skip with the reason where it cannot run."""
    clock = Clock(DEVICE)

    def stopwatch(call: Callable[[], object], record: Record) -> None:
        def whole() -> None:
            call()
            clock.wait()

        def cold() -> None:
            clock.flush()
            clock.wait()

        rounds = 10 if DEVICE.type == "cuda" else 3
        benchmark.pedantic(whole, setup=cold, warmup_rounds=2, rounds=rounds)
        if benchmark.stats is not None:  # with --benchmark-disable the call has only run
            record.ms = benchmark.stats.stats.median * 1e3

    def run(case: Case, engine: Engine) -> Record:
        benchmark.group = str(case)
        record = run_engine(case, engine, lambda: work(case), stopwatch, device=DEVICE)
        if record.skipped:
            pytest.skip(record.skipped)
        assert not record.failed, record.failed
        for name in ("plan_ms", "tflops", "gb_s", "difference"):
            benchmark.extra_info[name] = getattr(record, name)
        return record

    return run
