"""Times of calls: warmed up, synchronised, as medians."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch

__all__ = [
    "Call",
    "Clock",
    "Timing",
    "captured",
    "interleave",
    "planned",
    "start_on_cpu",
    "stopped",
]

Result = TypeVar("Result")
Call = Callable[[], object]
"""Does one engine's work."""
Reading = Callable[[], float]
"""Waits for a slice to end; its milliseconds per call."""

FLUSHED = 256 * 2**20
"""Bytes written before every run on a GPU: several times its L2 cache."""


class Timing(NamedTuple):
    """What a clock saw.

    Attributes
    ----------
    ms, min_ms
        Median and minimum of the runs.
    runs
        How many there were.
    host_ms
        Median time until the call gave control back to the host.
    peak_gib
        The most memory that was allocated in a run, in GiB; None on a CPU.
    """

    ms: float
    min_ms: float
    runs: int
    host_ms: float
    peak_gib: float | None = None


@dataclass
class Clock:
    """Times calls on one device.

    On a GPU a run lies between two CUDA events. Before each run the device is idle and its L2 cache
    is flushed; while it flushes, some tens of microseconds, the host may prepare the launch. On a
    CPU a run is wall time.

    Parameters
    ----------
    device
        Where the calls run.
    budget_ms
        Time to measure per call: as many runs as fit, from ``least`` to ``most``.
    """

    device: torch.device
    budget_ms: float = 150
    least: int = 3
    most: int = 500

    def measure(self, call: Callable[[], Any]) -> Timing:
        """Run ``call`` to warm up, then again and again."""
        once = self._warm_up(call)
        count = int(min(max(self.budget_ms / once, self.least), self.most))
        return _timing([self._run(call) for _ in range(count)])

    def take_turns(self, calls: Sequence[Callable[[], Any]]) -> list[Timing | Exception]:
        """Run ``calls`` in turns, each once per turn, in random order; they have warmed up.

        There are as many turns as fit into four budgets per call. A call that fails takes no more
        of them, and its exception is in its place.
        """
        runs: list[list[_Run]] = [[] for _ in calls]
        failed: dict[int, Exception] = {}
        shuffled = random.Random(0)
        started, turns, elapsed = time.perf_counter(), 0, 0.0
        budget = 4 * self.budget_ms * len(calls)
        while turns < self.least or (turns < self.most and elapsed < budget):
            for index in shuffled.sample(range(len(calls)), len(calls)):
                if index not in failed:
                    try:
                        runs[index].append(self._run(calls[index]))
                    except Exception as error:  # such as full memory: the others' times are good
                        failed[index] = error
            turns, elapsed = turns + 1, (time.perf_counter() - started) * 1e3
        return [failed[i] if i in failed else _timing(own) for i, own in enumerate(runs)]

    def flush(self) -> None:
        """Wait for the device and push everything out of its L2 cache."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            torch.empty(FLUSHED, dtype=torch.uint8, device=self.device).zero_()

    def wait(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _warm_up(self, call: Callable[[], Any]) -> float:
        """Compile, allocate, and let the device leave its idle state; the time of one run in ms."""
        call()
        self.wait()
        started, runs, elapsed = time.perf_counter(), 0, 0.0
        while runs == 0 or elapsed < self.budget_ms / 5:
            call()
            self.wait()
            runs, elapsed = runs + 1, (time.perf_counter() - started) * 1e3
        return elapsed / runs

    def _run(self, call: Callable[[], Any]) -> _Run:
        return self._gpu_run(call) if self.device.type == "cuda" else self._cpu_run(call)

    def _gpu_run(self, call: Callable[[], Any]) -> _Run:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()
        torch.cuda.reset_peak_memory_stats(self.device)
        begin.record()
        started = time.perf_counter()
        call()
        host = time.perf_counter() - started
        end.record()
        end.synchronize()
        peak = torch.cuda.max_memory_allocated(self.device) / 2**30
        return _Run(begin.elapsed_time(end), host * 1e3, peak)

    def _cpu_run(self, call: Callable[[], Any]) -> _Run:
        started = time.perf_counter()
        call()
        elapsed = (time.perf_counter() - started) * 1e3
        return _Run(elapsed, elapsed, None)


class _Run(NamedTuple):
    ms: float
    host_ms: float
    peak_gib: float | None


def _timing(runs: Sequence[_Run]) -> Timing:
    times, host, peaks = zip(*runs, strict=True)
    peak = max((one for one in peaks if one is not None), default=None)
    return Timing(statistics.median(times), min(times), len(runs), statistics.median(host), peak)


def planned(device: torch.device, plan: Callable[[], Result]) -> tuple[Result, float]:
    """What ``plan`` returns, and its milliseconds when it is run for the second time."""
    clock = Clock(device)
    plan()
    clock.wait()
    started = time.perf_counter()
    result = plan()
    clock.wait()
    return result, (time.perf_counter() - started) * 1e3


def stopped(device: torch.device, call: Callable[[], Any], runs: int = 5) -> float:
    """The median milliseconds of ``call`` until the device is done, after a first run."""
    clock = Clock(device)
    times = []
    for _ in range(1 + runs):
        clock.wait()
        started = time.perf_counter()
        call()
        clock.wait()
        times.append((time.perf_counter() - started) * 1e3)
    return statistics.median(times[1:])


def captured(call: Callable[[], Result]) -> Callable[[], Result]:
    """``call`` as the replay of a CUDA graph, which always gives the same output tensors.

    A call that waits for the device cannot be captured: PyTorch raises ``RuntimeError``.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # a capture may not compile or initialise anything
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def replay() -> Result:
        graph.replay()
        return out

    return replay


