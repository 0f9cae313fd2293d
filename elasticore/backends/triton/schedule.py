"""The work order of a fused launch, made on the device: no value is read on the host.

A *pair* is a KV head of a sequence. Its row tiles are spans of positions of the sequence, anchored
at the sequence's first key as blocks are. One tile of one query head is one piece of work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticore.layout import Segments

__all__ = ["Schedule", "schedule"]


class Schedule(NamedTuple):
    """The row tiles of all pairs in the order in which they are to be started.

    Attributes
    ----------
    tiles
        int32 ``[bound, 2]``: (pair, row tile), ``pair = sequence * kv_heads + kv_head``. Row tile
        ``t`` covers the positions ``[t * tile, (t + 1) * tile)`` of its sequence.
    total
        int32 ``[2]``: how many entries of ``tiles`` count, and a zero for a persistent kernel to
        count in.
    """

    tiles: Tensor
    total: Tensor


def schedule(
    modes: Tensor,
    segments: Segments | None,
    *,
    batch: int,
    queries: int,
    keys: int,
    tile: int,
    block_size: int,
    sink: int,
    local: int,
) -> Schedule:
    """Order the row tiles: the costliest pairs first, the later rows of a pair first.

    So the last pieces of work are the shortest, and processors that run out of work wait little. A
    pair's tiles stay together: its query heads and neighbouring rows read the same keys, which a
    GPU then finds in its cache.

    Parameters
    ----------
    modes
        int8 ``[sequences, kv_heads]``.
    segments
        Where the sequences lie; None means that every row of the batch is one.
    batch, queries, keys
        Sizes of the call: rows, ``Tq`` and ``Tk``.
    tile
        Positions of a row tile.
    sink, local
        What STREAMING heads read, in blocks.
    """
    sequences, kv_heads = modes.shape
    # A sequence of n queries touches at most n // tile + 2 tiles.
    bound = kv_heads * (batch * queries // tile + 2 * sequences)
    tiles = torch.empty(bound, 2, dtype=torch.int32, device=modes.device)
    total = torch.empty(2, dtype=torch.int32, device=modes.device)
    _order[(sequences * kv_heads,)](
        modes,
        None if segments is None else segments.query_length.contiguous(),
        None if segments is None else segments.key_length.contiguous(),
        tiles,
        total,
        sequences * kv_heads,
        kv_heads,
        sink + local,
        queries,
        keys,
        *modes.stride(),
        tile,
        block_size,
        CHUNK=min(1024, triton.next_power_of_2(sequences * kv_heads)),
        num_warps=4,
    )
    return Schedule(tiles, total)


@triton.jit
def _size(modes, query_lengths, key_lengths, pair, pairs, kv_heads, window, queries, keys,
          mode_row, mode_column, tile, block_size):  # fmt: skip
    """First tile, number of tiles and cost of ``pair``; cost: blocks that its last row visits."""
    inside = pair < pairs
    sequence = pair // kv_heads
    mode = tl.load(
        modes + sequence * mode_row + (pair % kv_heads) * mode_column, mask=inside, other=0
    )
    if query_lengths is not None:
        queries = tl.load(query_lengths + sequence, mask=inside, other=0).to(tl.int32)
        keys = tl.load(key_lengths + sequence, mask=inside, other=0).to(tl.int32)
    first = (keys - queries) // tile
    count = tl.where(inside & (queries > 0), (keys - 1) // tile - first + 1, 0)
    blocks = (keys + block_size - 1) // block_size
    # What a SELECTED head reads is not known here: less than a FULL, more than a STREAMING one.
    cost = 2 * tl.where(mode == 1, tl.minimum(blocks, window), blocks) + (mode == 0).to(tl.int32)
    return first, count, cost


@triton.jit(
    do_not_specialize=[
        "pairs", "kv_heads", "window", "queries", "keys", "mode_row", "mode_column", "tile",
        "block_size",
    ]
)  # fmt: skip
def _order(modes, query_lengths, key_lengths, tiles, total, pairs, kv_heads, window, queries, keys,
           mode_row, mode_column, tile, block_size, CHUNK: tl.constexpr):  # fmt: skip
    """One program writes the tiles of one pair, after those of all pairs that come before it.

    Every program sums up the pairs before its own: O(pairs²) integer work in all, nothing beside
    the attention that follows, and one launch.
    """
    pair = tl.program_id(0)
    first, count, cost = _size(
        modes, query_lengths, key_lengths, pair, pairs, kv_heads, window, queries, keys, mode_row,
        mode_column, tile, block_size)  # fmt: skip
    before = 0
    everything = 0
    for start in range(0, pairs, CHUNK):
        other = start + tl.arange(0, CHUNK)
        _, others, costs = _size(
            modes, query_lengths, key_lengths, other, pairs, kv_heads, window, queries, keys,
            mode_row, mode_column, tile, block_size)  # fmt: skip
        earlier = (costs > cost) | ((costs == cost) & (other < pair))
        before += tl.sum(tl.where(earlier, others, 0))
        everything += tl.sum(others)
    for start in range(0, count, CHUNK):
        index = start + tl.arange(0, CHUNK)
        entry = tiles + (before + index).to(tl.int64) * 2
        tl.store(entry, pair, mask=index < count)
        tl.store(entry + 1, first + count - 1 - index, mask=index < count)
    if pair == 0:
        tl.store(total, everything)
        tl.store(total + 1, 0)
