"""Decisions that were made before, given to the same samples again or to others.

What routing per input is worth shows when each input gets another one's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

import elasticore as ec
from elasticore.eval.tasks import Sample
from elasticore.eval.teacher_forced import scoring_order
from elasticore.layout import Segments
from elasticore.router import Routing
from elasticore.router.policies import LayerShape

__all__ = ["Replayed", "between_tasks", "packed", "replayed", "unpacked", "within_tasks"]


def packed(decisions: Tensor) -> list[str]:
    """Decisions ``[samples, layers, kv_heads]`` as one hexadecimal number a sample."""
    bits = np.packbits(decisions.flatten(1).numpy().astype(bool), axis=1)
    return [row.tobytes().hex() for row in bits]


def unpacked(rows: Sequence[str], shape: tuple[int, int]) -> Tensor:
    """What :func:`packed` made of int8 ``[samples, *shape]``; ``shape`` is (layers, kv_heads)."""
    bits = np.stack([np.frombuffer(bytes.fromhex(row), np.uint8) for row in rows])
    flat = np.unpackbits(bits, axis=1, count=shape[0] * shape[1])
    return torch.from_numpy(flat.astype(np.int8)).unflatten(1, shape)


class _Queue(nn.Module):
    """Takes its decisions from a list, one for each sequence that asks."""

    boundary: ClassVar[int] = 0

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        self.rows, self.next = rows, 0

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`."""
        first, self.next = self.next, self.next + segments.row.numel()
        if self.next > len(self.rows):
            raise ValueError(f"decisions are for {len(self.rows)} samples; there are more.")
        return Routing(self.rows[first : self.next].to(keys.device))


@dataclass(frozen=True, eq=False)
class _Replay(ec.Policy):
    queue: Tensor

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        return [_Queue(self.queue[:, index].contiguous()) for index in range(len(layers))]

    def settings(self) -> dict[str, Any]:
        return {"samples": len(self.queue)}


@dataclass(frozen=True)
class Replayed:
    """Samples in a known order get the decisions of a list.

    Attributes
    ----------
    name
        As it is shown, and of its file.
    queue
        int8 ``[samples, layers, kv_heads]``, in the order in which they are scored.
    streams
        What sparse heads read: a way with a streaming pattern.
    """

    name: str
    queue: Tensor = field(repr=False)
    streams: ec.Elastic = field(repr=False)

    def on(self, model: Any) -> AbstractContextManager[Any]:
        """See :class:`~recipes.study.scores.Way`."""
        return replace(self.streams, policy=_Replay(self.queue)).on(model)


def replayed(
    name: str,
    samples: Mapping[str, Sequence[Sample]],
    decisions: Mapping[str, Tensor],
    streams: ec.Elastic,
) -> Replayed:
    """The way in which every sample of each task gets its row of ``decisions``.

    Parameters
    ----------
    name, streams
        See :class:`Replayed`.
    samples
        By task, in the order in which tasks are scored.
    decisions
        By task, int8 ``[samples, layers, kv_heads]``.
    """
    rows = [decisions[task][scoring_order(held)] for task, held in samples.items()]
    return Replayed(name, torch.cat(rows), streams)


def within_tasks(decisions: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every sample gets the decisions of another sample of its own task."""
    rng = np.random.default_rng(seed)
    return {task: rows[_moved(rng, len(rows))] for task, rows in decisions.items()}


def between_tasks(decisions: Mapping[str, Tensor], seed: int) -> dict[str, Tensor]:
    """Every sample gets the decisions of a sample of another task, all tasks in equal shares.

    Each sample's decisions are used once, so that the mean Ω_MSR over the set stays as it is, if
    tasks have equally many samples.
    """
    rng = np.random.default_rng(seed)
    names = list(decisions)
    mixed = {task: decisions[task][_moved(rng, len(decisions[task]))] for task in names}
    found: dict[str, Tensor] = {}
    for place, task in enumerate(names):
        others = names[place + 1 :] + names[:place]
        rows = []
        for index in range(len(decisions[task])):
            source = mixed[others[index % len(others)]]
            rows.append(source[index % len(source)])
        found[task] = torch.stack(rows)
    return found


def _moved(rng: np.random.Generator, count: int) -> Tensor:
    """An order in which nobody stays in place: a random cycle."""
    cycle = rng.permutation(count)
    moved = np.empty(count, np.int64)
    moved[cycle] = np.roll(cycle, 1)
    return torch.from_numpy(moved)