def start_on_gpu(call: Call, times: int, uncounted: int = 0) -> Reading:
    """Put ``uncounted`` calls into the GPU's queue, and then ``times`` that are timed."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(uncounted):
        call()
    begin.record()
    for _ in range(times):
        call()
    end.record()

    def reading() -> float:
        end.synchronize()
        return begin.elapsed_time(end) / times

    return reading


def start_on_cpu(call: Call, times: int, uncounted: int = 0) -> Reading:
    """Call ``times`` times; there is nothing to wait for afterwards."""
    for _ in range(uncounted):
        call()
    started = time.perf_counter()
    for _ in range(times):
        call()
    ms = (time.perf_counter() - started) * 1e3 / times
    return lambda: ms


def interleave(
    calls: Mapping[str, Call],
    seconds: float,
    slice_ms: float,
    start: Callable[[Call, int, int], Reading] = start_on_gpu,
) -> dict[str, float]:
    """Milliseconds of every call, measured in turns: the median over its slices.

    Parameters
    ----------
    seconds
        Of all turns together; there are at least five.
    slice_ms
        Time of one call's slice, in which it is repeated; the first half is not counted.
    start
        Starts a call some times in a row, the first ones uncounted. All slices of a turn are
        started before the first one is read, so that the GPU does not idle between them.
    """
    once = {name: start(call, 1, 0)() for name, call in calls.items()}
    uncounted = {name: round(slice_ms / 2 / ms) for name, ms in once.items()}
    times = {name: max(1, number) for name, number in uncounted.items()}
    turn_ms = sum((uncounted[name] + times[name]) * ms for name, ms in once.items())
    turns = max(5, int(seconds * 1e3 / turn_ms))
    slices: dict[str, list[float]] = {name: [] for name in calls}
    shuffled = random.Random(0)
    for _ in range(turns):
        order = shuffled.sample(list(calls), len(calls))
        readings = {name: start(calls[name], times[name], uncounted[name]) for name in order}
        for name, reading in readings.items():
            slices[name].append(reading())
    # The first quarter warms the GPU up.
    return {name: statistics.median(own[turns // 4 :]) for name, own in slices.items()}
