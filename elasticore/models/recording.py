"""``elasticore.record()``: what was decided, how sparse it was and how long it took."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from elasticore.attention import AttentionRequest
from elasticore.backends.registry import choose
from elasticore.layout import Segments
from elasticore.patterns import BlockLists
from elasticore.plan import HeadPlan

if TYPE_CHECKING:
    from elasticore.models.state import LayerState

__all__ = ["Pass", "Trace", "active_traces", "record"]

_traces: ContextVar[tuple[Trace, ...]] = ContextVar("elasticore_traces", default=())


@dataclass(eq=False)
class Pass:
    """One forward pass of an elastic model.

    Attributes
    ----------
    prefill
        Whether the routers decided in this pass; else it continued on a cache.
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

    prefill: bool
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
class Trace:
    """What :func:`record` yields: every pass, and shortcuts to the latest prefill."""

    passes: list[Pass] = field(default_factory=list)
    _layers: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    # What ran them and why; a dict, as most layers say the same.
    _choices: dict[tuple[str, str], None] = field(default_factory=dict)
    _about: tuple[bool, int, Segments] | None = None

    @property
    def prefill(self) -> Pass:
        """The latest prefill; raises ``ValueError`` if there was none."""
        for one in reversed(self.passes):
            if one.prefill:
                return one
        raise ValueError(
            "the trace holds no prefill: run an elastic model inside `with elasticore.record()`."
        )

    @property
    def decisions(self) -> Tensor:
        """int8 ``[layers, sequences, kv_heads]`` of the latest prefill: 1 = sparse."""
        return self.prefill.decisions

    @property
    def msr(self) -> Tensor:
        """Ω_MSR of the latest prefill, float64 ``[sequences]``."""
        return self.prefill.msr

    @property
    def esr(self) -> Tensor:
        """Ω_ESR of the latest prefill (causal definition), float64 ``[sequences]``."""
        return self.prefill.esr

    @property
    def prefill_seconds(self) -> float:
        """Seconds of the latest prefill."""
        return self.prefill.seconds

    def add(
        self,
        layer: LayerState,
        plan: HeadPlan,
        segments: Segments,
        selection: BlockLists | None,
        decisions: Tensor,
        prefill: bool,
        request: AttentionRequest,
    ) -> None:
        """Note one layer of the pass under way; a recomputed layer overwrites itself."""
        if self._about is None:
            self._about = (prefill, layer.model.local_layers, segments)
        choice = choose(None, request)
        self._choices[choice.name, choice.reason] = None
        self._layers[layer.index] = {
            "decisions": decisions.detach().cpu(),
            "modes": plan.modes.cpu(),
            "esr": plan.esr(segments, "causal", selection).cpu(),
            "esr_last_query": plan.esr(segments, "last_query", selection).cpu(),
        }

    def start(self) -> None:
        """A pass begins; forget what one that failed midway has left."""
        self._layers, self._choices, self._about = {}, {}, None

    def finish(self, seconds: float) -> None:
        """The pass under way is over."""
        if self._about is None:
            return
        prefill, local_layers, segments = self._about
        names, reasons = (list(dict.fromkeys(said)) for said in zip(*self._choices, strict=True))
        layers = [self._layers[index] for index in sorted(self._layers)]
        stacked = {name: torch.stack([layer[name] for layer in layers]) for name in layers[0]}
        self.passes.append(
            Pass(
                prefill=prefill,
                backend=", ".join(names),
                backend_reason="; ".join(filter(None, reasons)),
                local_layers=local_layers,
                queries=segments.query_length.cpu(),
                keys=segments.key_length.cpu(),
                decisions=stacked["decisions"],
                modes=stacked["modes"],
                msr=stacked["decisions"].double().mean((0, 2)),
                esr=stacked["esr"].mean((0, 2)),
                esr_last_query=stacked["esr_last_query"].mean((0, 2)),
                seconds=seconds,
            )
        )
        self.start()


@contextmanager
def record() -> Iterator[Trace]:
    """Record every pass of every elastic model that runs inside the ``with`` block.

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
    trace = Trace()
    token = _traces.set((*_traces.get(), trace))
    try:
        yield trace
    finally:
        _traces.reset(token)


def active_traces() -> tuple[Trace, ...]:
    """The traces of the ``record()`` blocks around the current code."""
    return _traces.get()
