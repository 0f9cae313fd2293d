"""What block selectors have in common: the rows of a call, its queries and keys, the best blocks.

Sizes come from shapes, never from values, so nothing here waits for the device. Scores are summed
in float64 and compared in float32: neither the batch nor a chunk's size tips a tie.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns.selector import BlockLists

__all__ = ["Queries", "Rows", "heaviest", "key_means", "lists_of", "query_tiles"]

TILE = 2**24
"""Scores held at a time, at least one row block's."""


class Rows(NamedTuple):
    """The row blocks of every sequence, as many as the longest one may have.

    Attributes
    ----------
    block
        int64 ``[sequences, rows]``: the absolute row block.
    exists
        bool ``[sequences, rows]``: whether the sequence has a query in it.
    """

    block: Tensor
    exists: Tensor

    @classmethod
    def of(cls, segments: Segments, queries: int, block_size: int) -> Rows:
        """The row blocks of a call with ``queries`` positions on its query axis."""
        first = (segments.key_length - segments.query_length)[:, None] // block_size
        # One more than the queries fill: they may begin inside a block.
        block = first + torch.arange(-(-queries // block_size) + 1, device=first.device)
        exists = block * block_size < segments.key_length[:, None]
        return cls(block, exists & (segments.query_length > 0)[:, None])


class Queries(NamedTuple):
    """The queries of a few row blocks: ``row`` is where the first of them is in ``Rows``."""

    row: int
    values: Tensor
    """``[sequences, Hkv, group, rows, block_size, D]``, zero where there is no query."""
    position: Tensor
    """int64 ``[sequences, rows, block_size]``."""
    present: Tensor
    """bool ``[sequences, rows, block_size]``."""


def query_tiles(
    q: Tensor, kv_heads: int, segments: Segments, rows: Rows, block_size: int, scores: int
) -> Iterator[Queries]:
    """The queries of all rows, a few row blocks at a time: each query has ``scores`` scores."""
    sequences, total = rows.block.shape
    step = max(1, TILE // (sequences * q.shape[1] * block_size * max(scores, 1)))
    past = (segments.key_length - segments.query_length)[:, None, None]
    inside = torch.arange(block_size, device=q.device)
    for row in range(0, total, step):
        position = rows.block[:, row : row + step, None] * block_size + inside
        query = position - past
        present = (query >= 0) & (query < segments.query_length[:, None, None])
        source = (query + segments.query_start[:, None, None]).clamp(0, q.shape[2] - 1)
        values = q[segments.row[:, None, None], :, source]  # [sequences, rows, block, Hq, D]
        values = torch.where(present[..., None, None], values, 0)
        values = values.unflatten(3, (kv_heads, -1)).permute(0, 3, 4, 1, 2, 5)
        yield Queries(row, values, position, present)


def key_means(k: Tensor, segments: Segments, width: int, stride: int) -> Tensor:
    """Means of ``width`` keys, one every ``stride`` tokens of each sequence's own count.

    Parameters
    ----------
    k
        ``[B, Hkv, Tk, D]``.
    width, stride
        Tokens; ``width`` is a multiple of ``stride``.

    Returns
    -------
    Tensor
        float64 ``[sequences, Hkv, n, D]``. Mean ``j`` is that of the keys from ``j * stride`` on;
        one that reaches beyond its sequence means nothing.
    """
    parts = width // stride
    cells = max(-(-k.shape[2] // stride), parts)
    position = torch.arange(cells * stride, device=k.device)
    sums = []
    for row, start, length in zip(
        segments.row.split(1),
        segments.key_start.split(1),
        segments.key_length.split(1),
        strict=True,
    ):  # one sequence at a time: it is a copy of its keys
        source = (start + position).clamp(max=k.shape[2] - 1)
        keys = k[row[:, None], :, source[None]]  # [1, tokens, Hkv, D]
        keys = torch.where((position < length)[:, None, None], keys, 0)
        sums.append(keys.unflatten(1, (cells, stride)).sum(2, dtype=torch.float64))
    total = torch.cat(sums).transpose(1, 2)
    return total.unfold(2, parts, 1).sum(-1) / width


def heaviest(scores: Tensor, forced: Tensor, allowed: Tensor, count: int) -> Tensor:
    """The blocks to read: the forced ones, and the best allowed ones until there are ``count``.

    Parameters
    ----------
    scores
        Float ``[..., blocks]``; the earlier block wins a tie.
    forced, allowed
        bool, broadcast to ``scores``: read whatever the score; may be read at all.
    count
        Blocks to read, the forced ones among them.
    """
    ranked = scores.float().masked_fill(~allowed, -torch.inf).masked_fill(forced, torch.inf)
    best = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True)
    return chosen & allowed | forced


def lists_of(
    chosen: Tensor, rows: Rows, *, heads: int, keys: int, block: int, block_size: int
) -> BlockLists:
    """The lists of ``chosen``, bool ``[sequences, heads or fewer, rows, blocks of block tokens]``.

    Consecutive query heads share an entry where there are fewer than ``heads``.
    """
    key_block = torch.arange(-(-keys // block_size), device=chosen.device)
    chosen = chosen.repeat_interleave(block // block_size, -1)[..., : key_block.numel()]
    reachable = (key_block <= rows.block[..., None]) & rows.exists[..., None]
    lists = BlockLists.from_mask(chosen & reachable[:, None])
    shared = heads // chosen.shape[1]
    return BlockLists(
        lists.indices.repeat_interleave(shared, 1), lists.counts.repeat_interleave(shared, 1)
    )
