"""Prefill in plain Triton, for any GPU from Ampere on and, in Triton's interpreter, the CPU.

One launch runs every head of every sequence, whatever their modes.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from elasticore.backends.triton.arguments import (
    LARGE,
    capability,
    listing,
    listing_shape,
    next_power_of_two,
    places,
    positive_scale,
)
from elasticore.backends.triton.launch import aligned, integers, launch
from elasticore.backends.triton.outputs import outputs
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import LN2, SELECTED, STREAMING, locate, visit
from elasticore.layout import Segments
from elasticore.patterns.selector import BlockLists

__all__ = ["Tiling", "attention", "tiling_of"]


class Tiling(NamedTuple):
    """How one program cuts its work, and how Triton is to compile it."""

    rows: int
    """Queries of a program; divides the block size, so all of them lie in one row block."""
    keys: int
    """Keys that it visits at a time; divides the block size too."""
    warps: int
    stages: int
    """Tiles of K and V in flight: one that is computed on, the others on their way."""


HEAD_DIMS = (32, 64, 128, 256)
"""The columns of :data:`TILINGS`; other head dimensions are padded to the next of them."""

TILINGS = {
    # Hopper and datacenter Blackwell. Where two programs fit on a processor (113 KiB of shared
    # memory, 128 threads), one's softmax runs beside the other's products. At 128 dimensions one
    # large program was measured to be faster: 541 TFLOP/s against 517 on an H200.
    (9, 2): {
        128: ((128, 64, 4, 3), (128, 64, 4, 3), (128, 128, 8, 3), (128, 64, 8, 2)),
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 2)),
        32: ((32, 32, 2, 3), (32, 32, 2, 3), (32, 32, 2, 3), (32, 32, 4, 3)),
        16: ((16, 16, 1, 3), (16, 16, 1, 3), (16, 16, 1, 3), (16, 16, 2, 3)),
    },
    # Ampere, Ada and consumer Blackwell: no more than the 99 KiB that the smallest of them have.
    (8, 2): {
        128: ((128, 64, 4, 3), (128, 64, 4, 3), (128, 64, 8, 3), (64, 32, 8, 2)),
        64: ((64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 3), (64, 32, 8, 2)),
        32: ((32, 32, 2, 3), (32, 32, 2, 3), (32, 32, 2, 3), (32, 32, 4, 3)),
        16: ((16, 16, 1, 3), (16, 16, 1, 3), (16, 16, 1, 3), (16, 16, 2, 3)),
    },
    # float32 without rounding to TF32 has no tensor cores anywhere: small tiles, unrolled in full.
    (8, 4): {
        128: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2)),
        64: ((64, 64, 8, 2), (64, 32, 8, 2), (64, 16, 8, 2), (32, 16, 8, 2)),
        32: ((32, 32, 4, 2), (32, 32, 4, 2), (32, 16, 4, 2), (32, 16, 8, 2)),
        16: ((16, 16, 2, 2), (16, 16, 2, 2), (16, 16, 2, 2), (16, 16, 4, 2)),
    },
}
"""(rows, keys, warps, stages) by (compute capability, bytes per element), block size, head dim."""


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Tensor,
    segments: Segments | None,
    lists: BlockLists | None,
    *,
    scale: float,
    sink: int,
    local: int,
    block_size: int,
    table: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Causal attention of every head in its mode, in one launch after the schedule's.

    Parameters
    ----------
    q
        float16, bfloat16 or float32 ``[B, Hq, Tq, D]``, a unit stride last; ``D`` a multiple of 16
        from 32 to 256.
    k, v
        ``[B, Hkv, Tk, D]`` of q's dtype.
    modes
        int8 ``[sequences, Hkv]`` of :class:`elasticore.HeadMode` values; read on the device only.
    segments
        Where the sequences lie; None means that every row of the batch is one and fills it.
    lists
        What SELECTED heads read, its ``indices`` int16 or int32; None if there are none.
    scale
        Factor on q·k.
    sink, local
        What STREAMING heads read, in blocks.
    block_size
        16, 32, 64 or 128.
    table
        Where ``k`` and ``v`` are in pages, ``[pages, Hkv, page, D]``: int32
        ``[sequences, Hkv, blocks]``, see :class:`elasticore.Pages`. Then no start of keys counts,
        and there are no lists.

    Returns
    -------
    out
        ``[B, Hq, Tq, D]`` in q's dtype; 0 at queries that belong to no sequence.
    lse
        float32 ``[B, Hq, Tq]``: the logarithm of each row's sum of exponentials; -inf at queries
        that belong to no sequence.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads = k.shape[1]
    tiling = tiling_of(capability(q.device), q.dtype, head_dim, block_size)
    q, scale = positive_scale(q, scale)
    out, lse = outputs(q, dense=segments is None)
    keys, page, table_strides = k.shape[2], 1, (0, 0)
    if table is not None:
        page, keys = keys, keys * table.shape[2]
        table = table if table.stride(2) == 1 else table.contiguous()
        table_strides = (table.stride(0), table.stride(1))
    work = schedule(
        modes,
        segments,
        batch=batch,
        queries=queries,
        keys=keys,
        tile=tiling.rows,
        block_size=block_size,
        sink=sink,
        local=local,
    )
    padded_dim = next_power_of_two(head_dim)
    descriptors = table is None and _has_descriptors(k) and _has_descriptors(v)
    box = [1, 1, tiling.keys, padded_dim]
    indices, counts = listing(lists)
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3])
    constants = (
        *(heads // kv_heads, head_dim, padded_dim, block_size),
        *(tiling.rows, tiling.keys, tiling.stages, descriptors, page),
    )
    launch(
        _attend,
        (work.tiles.shape[0] * (heads // kv_heads),),
        (
            q,
            _Descriptor(k, k.shape, k.stride(), box) if descriptors else k,
            _Descriptor(v, v.shape, v.stride(), box) if descriptors else v,
            out,
            lse,
            modes.contiguous(),
            *places(segments),
            indices,
            counts,
            table,
            work.tiles,
            work.total,
            *strides,
            *table_strides,
            queries,
            keys,
            kv_heads,
            *listing_shape(lists),
            sink,
            local,
            scale * math.log2(math.e),
            *constants,
        ),
        (
            q.device,
            q.dtype,
            segments is None,
            table is None,
            None if lists is None else (lists.indices.dtype, lists.counts.dtype),
            constants,
            tiling,
            aligned(q, k, v),
            integers(*strides),
        ),
        num_warps=tiling.warps,
    )
    return out, lse


@functools.cache
def tiling_of(capability: int, dtype: torch.dtype, head_dim: int, block_size: int) -> Tiling:
    """The tiling for a GPU, a dtype and the sizes of a call."""
    large = capability in LARGE and dtype.itemsize == 2
    column = next(i for i, dim in enumerate(HEAD_DIMS) if dim >= head_dim)
    return Tiling(*TILINGS[9 if large else 8, dtype.itemsize][block_size][column])


def _has_descriptors(x: Tensor) -> bool:
    """Whether the copy engine of a large processor can read ``x``, by its strides and address.

    Left to pointers: float32, which multiplies in registers and spills them with descriptors, and
    smaller processors, whose shared memory the copies need too much of.
    """
    return (
        capability(x.device) in LARGE
        and x.dtype.itemsize == 2
        and x.data_ptr() % 16 == 0
        and all(stride > 0 and stride % 8 == 0 for stride in x.stride()[:3])
    )


class _Descriptor(TensorDescriptor):
    """A descriptor of a tensor that :func:`_has_descriptors` has looked at."""

    def __post_init__(self) -> None:
        pass


@triton.jit(
    # Whatever grows with the batch or its lengths must not make Triton compile anew.
    do_not_specialize=[
        "queries", "keys", "kv_heads", "list_rows", "list_width", "sink", "local",
        "table_sequence", "table_head",
    ],
    do_not_specialize_on_alignment=[
        "modes", "batch_rows", "query_starts", "query_lengths", "key_starts", "key_lengths",
        "indices", "counts", "table",
    ],
)  # fmt: skip
def _attend(
    q, k, v, out, lse,
    modes, batch_rows, query_starts, query_lengths, key_starts, key_lengths,
    indices, counts, table, tiles, total,
    q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token, out_batch, out_head, out_token, table_sequence, table_head,
    queries, keys, kv_heads, list_rows, list_width, sink, local, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr, DESCRIPTORS: tl.constexpr,
    PAGE: tl.constexpr,
):  # fmt: skip
    # A program computes ROWS queries of one query head: it visits the key tiles of its row block in
    # ascending order and keeps the running maximum and sum of the softmax (in base 2), and the
    # output so far. Modes differ in nothing but the number of the n-th key block: `sink` blocks
    # from the start, then all but the `gap` that is left out before the window (for a FULL head the
    # window is the row), or the n-th entry of the head's list. Only keys in the rows' own span may
    # lie in a query's future, or behind the sequence's end: their tiles come last, in a loop of
    # their own, and the first loop needs no masks.
    #
    # FLOPs: 4 * D per query and key visited. Bytes: K and V of the keys visited, per program. A
    # group's query heads and then neighbouring row tiles are neighbours in the launch, and mostly
    # find them in the L2 cache.
    work = tl.program_id(0) // GROUP
    if work >= tl.load(total):
        return
    pair = tl.load(tiles + 2 * work)
    first = tl.load(tiles + 2 * work + 1) * ROWS
    sequence = pair // kv_heads
    kv_head = pair % kv_heads
    head = kv_head * GROUP + tl.program_id(0) % GROUP
    batch_row, query_start, key_start, key_length, past = locate(
        sequence, batch_rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys
    )

    mode = tl.load(modes + pair)
    diagonal = first // BLOCK
    window = tl.where(mode == STREAMING, local, diagonal + 1)
    gap = tl.maximum(diagonal + 1 - sink - window, 0)
    before = diagonal - gap  # blocks to visit before the diagonal one
    if indices is not None:
        entry = (sequence.to(tl.int64) * kv_heads * GROUP + head) * list_rows
        entry += diagonal - past // BLOCK
        listed = mode == SELECTED
        listing = indices + entry * list_width
        before = tl.where(listed, tl.load(counts + entry, listed, 1) - 1, before)

    position = first + tl.arange(0, ROWS)
    token = query_start + position - past
    column = tl.arange(0, PADDED_DIM)
    # Of the rows, some may precede the first query, or follow the last.
    is_query = (position >= past) & (position < key_length)
    inside = is_query[:, None] & (column < DIM)[None, :]
    q_rows = q + batch_row * q_batch + head.to(tl.int64) * q_head + token[:, None] * q_token
    query = tl.load(q_rows + column[None, :], inside, 0.0)
    if not DESCRIPTORS:
        k += kv_head.to(tl.int64) * k_head
        v += kv_head.to(tl.int64) * v_head
        if table is None:
            k += batch_row * k_batch
            v += batch_row * v_batch
        else:
            table += sequence.to(tl.int64) * table_sequence + kv_head * table_head
            key_start = tl.zeros_like(key_start)

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    TILES: tl.constexpr = BLOCK // KEYS
    for n in tl.range(0, before * TILES + first % BLOCK // KEYS, num_stages=STAGES):
        block = n // TILES + tl.where(n // TILES < sink, 0, gap)
        if indices is not None:
            # A head without a list loads nothing: the mask stands for a branch.
            block = tl.where(listed, tl.load(listing + n // TILES, listed, 0).to(tl.int32), block)
        key = key_start + block * BLOCK + n % TILES * KEYS
        key_tile = _load(k, table, batch_row, kv_head, key, k_batch, k_token, None, key_length,
                         DIM, PADDED_DIM, KEYS, DESCRIPTORS, PAGE)  # fmt: skip
        value_tile = _load(v, table, batch_row, kv_head, key, v_batch, v_token, None, key_length,
                           DIM, PADDED_DIM, KEYS, DESCRIPTORS, PAGE)  # fmt: skip
        largest, mass, acc = visit(query, key_tile, value_tile, None, scale, largest, mass, acc)
    for start in tl.range(first // KEYS * KEYS, first + ROWS, KEYS, num_stages=STAGES):
        other = start + tl.arange(0, KEYS)
        within = other < key_length
        key = key_start + start
        key_tile = _load(k, table, batch_row, kv_head, key, k_batch, k_token, within, key_length,
                         DIM, PADDED_DIM, KEYS, DESCRIPTORS, PAGE)  # fmt: skip
        value_tile = _load(v, table, batch_row, kv_head, key, v_batch, v_token, within, key_length,
                           DIM, PADDED_DIM, KEYS, DESCRIPTORS, PAGE)  # fmt: skip
        if DESCRIPTORS:
            # What follows the sequence may be NaN. Its scores are masked, but 0 * NaN is not 0.
            value_tile = tl.where(within[:, None], value_tile, 0.0)
        visible = other[None, :] <= position[:, None]
        largest, mass, acc = visit(query, key_tile, value_tile, visible, scale, largest, mass, acc)

    out_rows = out + batch_row * out_batch + head.to(tl.int64) * out_head
    result = (acc / mass[:, None]).to(out.dtype.element_ty)
    tl.store(out_rows + token[:, None] * out_token + column[None, :], result, inside)
    lse_row = lse + (batch_row * kv_heads * GROUP + head) * queries
    tl.store(lse_row + token, (largest + tl.log2(mass)) * LN2, is_query)


@triton.jit
def _load(x, table, batch_row, head, key, page_stride, stride, within, key_length,
          DIM: tl.constexpr, PADDED_DIM: tl.constexpr, KEYS: tl.constexpr,
          DESCRIPTORS: tl.constexpr, PAGE: tl.constexpr):  # fmt: skip
    """KEYS keys or values from ``key`` on; ``within``: which belong to the sequence, None for all.

    The others are zero, but with descriptors only outside the tensor.
    """
    if DESCRIPTORS:
        tile = x.load([batch_row.to(tl.int32), head, key.to(tl.int32), 0])
        tile = tile.reshape([KEYS, PADDED_DIM])
    else:
        column = tl.arange(0, PADDED_DIM)[None, :]
        step = tl.arange(0, KEYS).to(tl.int64)
        if table is None:
            place = x + key * stride + (step[:, None] * stride + column)
        elif PAGE >= KEYS:  # all in one page, as tiles start at multiples of their size
            page = tl.load(table + key // PAGE, key < key_length, 0).to(tl.int64)
            place = x + page * page_stride + key % PAGE * stride + step[:, None] * stride + column
        else:
            page = tl.load(table + (key + step) // PAGE, key + step < key_length, 0).to(tl.int64)
            place = page * page_stride + (key + step) % PAGE * stride
            place = x + place[:, None] + column
        if within is not None:
            tile = tl.load(place, within[:, None] & (column < DIM), 0.0)
        elif DIM < PADDED_DIM:
            tile = tl.load(place, column < DIM, 0.0)
        else:
            tile = tl.load(place)
    return tile
