"""Choosing the blocks of SELECTED heads, for backends without a selector of their own."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticore.backends.triton import TritonAttention
from elasticore.layout import SequenceLayout
from elasticore.patterns import BlockLists, HeadMode
from elasticore.plan import HeadPlan

__all__ = ["choose_blocks"]


@torch.no_grad()
def choose_blocks(
    q: Tensor, k: Tensor, plan: HeadPlan, layout: SequenceLayout, scale: float, *, every: bool
) -> BlockLists | None:
    """The key blocks of the SELECTED heads; None if the plan can have none.

    On a GPU by a kernel of the Triton backend where it has one, otherwise as the selector defines
    itself.

    Parameters
    ----------
    q, k, plan, layout, scale
        See :meth:`elasticore.HybridHeadAttention.attend`.
    every
        Whether the lists of heads in other modes are wanted too; otherwise they may be empty.
    """
    if HeadMode.SELECTED not in plan.lanes:
        return None
    if q.is_cuda and TritonAttention.available():
        from elasticore.backends.triton.selectors import select

        return select(q, k, plan, layout, scale, every=every)
    assert plan.selector is not None
    segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
    return plan.selector.select(q, k, segments, block_size=plan.block_size, scale=scale)
