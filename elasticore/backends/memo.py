"""What a backend prepares for a plan, kept as long as it holds."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Generic, TypeVar
from weakref import WeakKeyDictionary

from elasticore.layout import SequenceLayout
from elasticore.memo import Memo
from elasticore.plan import HeadPlan

__all__ = ["PlanMemo"]

Prepared = TypeVar("Prepared")


class PlanMemo(Generic[Prepared]):
    """The last thing prepared for each plan, dropped with the plan.

    It holds while the values of the plan's decisions and of the layout are those it was made from;
    :class:`~elasticore.memo.Memo` says where nothing is kept.
    """

    def __init__(self) -> None:
        self._memos: WeakKeyDictionary[HeadPlan, Memo[Prepared]] = WeakKeyDictionary()

    def get(
        self,
        plan: HeadPlan,
        layout: SequenceLayout,
        key: Hashable,
        prepare: Callable[[], Prepared],
    ) -> Prepared:
        """What ``prepare`` returns, or returned for the same plan, layout and ``key``."""
        memo = self._memos.setdefault(plan, Memo())
        tensors = (plan.decisions, *layout.tensors)
        return memo.get((key, layout.kind), tensors, plan.decisions.device, prepare)
