"""How a cache remembers the routing of the prompts that it holds."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = ["recall", "remember"]

_DECISIONS = "_elasticore_decisions"
"""Attribute of a cache: {layer: int8 [sequences, kv_heads]}."""


def remember(cache: Any, layer: int, decisions: Tensor) -> None:
    """Keep the decisions of one layer with the cache, through copies and reordering of its rows."""
    if not hasattr(cache, _DECISIONS):
        setattr(cache, _DECISIONS, {})
        # Rows of a cache move with their sequences, so their decisions have to move as well. The
        # methods are wrapped on this one object; as bound methods they follow a deep copy of it.
        for name, move in _MOVES.items():
            if hasattr(cache, name):
                setattr(cache, name, types.MethodType(_moving(name, move), cache))
    getattr(cache, _DECISIONS)[layer] = decisions


def recall(cache: Any, layer: int) -> Tensor | None:
    """The decisions of one layer; None if this cache was never filled by an elastic model."""
    return getattr(cache, _DECISIONS, {}).get(layer)


def _select(decisions: Tensor, rows: Tensor) -> Tensor:
    return decisions.index_select(0, torch.as_tensor(rows, device=decisions.device).long())


def _repeat(decisions: Tensor, times: int) -> Tensor:
    return decisions.repeat_interleave(times, 0)


_MOVES: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "reorder_cache": _select,
    "batch_select_indices": _select,
    "batch_repeat_interleave": _repeat,
}


def _moving(name: str, move: Callable[[Tensor, Any], Tensor]) -> Callable[[Any, Any], Any]:
    def moved(cache: Any, rows: Any) -> Any:
        result = getattr(type(cache), name)(cache, rows)
        decisions = getattr(cache, _DECISIONS)
        for layer in decisions:
            decisions[layer] = move(decisions[layer], rows)
        return result

    return moved
