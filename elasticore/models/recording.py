"""``elasticore.record()``: what was decided, how sparse it was and how long it took."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns import BlockLists
from elasticore.plan import HeadPlan

__all__ = ["PassRecord", "Trace", "active_traces", "record"]

_traces: ContextVar[tuple[Trace, ...]] = ContextVar("elasticore_traces", default=())
_open: list[Trace] = []
"""Every trace whose block is open, for threads that were started inside one."""


@dataclass(eq=False)
class PassRecord:
    """One forward pass of an elastic model.

    Attributes
    ----------
    decided
        Whether the routers decided in this pass; else it went on with what was decided before.
    decisions
        int8 ``[layers, sequences, kv_heads]`` on the CPU, elastic layers only: 1 = sparse.
    modes
        int8, same shape: the :class:`HeadMode` each head ran.
    msr, esr, esr_last_query
        float64 ``[sequences]`` over the elastic layers: Ω_MSR (Eq. 4, of the decisions) and Ω_ESR
        (Eq. 5, of the modes that ran) in both definitions.
    queries, keys
        int64 ``[sequences]``: lengths.
    seconds
        Wall time of the base model's forward, the device's work included.
    backend
        The name of what ran the attention, never ``"auto"``; several if the layers differ.
    backend_reason
        Why ``"auto"`` took it; empty if it was named.
    local_layers
        Layers that the model keeps inside a window of its own; in none of the ratios.
    """

    decided: bool
    backend: str
    backend_reason: str
    local_layers: int
    queries: Tensor
    keys: Tensor
    decisions: Tensor
    modes: Tensor
    msr: Tensor
    esr: Tensor
    esr_last_query: Tensor
    seconds: float


@dataclass(eq=False)
class _UnderWay:
    """What a trace has seen of a pass that is not over."""

    segments: Segments
    decided: bool
    local_layers: int
    layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    choices: dict[tuple[str, str], None] = field(default_factory=dict)  # most layers say the same


@dataclass(eq=False)
class Trace:
    """What :func:`record` yields: every pass, and shortcuts to the latest one that read a prompt.

    ``decisions``, ``msr``, ``esr`` and ``prefill_seconds`` are those of :attr:`prefill`.
    """

    passes: list[PassRecord] = field(default_factory=list)
    _under_way: dict[object, _UnderWay] = field(default_factory=dict)
    _before: frozenset[threading.Thread] = frozenset()

    @property
    def prefill(self) -> PassRecord:
        """The latest pass that decided; if none did, the first, whose decisions are older.

        Raises
        ------
        ValueError
            If there was no pass.
        """
        for one in reversed(self.passes):
            if one.decided:
                return one
        if not self.passes:
            raise ValueError(
                "the trace holds no pass: run an elastic model inside `with elasticore.record()`."
            )
        return self.passes[0]

    @property
    def decisions(self) -> Tensor:
        """int8 ``[layers, sequences, kv_heads]``: 1 = sparse."""
        return self.prefill.decisions

    @property
    def msr(self) -> Tensor:
        """Ω_MSR, float64 ``[sequences]``."""
        return self.prefill.msr

    @property
    def esr(self) -> Tensor:
        """Ω_ESR (causal definition), float64 ``[sequences]``."""
        return self.prefill.esr

    @property
    def prefill_seconds(self) -> float:
        """Seconds of that pass."""
        return self.prefill.seconds

    def add(
        self,
        key: object,
        layer: int,
        *,
        plan: HeadPlan,
        segments: Segments,
        selection: BlockLists | None,
        decisions: Tensor,
        decided: bool,
        choice: tuple[str, str],
        local_layers: int,
    ) -> None:
        """Note one layer of the pass ``key``, which ran on the backend ``choice``."""
        if key not in self._under_way:
            self._under_way[key] = _UnderWay(segments, decided, local_layers)
        one = self._under_way[key]
        one.choices[choice] = None
        one.layers[layer] = {
            "decisions": decisions.detach().cpu(),
            "modes": plan.modes.cpu(),
            "esr": plan.esr(segments, "causal", selection).cpu(),
            "esr_last_query": plan.esr(segments, "last_query", selection).cpu(),
        }

    def finish(self, key: object, seconds: float) -> None:
        """The pass ``key`` is over."""
        one = self._under_way.pop(key, None)
        if one is None:
            return
        names, reasons = (list(dict.fromkeys(said)) for said in zip(*one.choices, strict=True))
        layers = [one.layers[index] for index in sorted(one.layers)]
        stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        self.passes.append(
            PassRecord(
                decided=one.decided,
                backend=", ".join(names),
                backend_reason="; ".join(filter(None, reasons)),
                local_layers=one.local_layers,
                queries=one.segments.query_length.cpu(),
                keys=one.segments.key_length.cpu(),
                decisions=stacked["decisions"],
                modes=stacked["modes"],
                msr=stacked["decisions"].double().mean((0, 2)),
                esr=stacked["esr"].mean((0, 2)),
                esr_last_query=stacked["esr_last_query"].mean((0, 2)),
                seconds=seconds,
            )
        )


@contextmanager
def record() -> Iterator[Trace]:
    """Record every pass of every elastic model that runs inside the ``with`` block.

    That is in the current context, and in threads that are started while the block is open and
    record nothing of their own: ``Thread(target=model.generate)`` is recorded, another request's
    thread is not.

    Recording reads decisions back to the host, waits for the device around each pass, and runs
    the selector of selected heads once more: do not time anything else under it.

    Yields
    ------
    Trace
        Fills up pass by pass.

    Examples
    --------
    >>> import elasticore
    >>> with elasticore.record() as trace:
    ...     pass  # model.generate(...)
    >>> trace.passes
    []
    """
    trace = Trace(_before=frozenset(threading.enumerate()))
    token = _traces.set((*_traces.get(), trace))
    _open.append(trace)
    try:
        yield trace
    finally:
        _open.remove(trace)
        trace._before = frozenset()
        _traces.reset(token)


def anyone_records() -> bool:
    """Whether any :func:`record` block is open, in whatever thread."""
    return len(_open) > 0


def active_traces() -> tuple[Trace, ...]:
    """The traces that see a pass of this thread."""
    own = _traces.get()
    if own or not _open:
        return own
    thread = threading.current_thread()
    return tuple(trace for trace in tuple(_open) if thread not in trace._before)
