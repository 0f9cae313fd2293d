"""The attention interface that every backend implements."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from elasticore.errors import UnsupportedRequest
from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.patterns import HeadMode
from elasticore.plan import HeadPlan

__all__ = [
    "AttentionRequest",
    "HybridHeadAttention",
    "Verdict",
    "require",
    "straight_through",
    "wants_gradients",
]


class Verdict(NamedTuple):
    """Whether something can be done and, if not, why; true or false as a condition."""

    ok: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.ok


@dataclass(frozen=True)
class AttentionRequest:
    """What one call asks of a backend, without its data; nothing in it is read from the device."""

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    query_heads: int
    kv_heads: int
    queries: int
    keys: int
    sequences: int
    layout: Literal["dense", "padded", "packed"]
    lanes: frozenset[HeadMode]
    block_size: int
    gradients: bool

    @classmethod
    def of(
        cls, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, layout: SequenceLayout
    ) -> AttentionRequest:
        """The request that a call makes."""
        batch, heads, queries, dim = q.shape
        _, kv_heads, keys, _ = k.shape
        return cls(
            q.device,
            q.dtype,
            dim,
            heads,
            kv_heads,
            queries,
            keys,
            layout.sequences(batch),
            layout.kind,
            plan.lanes,
            plan.block_size,
            wants_gradients(q, k, v, plan),
        )

    @classmethod
    def of_pages(
        cls, q: Tensor, pages: Pages, plan: HeadPlan, layout: SequenceLayout
    ) -> AttentionRequest:
        """The request that a call over pages makes; it has no gradients."""
        batch, heads, queries, dim = q.shape
        return cls(
            q.device,
            q.dtype,
            dim,
            heads,
            pages.keys.shape[1],
            queries,
            pages.capacity,
            layout.sequences(batch),
            layout.kind,
            plan.lanes,
            plan.block_size,
            False,
        )


def wants_gradients(q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan) -> bool:
    """Whether a call is to be differentiable in any of its arguments."""
    tensors = (q, k, v) if plan.gate is None else (q, k, v, plan.gate)
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class HybridHeadAttention(ABC):
    """An engine that runs attention heads of different modes in one call.

    Subclass it, implement the three methods, register it with
    :func:`elasticore.register_backend`, and prove it with :mod:`elasticore.testing`.
    """

    name: ClassVar[str]
    lanes: ClassVar[frozenset[HeadMode]] = frozenset(HeadMode)
    devices: ClassVar[tuple[str, ...]] = ("cpu", "cuda")

    @classmethod
    @abstractmethod
    def available(cls) -> Verdict:
        """Whether the engine can run on this machine, decided without importing it if missing."""

    @abstractmethod
    def supports(self, request: AttentionRequest) -> Verdict:
        """Whether this backend can do ``request``: dtype, sizes, device, lanes, gradients.

        The same answer to the same request every time, without touching a device: ``"auto"``
        remembers it, and the documentation asks about devices that are not there.
        """

    def cost(self, request: AttentionRequest) -> float | None:
        """Milliseconds that ``request`` takes here, which it supports; None if nobody knows.

        ``"auto"`` compares it with other backends' estimates. Measure it on the device that the
        request names, as the mean over several shares of sparse heads. None, which is what this
        returns, leaves the backend at its place in the default order.
        """
        return None

    @abstractmethod
    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        *,
        layout: SequenceLayout,
        scale: float,
    ) -> Tensor:
        """Causal attention of every head in the mode that ``plan`` gives it.

        :func:`elasticore.hybrid_head_attention` has checked the call and filled in its defaults.

        Parameters
        ----------
        q
            ``[B, Hq, Tq, D]``, any strides with a unit last one. The queries are the last
            positions of their sequence; decoding is ``Tq = 1``.
        k, v
            ``[B, Hkv, Tk, D]``, ``Hq`` a multiple of ``Hkv``; never repeated to ``Hq`` heads.
        plan
            ``plan.modes``, ``[sequences, Hkv]``, and what each lane reads.
        layout
            Where the sequences lie.
        scale
            Factor on q·k.

        Returns
        -------
        Tensor
            ``[B, Hq, Tq, D]`` in q's dtype; zero at queries that are padding. With
            ``plan.gate``, its gradient is that of
            ``(1 - gate) * O_retrieval + gate * O_sparse``.
        """

    def supports_pages(self, request: AttentionRequest) -> Verdict:
        """Whether this backend can do ``request`` on keys and values in pages.

        ``request.keys`` is what pages have room for, and its ``layout`` that of the queries.
        """
        return Verdict(False, "it reads no pages.")

    def attend_pages(
        self, q: Tensor, pages: Pages, plan: HeadPlan, *, layout: SequenceLayout, scale: float
    ) -> Tensor:
        """As :meth:`attend`, over keys and values in pages.

        Parameters
        ----------
        q
            ``[B, Hq, Tq, D]``: the last positions of each sequence.
        pages
            Where keys and values are, those of the queries included.
        plan, scale
            As for :meth:`attend`; lanes are FULL and STREAMING.
        layout
            Of the queries: dense, or packed.

        Returns
        -------
        Tensor
            ``[B, Hq, Tq, D]`` in q's dtype, without a gradient.
        """
        raise NotImplementedError(f"{type(self).__name__} has supports_pages, but no attend_pages.")


def require(verdict: Verdict, name: str) -> None:
    """Raise ``UnsupportedRequest`` with the reason unless ``verdict`` is ok."""
    if not verdict.ok:
        raise UnsupportedRequest(f"backend {name!r} cannot do this call: {verdict.reason}")


class _StraightThrough(torch.autograd.Function):
    """The chosen branch's output, with the gate's gradient from both branches."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, chosen: Tensor, other: Tensor, member: Tensor) -> Tensor:
        ctx.save_for_backward(gate, chosen, other, member)
        return chosen.view_as(chosen)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        gate, chosen, other, member = ctx.saved_tensors
        (grad,) = grads
        gate_grad = None
        if ctx.needs_input_grad[0]:
            exact = torch.promote_types(chosen.dtype, torch.float32)

            def head(h: int) -> Tensor:
                difference = other[:, h].to(exact) - chosen[:, h].to(exact)
                return (grad[:, h].to(exact) * difference).sum(-1)

            # [B, Hq, Tq], one head's D at a time: no copy of the outputs in float32 is kept.
            dot = torch.stack([head(h) for h in range(grad.shape[1])], 1)
            dot = dot.unflatten(1, (gate.shape[1], -1)).sum(2)  # [B, Hkv, Tq]
            # Padding is cut out, not multiplied by zero: it may hold anything, NaN too.
            if dot.shape[0] == member.shape[0]:
                per_sequence = torch.where(member[:, None], dot, 0).sum(-1)
            else:  # packed: one row holds every sequence
                per_sequence = member.to(exact) @ torch.where(member.any(0), dot[0], 0).T
            # other - chosen is O_sparse - O_retrieval where the gate chose retrieval.
            gate_grad = (per_sequence * (1 - 2 * gate)).to(gate.dtype)
        return gate_grad, grad, None, None


def straight_through(
    gate: Tensor, chosen: Tensor, other: Tensor, layout: SequenceLayout, keys: int
) -> Tensor:
    """``chosen``, with the gradient of ``(1 - gate) * O_retrieval + gate * O_sparse`` for the gate.

    What a backend uses that has no kernel of its own for it: run the plan, run ``plan.swapped()``
    without gradients, and join the two outputs here. The gradient of q, k and v flows through
    ``chosen`` only, which is exact as the gate is 0 or 1.

    Parameters
    ----------
    gate
        ``[sequences, kv_heads]``, exactly 0 or 1.
    chosen, other
        ``[B, Hq, Tq, D]``: the outputs of the plan and of ``plan.swapped()``.
    layout
        Where the sequences lie.
    keys
        Positions of the key axis (``Tk``).
    """
    batch, _, queries, _ = chosen.shape
    segments = layout.segments(batch, queries, keys, chosen.device)
    # Which queries belong to which sequence, [sequences, Tq]; padding belongs to none.
    step = torch.arange(queries, device=chosen.device)
    start, length = segments.query_start[:, None], segments.query_length[:, None]
    member = (step >= start) & (step < start + length)
    return _StraightThrough.apply(gate, chosen, other, member)
