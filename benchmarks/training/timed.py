"""Seconds that a training step spends in attention: forward, recompute and backward."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

import elasticore as ec
from elasticore.attention import AttentionRequest, HybridHeadAttention, Verdict

__all__ = ["PHASES", "Stopwatch", "Timed"]

PHASES = "forward", "recompute", "backward"


class Stopwatch:
    """Sums what passes on the device between pairs of marks, by phase."""

    def __init__(self, device: torch.device) -> None:
        self.gpu = device.type == "cuda"
        self.spans: list[tuple[str, Any, Any]] = []

    def mark(self) -> Any:
        """This moment, on the device."""
        if not self.gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> dict[str, float]:
        """Seconds of each phase since the last call; the device must be idle."""
        sums = dict.fromkeys(PHASES, 0.0)
        for phase, begin, end in self.spans:
            sums[phase] += begin.elapsed_time(end) / 1e3 if self.gpu else end - begin
        self.spans.clear()
        return sums


class Timed(HybridHeadAttention):
    """Another backend, with marks before and after it in the forward and in the backward."""

    name = "timed"
    inner: ClassVar[str]
    stopwatch: ClassVar[Stopwatch]

    @classmethod
    def available(cls) -> Verdict:
        """Always."""
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        """What the other backend supports, which it says itself."""
        return Verdict(True)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: ec.HeadPlan,
        *,
        layout: ec.SequenceLayout,
        scale: float,
    ) -> Tensor:
        """See :class:`elasticore.HybridHeadAttention`."""
        stopwatch, phase = self.stopwatch, "forward"
        if torch._C._current_graph_task_id() != -1:  # inside a backward pass
            phase = "recompute"
        begin = stopwatch.mark()
        backward: list[Any] = []
        inputs = {"q": q, "k": k, "v": v, "gate": plan.gate}
        learning = [n for n, t in inputs.items() if t is not None and t.requires_grad]

        def finish() -> None:
            stopwatch.spans.append(("backward", backward.pop(), stopwatch.mark()))

        if learning:
            marked = OnBackward.apply(finish, *(inputs[name] for name in learning))
            inputs |= dict(zip(learning, marked, strict=True))
        out = ec.hybrid_head_attention(
            inputs["q"],
            inputs["k"],
            inputs["v"],
            dataclasses.replace(plan, gate=inputs["gate"], check=False),
            layout=layout,
            scale=scale,
            backend=self.inner,
        )
        if out.requires_grad:
            (out,) = OnBackward.apply(lambda: backward.append(stopwatch.mark()), out)
        stopwatch.spans.append((phase, begin, stopwatch.mark()))
        return out


class OnBackward(torch.autograd.Function):
    """Passes tensors on, and calls a function when their gradients are there."""

    @staticmethod
    def forward(ctx: Any, call: Callable[[], None], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Views of the tensors."""
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients as they come."""
        ctx.call()
        return None, *grads
