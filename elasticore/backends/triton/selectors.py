"""Which selectors have a kernel; the others run as they define themselves."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticore.backends.triton import xattention
from elasticore.layout import SequenceLayout
from elasticore.patterns import BlockLists, HeadMode, XAttention
from elasticore.plan import HeadPlan

__all__ = ["select"]


def select(
    q: Tensor,
    k: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout,
    scale: float,
    *,
    every: bool = False,
) -> BlockLists:
    """The block lists of the SELECTED heads; unless ``every``, those of other heads may be empty.

    A selector without a kernel runs its own :meth:`~elasticore.BlockSelector.select`, for all
    heads.
    """
    selector = plan.selector
    assert selector is not None
    segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
    if type(selector) is XAttention and xattention.supports(selector):
        return xattention.select(
            selector,
            q,
            k,
            torch.full_like(plan.modes, int(HeadMode.SELECTED)) if every else plan.modes,
            segments,
            block_size=plan.block_size,
            scale=scale,
            max_queries=q.shape[2],
            max_keys=k.shape[2],
        )
    return selector.select(q, k, segments, block_size=plan.block_size, scale=scale)
