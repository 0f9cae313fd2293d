"""Attention to compressed keys, written out as slowly and plainly as possible."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from torch import Tensor

from elasticore.patterns.compressed import CompressedSelector
from tests.patterns.calls import Lists

Score = Callable[[dict[int, float], int], float]
"""From a query's weights of compressed keys, and a block, to the block's score."""


def slow_weights(
    selector: CompressedSelector, q: Tensor, k: Tensor, scale: float
) -> list[dict[int, float]]:
    """Per query of one head: the weight of every compressed key that lies behind it."""
    queries, keys = q.double().numpy(), k.double().numpy()
    weights = []
    for position, query in enumerate(queries, len(keys) - len(queries)):
        scores = {}
        for cell in range(len(keys)):
            first = cell * selector.stride
            if first + selector.kernel - 1 > position:
                break
            mean = keys[first : first + selector.kernel].mean(0)
            scores[cell] = float(query @ mean) * scale
        top = max(scores.values(), default=0.0)
        total = sum(math.exp(score - top) for score in scores.values())
        weights.append({cell: math.exp(score - top) / total for cell, score in scores.items()})
    return weights


def slow_lists(
    selector: CompressedSelector,
    q: Tensor,
    k: Tensor,
    block: int,
    scale: float,
    score: Score,
    *,
    count: int,
    dense: int = 0,
) -> Lists:
    """The lists of one sequence: q ``[Hq, Tq, D]``, k ``[Hkv, Tk, D]``."""
    past, group = k.shape[1] - q.shape[1], q.shape[0] // k.shape[0]
    heads: Lists = []
    for kv_head in range(k.shape[0]):
        members = [
            slow_weights(selector, q[kv_head * group + member], k[kv_head], scale)
            for member in range(group)
        ]
        weights = [  # of each query, for all heads of the group together
            {cell: sum(one[cell] for one in same) for cell in same[0]}
            for same in zip(*members, strict=True)
        ]
        rows = []
        for row in range(past // block, math.ceil(k.shape[1] / block)):
            first = row * block
            queries = range(max(first, past) - past, min(first + block, k.shape[1]) - past)
            own = first // selector.block
            forced = {
                b
                for b in range(own + 1)
                if b * selector.block < selector.sink
                or (own - b) * selector.block < selector.local
                or first < dense
            }
            total = {
                b: np.float32(sum(score(weights[query], b) for query in queries))
                for b in set(range(own + 1)) - forced
            }
            best = sorted(total, key=lambda b: (-total[b], b))[: max(count - len(forced), 0)]
            rows.append(
                [b for b in range(row + 1) if b * block // selector.block in forced | set(best)]
            )
        heads += [rows] * group
    return heads
