"""The work order of dk and dv, made on the device: the key blocks that most rows read first."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticore.backends.triton.launch import launch
from elasticore.backends.triton.schedule import CHUNK, SPAN, Schedule, power_of_two
from elasticore.layout import Segments

__all__ = ["columns"]


def columns(
    modes: Tensor,
    segments: Segments | None,
    *,
    batch: int,
    queries: int,
    keys: int,
    block_size: int,
    sink: int,
    local: int,
) -> Schedule:
    """Order the key blocks of all pairs: those that the most row blocks read first.

    By powers of two, as the row tiles of the forward pass; ``tiles`` holds (pair, key block). A
    sequence without queries has no blocks here. A STREAMING head's sink is read by all rows, so its
    blocks are as long as a FULL head's first ones, and start with them.

    Parameters
    ----------
    modes
        int8 ``[sequences, kv_heads]``.
    segments
        Where the sequences lie; None means that every row of the batch is one.
    batch, queries, keys
        Sizes of the call: rows, ``Tq`` and ``Tk``.
    sink, local
        What STREAMING heads read, in blocks.
    """
    sequences, kv_heads = modes.shape
    pairs = sequences * kv_heads
    # A sequence of n keys has at most n // block_size + 1 blocks.
    bound = kv_heads * (batch * keys // block_size + sequences)
    tiles = torch.empty(bound, 2, dtype=torch.int32, device=modes.device)
    total = torch.empty(2, dtype=torch.int32, device=modes.device)
    launch(
        _order,
        (pairs, triton.cdiv(keys // block_size + 1, SPAN.value)),
        (
            modes,
            None if segments is None else segments.query_length.contiguous(),
            None if segments is None else segments.key_length.contiguous(),
            tiles,
            total,
            pairs,
            kv_heads,
            sink,
            local,
            queries,
            keys,
            *modes.stride(),
            block_size,
        ),
        (modes.device, segments is None),
        num_warps=4,
    )
    return Schedule(tiles, total)


@triton.jit
def _extent(modes, query_lengths, key_lengths, pair, pairs, kv_heads, local, queries, keys,
            mode_row, mode_column, block_size):  # fmt: skip
    """Key blocks of ``pair``, row blocks, and the most that read a block behind the sink."""
    inside = pair < pairs
    sequence = pair // kv_heads
    mode = tl.load(
        modes + sequence * mode_row + (pair % kv_heads) * mode_column, mask=inside, other=0
    )
    if query_lengths is not None:
        queries = tl.load(query_lengths + sequence, mask=inside, other=0).to(tl.int32)
        keys = tl.load(key_lengths + sequence, mask=inside, other=0).to(tl.int32)
    count = tl.where(inside & (queries > 0), (keys + block_size - 1) // block_size, 0)
    rows = count - (keys - queries) // block_size
    # Who reads a SELECTED head's block is not known here; an earlier one has more rows after it.
    return count, rows, tl.where(mode == 1, local, rows)


@triton.jit
def _costlier(count, rows, most, sink, cost):
    """How many of the blocks, always the first ones, are read by ``cost`` row blocks or more.

    Block ``j`` is read by ``min(count - j, rows)``, and by ``most`` at most if ``j >= sink``.
    """
    early = tl.where(cost <= rows, tl.maximum(count - cost + 1, 0), 0)
    return tl.where(cost <= most, early, tl.minimum(early, sink))


@triton.jit(
    do_not_specialize=[
        "pairs", "kv_heads", "sink", "local", "queries", "keys", "mode_row", "mode_column",
        "block_size",
    ],
    do_not_specialize_on_alignment=["modes", "query_lengths", "key_lengths"],
)  # fmt: skip
def _order(modes, query_lengths, key_lengths, tiles, total, pairs, kv_heads, sink, local, queries,
           keys, mode_row, mode_column, block_size):  # fmt: skip
    """One program places SPAN blocks of one pair: it counts the blocks that come before each."""
    pair = tl.program_id(0)
    count, rows, most = _extent(modes, query_lengths, key_lengths, pair, pairs, kv_heads, local,
                                queries, keys, mode_row, mode_column, block_size)  # fmt: skip
    start = tl.program_id(1) * SPAN
    if start < count or pair + tl.program_id(1) == 0:
        block = start + tl.arange(0, SPAN)
        cost = tl.minimum(count - block, rows)
        cost = tl.where(block < sink, cost, tl.minimum(cost, most))
        least = power_of_two(tl.maximum(cost, 1))
        # Before a block come its pair's earlier ones, and of the other pairs those of its level,
        # if the pair comes before its own, or of twice its level.
        place = block
        everything = 0
        for chunk in range(0, pairs, CHUNK):
            other = chunk + tl.arange(0, CHUNK)
            counts, others, mosts = _extent(
                modes, query_lengths, key_lengths, other, pairs, kv_heads, local, queries, keys,
                mode_row, mode_column, block_size)  # fmt: skip
            everything += tl.sum(counts)
            bound = least[:, None] * tl.where(other < pair, 1, 2)[None, :]
            earlier = _costlier(counts[None, :], others[None, :], mosts[None, :], sink, bound)
            place += tl.sum(tl.where(other == pair, 0, earlier), 1)
        entry = tiles + place.to(tl.int64) * 2
        tl.store(entry, pair, mask=block < count)
        tl.store(entry + 1, block, mask=block < count)
        if pair + tl.program_id(1) == 0:
            tl.store(total, everything)
            tl.store(total + 1, 0)
