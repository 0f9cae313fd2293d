"""Attention with gradients: both branches forward where a gate asks for it, one of them backward.

With the gate ``z``, exactly 0 or 1, the output is ``(1 - z) O_retrieval + z O_sparse``, so

- ``dz = sum(dO * (O_sparse - O_retrieval))`` over a KV head's rows, and
- q, k and v have the gradients of the chosen branch: the other one never goes backward.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from elasticore.backends.triton import kernels
from elasticore.backends.triton.arguments import listing, places
from elasticore.backends.triton.checkpointing import runs_again
from elasticore.backends.triton.gate import gate_gradient, row_sums
from elasticore.backends.triton.selectors import select
from elasticore.errors import ElasticoreError, UnsupportedRequest
from elasticore.layout import Segments, SequenceLayout
from elasticore.patterns import BlockLists, HeadMode
from elasticore.plan import HeadPlan

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout,
    segments: Segments | None,
    scale: float,
) -> Tensor:
    """Differentiable attention of every head in its mode.

    Parameters
    ----------
    q, k, v, plan, layout, scale
        See :meth:`elasticore.HybridHeadAttention.attend`.
    segments
        Those of ``layout``; None if it is dense.

    Returns
    -------
    Tensor
        ``[B, Hq, Tq, D]`` in q's dtype, with gradients of q, k, v and ``plan.gate``.
    """
    gate = plan.gate if plan.gate is not None and plan.gate.requires_grad else None
    lists = None
    with torch.no_grad():
        if HeadMode.SELECTED in plan.lanes:
            # With a gate both branches run, so every head needs its blocks, whatever it says.
            lists = select(q, k, plan, layout, scale, every=gate is not None)
    sink, local = plan.streaming.blocks(plan.block_size)
    call = _Call(plan.retrieval.lane, plan.sparse.lane, scale, sink, local, plan.block_size)
    out: Tensor = _Attention.apply(q, k, v, gate, plan.modes, segments, lists, call)
    return out


class _Call(NamedTuple):
    """What a call says beside its tensors."""

    retrieval: HeadMode
    sparse: HeadMode
    scale: float
    sink: int
    local: int
    block_size: int

    @property
    def numbers(self) -> dict[str, Any]:
        """What every kernel is given by name."""
        names = ("scale", "sink", "local", "block_size")
        return {name: getattr(self, name) for name in names}

    @property
    def nested(self) -> bool:
        """Whether the sparse mode's keys are some of the retrieval mode's."""
        return self.retrieval is HeadMode.FULL and self.sparse is not HeadMode.FULL

    def swapped(self, modes: Tensor) -> Tensor:
        """The modes that were not chosen."""
        retrieval, sparse = int(self.retrieval), int(self.sparse)
        return torch.where(modes == retrieval, sparse, retrieval).to(torch.int8)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor | None,
        modes: Tensor,
        segments: Segments | None,
        lists: BlockLists | None,
        call: _Call,
    ) -> Tensor:
        choice = kernels.choose_training(q, k, v, scale=call.scale, block_size=call.block_size)
        # Whatever is checkpointed has its backward after a second forward, with the same bits.
        both = gate is not None and not runs_again()
        other: Tensor | None = None
        if gate is not None and call.nested:
            out, other, lse = choice.snapshot(
                q, k, v, modes, segments, lists, sparse=call.sparse, both=both, **call.numbers
            )
        else:
            out, lse = kernels.attention(q, k, v, modes, segments, lists, **call.numbers)
            if both:
                swapped = call.swapped(modes)
                other, _ = kernels.attention(q, k, v, swapped, segments, lists, **call.numbers)
        if gate is not None and other is None:
            other = out.new_empty(()).expand_as(out)  # as the second forward's, but without memory
        # All of it through here, also what wants no gradient, so that checkpointing drops it.
        ctx.save_for_backward(q, k, v, modes, out, other, lse, *listing(lists), *places(segments))
        ctx.call, ctx.choice = call, choice
        ctx.gate_dtype = None if gate is None else gate.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise UnsupportedRequest(
                "backend 'triton' has first derivatives only, and create_graph=True asks for more; "
                "leave create_graph out."
            )
        (grad,) = grads
        q, k, v, modes, out, other, lse, indices, counts, *where = ctx.saved_tensors
        if other is not None and other.stride(3) == 0:
            raise ElasticoreError(
                "gradient checkpointing did not run this attention again before its backward, as "
                f"PyTorch {torch.__version__} should have; train without checkpointing, or with "
                "backend='serial'."
            )
        segments = None if where[0] is None else Segments(*where)
        lists = None if indices is None else BlockLists(indices, counts)
        call, choice = ctx.call, ctx.choice
        if not choice.reads(grad):
            grad = grad.clone(memory_format=torch.contiguous_format)
        delta, difference = row_sums(
            out,
            other,
            grad,
            modes,
            segments,
            keys=k.shape[2],
            sparse=call.sparse,
            block_size=call.block_size,
        )
        dq = dk = dv = dgate = None
        if difference is not None:
            sequences, kv_heads = modes.shape
            sums = gate_gradient(difference, segments, sequences=sequences, kv_heads=kv_heads)
            dgate = sums.to(ctx.gate_dtype)
        of = (q, k, v, grad, lse, delta, modes, segments, lists)
        if ctx.needs_input_grad[0]:
            dq = choice.query_gradient(*of, **call.numbers)
        if any(ctx.needs_input_grad[1:3]):
            wanted = ctx.needs_input_grad[1:3]
            dk, dv = choice.key_value_gradients(*of, wanted=wanted, **call.numbers)
        return dq, dk, dv, dgate, None, None, None, None
