"""Calls of a selector, and its answer as plain lists."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor
from torch.nn.functional import pad

from elasticore import BlockSelector, SequenceLayout

Lists = list[list[list[int]]]  # per head, per row block: the key blocks
Pair = tuple[Tensor, Tensor]


def draw(
    seed: int, heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype, dim: int = 8
) -> Pair:
    """Random q ``[1, heads, queries, dim]`` and k, laid out as models hand them over."""
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, queries, heads, dim, generator=generator, dtype=torch.float64)
    k = 2 * torch.randn(1, keys, kv_heads, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


def lists(
    selector: BlockSelector,
    q: Tensor,
    k: Tensor,
    layout: SequenceLayout | None = None,
    *,
    block: int,
    scale: float = 1.0,
) -> list[Lists]:
    """Per sequence, per head, per row block: the key blocks chosen."""
    layout = layout or SequenceLayout.dense()
    segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
    chosen = selector.select(q, k, segments, block_size=block, scale=scale)
    assert chosen.counts.dtype == torch.int32
    indices, counts = chosen.indices.tolist(), chosen.counts.tolist()
    # A row block that is not there counts 0; every other one holds at least its diagonal.
    return [
        [
            [row[:count] for row, count in zip(rows, sizes, strict=True) if count]
            for rows, sizes in zip(*head, strict=True)
        ]
        for head in zip(indices, counts, strict=True)
    ]


def packed(pairs: list[Pair]) -> tuple[Tensor, Tensor, SequenceLayout]:
    """The sequences one after the other."""
    cumulative = [
        torch.tensor([0, *itertools.accumulate(pair[i].shape[2] for pair in pairs)])
        for i in range(2)
    ]
    q, k = (torch.cat([pair[i] for pair in pairs], 2) for i in range(2))
    return q, k, SequenceLayout.packed(*cumulative)


def padded(pairs: list[Pair], left: bool) -> tuple[Tensor, Tensor, SequenceLayout]:
    """Sequences with as many queries as keys, in rows of one length: padding is NaN."""
    lengths = torch.tensor([k.shape[2] for _, k in pairs])
    longest = int(lengths.max())
    missing = longest - lengths
    ends = (missing, missing * 0 + longest - 1) if left else (missing * 0, lengths - 1)
    q, k = (
        torch.cat(
            [
                pad(pair[i], (0, 0, gap, 0) if left else (0, 0, 0, gap), value=torch.nan)
                for pair, gap in zip(pairs, missing.tolist(), strict=True)
            ]
        )
        for i in range(2)
    )
    return q, k, SequenceLayout.padded(*ends)
