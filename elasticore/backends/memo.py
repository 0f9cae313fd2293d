"""What a backend prepares for a plan, kept as long as it holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from elasticore.layout import SequenceLayout
from elasticore.plan import HeadPlan

__all__ = ["PlanMemo"]

Prepared = TypeVar("Prepared")


class PlanMemo(Generic[Prepared]):
    """The last thing prepared for each plan, dropped with the plan.

    It holds while the values of the plan's modes and of the layout are those it was made from:
    PyTorch counts the writes to a tensor. For tensors made under ``torch.inference_mode`` it does
    not, and in a CUDA graph the preparation has to be part of the graph, so that a replay follows
    the modes. There nothing is kept.
    """

    def __init__(self) -> None:
        self._kept: WeakKeyDictionary[HeadPlan, tuple[Hashable, SequenceLayout, Prepared]] = (
            WeakKeyDictionary()
        )

    def get(
        self,
        plan: HeadPlan,
        layout: SequenceLayout,
        key: Hashable,
        prepare: Callable[[], Prepared],
    ) -> Prepared:
        """What ``prepare`` returns, or returned for the same plan, layout and ``key``."""
        tensors = [plan.modes, *_tensors(layout)]
        if any(tensor.is_inference() for tensor in tensors) or _capturing(plan.modes):
            return prepare()
        found = (key, *(tensor._version for tensor in tensors))
        kept = self._kept.get(plan)
        if kept and kept[0] == found and _same(kept[1], layout):
            return kept[2]
        prepared = prepare()
        self._kept[plan] = found, layout, prepared
        return prepared


def _same(one: SequenceLayout, other: SequenceLayout) -> bool:
    """Whether it is one layout; a dense one holds nothing, so that all of them are one."""
    return one is other or one.kind == other.kind == "dense"


def _tensors(layout: SequenceLayout) -> list[Tensor]:
    fields = (layout.first, layout.last, layout.query_offset, layout.cu_queries, layout.cu_keys)
    return [tensor for tensor in fields if tensor is not None]


def _capturing(tensor: Tensor) -> bool:
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
