"""Running cases: prepare an engine, compare its output, time it, note what came of it."""

from __future__ import annotations

import dataclasses
import functools
import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from elasticore.bench.cases import Case, Engine, Work
from elasticore.bench.timing import Clock, Timing
from elasticore.errors import UnsupportedRequest

__all__ = ["Record", "Session", "Stopwatch", "add_ratios", "run_engine"]


@dataclass
class Record:
    """What came of one engine and one case; ``ms`` is None where there is a reason instead.

    Attributes
    ----------
    engine
        Its name.
    peer
        Whether the others are compared with it.
    ms, min_ms, runs
        Median, minimum and number of the runs.
    host_ms
        Median time until the call gave control back to the host.
    plan_ms
        What was spent once per routing, outside the calls.
    peak_gib
        The most memory allocated in a run, in GiB; None on a CPU.
    tflops, gb_s
        From the median; TFLOP/s count useful query-key pairs only.
    difference
        From the reference; None where there is none.
    details
        What else is known about the work that it did, by name.
    ratios
        Name of each engine of the case, and of each peer that reads everything, to its median over
        this one: above 1, this one is faster.
    skipped
        Why there is no time: it is missing, refused, or was not asked for.
    failed
        Why a time does not count: a wrong output, or an error of one of our own engines.
    """

    engine: str
    peer: bool
    ms: float | None = None
    min_ms: float | None = None
    runs: int | None = None
    host_ms: float | None = None
    plan_ms: float | None = None
    peak_gib: float | None = None
    tflops: float | None = None
    gb_s: float | None = None
    difference: float | None = None
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    ratios: dict[str, float] = dataclasses.field(default_factory=dict)
    skipped: str = ""
    failed: str = ""


Stopwatch = Callable[[Callable[[], object], Record], None]
"""Times a call and writes what it saw into a record."""


def run_engine(
    case: Case,
    engine: Engine,
    work: Callable[[], Work],
    stopwatch: Stopwatch,
    *,
    device: torch.device,
    asked: bool = False,
    closing: ExitStack | None = None,
) -> Record:
    """Run one engine on one case.

    Parameters
    ----------
    work
        Gives the case's tensors; called only if the engine runs.
    stopwatch
        Times the call.
    asked
        Whether the engine was asked for by name, and runs where it is left out otherwise.
    closing
        Closes the engine later, where the stopwatch only notes the call; by default at the end.
    """
    record = Record(engine.name, engine.peer)
    verdict = engine.available(case, device)
    if not verdict:
        record.skipped = verdict.reason
    elif not asked:
        record.skipped = engine.left_out(case, device)
    if record.skipped:
        return record
    try:
        with torch.no_grad(), ExitStack() as own:
            _measure(engine, work(), stopwatch, record, own if closing is None else closing)
    except UnsupportedRequest as error:
        record.skipped = str(error)
    except Exception as error:  # whatever happens to one engine must not end the others' run
        _note_failure(error, record)
    return record


def _note_failure(error: Exception, record: Record) -> None:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
    if record.peer:
        record.skipped = reason
    else:
        record.failed = reason


def _measure(
    engine: Engine, work: Work, stopwatch: Stopwatch, record: Record, closing: ExitStack
) -> None:
    ready = engine.prepare(work)
    closing.callback(ready.close)
    record.plan_ms, record.details = ready.plan_ms, dict(ready.details)
    record.difference = work.difference(ready.call())
    if record.difference is not None and not record.difference <= work.tolerance:
        record.failed = (
            f"its output differs from the reference by {record.difference:.2g} (allowed: "
            f"{work.tolerance:.2g})."
        )
        return
    stopwatch(ready.call, record)
    _add_rates(record, work)


def _add_rates(record: Record, work: Work) -> None:
    if record.ms and work.flops:
        record.tflops = work.flops / record.ms / 1e9
    if record.ms and work.bytes:
        record.gb_s = work.bytes / record.ms / 1e6


@dataclass
class Session:
    """A run over several cases.

    Parameters
    ----------
    cases
        What is run, in order.
    clock
        Times every call.
    engines
        Names of the engines to run; empty means all.

    Raises
    ------
    ValueError
        If no case is left, or no case has an engine of that name.
    """

    cases: Sequence[Case]
    clock: Clock
    engines: Collection[str] = ()

    def __post_init__(self) -> None:
        if not self.cases:
            raise ValueError("length leaves no case; without it, every length is run.")
        known = dict.fromkeys(engine.name for case in self.cases for engine in case.engines())
        for name in self.engines:
            if name not in known:
                raise ValueError(f"engine {name!r} is unknown here; there are: {', '.join(known)}.")

    @cached_property
    def plan(self) -> list[tuple[Case, list[Engine]]]:
        """Every case with the engines that will be run."""
        chosen = [
            (case, [e for e in case.engines() if not self.engines or e.name in self.engines])
            for case in self.cases
        ]
        return [(case, engines) for case, engines in chosen if engines]

    def run(
        self, step: Callable[[Case, Engine], None] = lambda case, engine: None
    ) -> Iterator[tuple[Case, list[Record]]]:
        """Run everything; yields each case with the records of its engines.

        Parameters
        ----------
        step
            Called before each engine.
        """
        results: dict[str, list[Record]] = {}
        for case, engines in self.plan:
            records = self._case(case, engines, step)
            add_ratios(records, results.get(case.dense, []))
            results[str(case)] = records
            yield case, records

    def _case(
        self, case: Case, engines: Sequence[Engine], step: Callable[[Case, Engine], None]
    ) -> list[Record]:
        device, asked = self.clock.device, bool(self.engines)
        work = functools.cache(lambda: case.build(device))
        waiting: list[tuple[Record, Callable[[], object]]] = []

        def stopwatch(call: Callable[[], object], record: Record) -> None:
            if case.in_turns:
                waiting.append((record, call))
            else:
                _note(self.clock.measure(call), record)

        records = []
        with ExitStack() as ends, torch.no_grad():  # until then, those in turns stay prepared
            closing = ends if case.in_turns else None
            for engine in engines:
                step(case, engine)
                records.append(
                    run_engine(
                        *(case, engine, work, stopwatch),
                        device=device,
                        asked=asked,
                        closing=closing,
                    )
                )
            timings = self.clock.take_turns([call for _, call in waiting])
        for timing, (record, _) in zip(timings, waiting, strict=True):
            if isinstance(timing, Exception):
                _note_failure(timing, record)
                continue
            _note(timing, record)
            _add_rates(record, work())
        waiting.clear()
        work.cache_clear()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        return records


def _note(timing: Timing, record: Record) -> None:
    record.ms, record.min_ms = timing.ms, timing.min_ms
    record.runs, record.host_ms = timing.runs, timing.host_ms
    record.peak_gib = timing.peak_gib


def add_ratios(records: Sequence[Record], dense: Sequence[Record]) -> None:
    """Compare every record of a case with the others, and with the peers among ``dense``.

    An engine that does the work of both cases counts in its own.
    """
    here = {r.engine for r in records}
    others = {r.engine: r.ms for r in dense if r.peer and r.ms and r.engine not in here}
    others |= {r.engine: r.ms for r in records if r.ms}
    for record in records:
        if record.ms:
            record.ratios = {
                name: ms / record.ms for name, ms in others.items() if name != record.engine
            }
