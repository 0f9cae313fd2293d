"""How often each head is sparse, per task and over all tasks (Figures 6 and 11)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from elasticore.eval.analysis.rows import Row

__all__ = ["ALL_TASKS", "frequency_rows", "routing_frequency"]

ALL_TASKS = "all tasks"


def routing_frequency(
    decisions: Iterable[tuple[str, Tensor | Sequence[str]]],
) -> dict[str, Tensor]:
    """Share of a task's prompts for which each head was sparse.

    Parameters
    ----------
    decisions
        For every prompt its task and what was decided: ``[layers, kv_heads]`` with 1 = sparse, as
        ``trace.decisions[:, i]``, or a string of 0 and 1 for each layer, as records keep it.

    Returns
    -------
    dict
        Per task, float64 ``[layers, kv_heads]``; behind them, where there are several tasks, their
        mean under `ALL_TASKS`, in which every task weighs the same.

    Raises
    ------
    ValueError
        If there is no prompt, or shapes differ.
    """
    found: dict[str, list[Tensor]] = {}
    for task, decided in decisions:
        if not isinstance(decided, Tensor):
            decided = torch.tensor([[int(head) for head in layer] for layer in decided])
        found.setdefault(task, []).append(decided.double().cpu())
    shapes = {tuple(one.shape) for own in found.values() for one in own}
    if len(shapes) != 1:
        raise ValueError(
            "decisions must hold prompts of one model, all [layers, kv_heads], got shapes "
            f"{sorted(shapes)}."
        )
    shares = {task: torch.stack(own).mean(0) for task, own in found.items()}
    if len(shares) > 1:
        shares[ALL_TASKS] = torch.stack(list(shares.values())).mean(0)
    return shares


def frequency_rows(frequency: Mapping[str, Tensor], layer_offset: int = 0) -> list[Row]:
    """One row per task and head: task, layer, kv_head, sparse (from 0 to 1)."""
    return [
        {"task": task, "layer": layer + layer_offset, "kv_head": head, "sparse": share}
        for task, shares in frequency.items()
        for layer, heads in enumerate(shares.tolist())
        for head, share in enumerate(heads)
    ]
