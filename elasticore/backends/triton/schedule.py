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

from elasticore.backends.triton.launch import launch
from elasticore.layout import Segments

__all__ = ["CHUNK", "SPAN", "Schedule", "power_of_two", "schedule"]

SPAN = tl.constexpr(16)
"""Tiles that one program places."""
CHUNK = tl.constexpr(256)
"""Pairs that it looks at in one step."""


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
    """Order the row tiles: those that visit the most blocks first, by powers of two.

    So the last pieces of work are the shortest, and processors that run out of work wait little.
    Tiles whose costs have the same power of two are ordered by pair, the later rows first: query
    heads and neighbouring rows that read the same keys run together, and a GPU finds these keys in
    its cache. Ordering all tiles by cost alone makes long prompts 3-4 % slower.

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
    pairs = sequences * kv_heads
    # A sequence of n queries touches at most n // tile + 2 tiles.
    bound = kv_heads * (batch * queries // tile + 2 * sequences)
    tiles = torch.empty(bound, 2, dtype=torch.int32, device=modes.device)
    total = torch.empty(2, dtype=torch.int32, device=modes.device)
    most = queries // tile + 2  # tiles of one sequence
    launch(
        _order,
        (pairs, -(-most // SPAN.value)),
        (
            modes,
            None if segments is None else segments.query_length.contiguous(),
            None if segments is None else segments.key_length.contiguous(),
            tiles,
            total,
            pairs,
            kv_heads,
            sink + local,
            queries,
            keys,
            *modes.stride(),
            tile,
            block_size,
        ),
        (modes.device, segments is None),
        num_warps=4,
    )
    return Schedule(tiles, total)


@triton.jit
def _extent(modes, query_lengths, key_lengths, pair, pairs, kv_heads, window, queries, keys,
            mode_row, mode_column, tile, block_size):  # fmt: skip
    """First tile of ``pair``, the tile after its last, and the most blocks that a tile visits."""
    inside = pair < pairs
    sequence = pair // kv_heads
    mode = tl.load(
        modes + sequence * mode_row + (pair % kv_heads) * mode_column, mask=inside, other=0
    )
    if query_lengths is not None:
        queries = tl.load(query_lengths + sequence, mask=inside, other=0).to(tl.int32)
        keys = tl.load(key_lengths + sequence, mask=inside, other=0).to(tl.int32)
    first = (keys - queries) // tile + tl.zeros_like(pair)
    end = tl.where(inside & (queries > 0), (keys - 1) // tile + 1, first)
    # What a SELECTED head reads is not known here; a later row never reads fewer blocks.
    most = tl.where(mode == 1, window, (keys - 1) // block_size + 1)
    return first, end, most


@triton.jit
def power_of_two(x):
    """The greatest power of two that is not above ``x``, a positive integer below 2**24."""
    exponent = x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7F800000
    return exponent.to(tl.float32, bitcast=True).to(tl.int32)


@triton.jit
def _costlier(first, end, most, cost, tile, block_size):
    """How many of the tiles from ``first`` to ``end`` visit ``cost`` blocks or more.

    Tile ``t`` visits ``min(t * tile // block_size + 1, most)``.
    """
    earliest = tl.maximum(((cost - 1) * block_size + tile - 1) // tile, first)
    return tl.where(cost <= most, tl.maximum(end - earliest, 0), 0)


@triton.jit(
    do_not_specialize=[
        "pairs", "kv_heads", "window", "queries", "keys", "mode_row", "mode_column", "tile",
        "block_size",
    ],
    do_not_specialize_on_alignment=["modes", "query_lengths", "key_lengths"],
)  # fmt: skip
def _order(modes, query_lengths, key_lengths, tiles, total, pairs, kv_heads, window, queries, keys,
           mode_row, mode_column, tile, block_size):  # fmt: skip
    """One program places SPAN tiles of one pair: it counts the tiles that come before each.

    Each pair's count is arithmetic, as a pair's costs only grow with the row: O(pairs) work per
    tile, nothing beside the attention that follows, and one launch.
    """
    pair = tl.program_id(0)
    first, end, most = _extent(
        modes, query_lengths, key_lengths, pair, pairs, kv_heads, window, queries, keys, mode_row,
        mode_column, tile, block_size)  # fmt: skip
    start = first + tl.program_id(1) * SPAN
    if start < end or pair + tl.program_id(1) == 0:
        index = start + tl.arange(0, SPAN)
        least = power_of_two(tl.minimum(index * tile // block_size + 1, most))
        # Before a tile come all of twice its level, those of its level and of the pairs before
        # its own, and of its own pair the later ones.
        place = end - 1 - index - _costlier(first, end, most, 2 * least, tile, block_size)
        everything = 0
        for chunk in range(0, pairs, CHUNK):
            other = chunk + tl.arange(0, CHUNK)
            firsts, ends, mosts = _extent(
                modes, query_lengths, key_lengths, other, pairs, kv_heads, window, queries, keys,
                mode_row, mode_column, tile, block_size)  # fmt: skip
            everything += tl.sum(ends - firsts)
            bound = least[:, None] * tl.where(other < pair, 1, 2)[None, :]
            counts = _costlier(
                firsts[None, :], ends[None, :], mosts[None, :], bound, tile,
                block_size)  # fmt: skip
            place += tl.sum(counts, 1)
        entry = tiles + place.to(tl.int64) * 2
        tl.store(entry, pair, mask=index < end)
        tl.store(entry + 1, index, mask=index < end)
        if pair + tl.program_id(1) == 0:
            tl.store(total, everything)
            tl.store(total + 1, 0)
