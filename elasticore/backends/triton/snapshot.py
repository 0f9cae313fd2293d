"""Both modes of every head in one launch, where the sparse mode's keys are some of FULL's.

Training wants the output of the mode that was chosen, and the other's for the gate's gradient. A
program goes through the sparse mode's keys first, keeps that output, and goes on to the others.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticore.backends.triton.arguments import (
    capability,
    listing,
    listing_shape,
    places,
    positive_scale,
)
from elasticore.backends.triton.lists import remaining
from elasticore.backends.triton.outputs import outputs
from elasticore.backends.triton.portable import tiling_of
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import FULL, LN2, load_rows, locate, visit
from elasticore.layout import Segments
from elasticore.patterns import BlockLists, HeadMode

__all__ = ["attention"]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    modes: Tensor,
    segments: Segments | None,
    lists: BlockLists | None,
    *,
    sparse: HeadMode,
    both: bool,
    scale: float,
    sink: int,
    local: int,
    block_size: int,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Causal attention of every head in its mode and, if ``both``, in its other one.

    The outputs of the chosen modes have the same bits with ``both`` and without: FULL heads visit
    their keys in the same order.

    Parameters
    ----------
    q, k, v, segments, scale, sink, local, block_size
        See :func:`elasticore.backends.triton.portable.attention`.
    modes
        int8 ``[sequences, Hkv]``, each FULL or ``sparse``.
    lists
        If ``sparse`` is SELECTED, those of every head, also of FULL ones; unused otherwise.
    sparse
        STREAMING or SELECTED.

    Returns
    -------
    out, other
        ``[B, Hq, Tq, D]`` of the chosen mode and, if ``both``, of the one that was not chosen.
    lse
        float32 ``[B, Hq, Tq]`` of the chosen mode.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    tiling = tiling_of(capability(q.device), q.dtype, head_dim, block_size)
    q, scale = positive_scale(q, scale)
    out, lse = outputs(q, dense=segments is None)
    other = None
    if both:
        other = torch.empty_like(q) if segments is None else torch.zeros_like(q)
    rest = None
    if sparse is HeadMode.SELECTED:
        assert lists is not None
        rest = remaining(lists, segments, queries=queries, keys=keys, block_size=block_size)
    else:
        lists = None
    modes = modes.contiguous()
    work = schedule(
        torch.zeros_like(modes) if both else modes,  # both modes together cost what FULL costs
        segments,
        batch=batch,
        queries=queries,
        keys=keys,
        tile=tiling.rows,
        block_size=block_size,
        sink=sink,
        local=local,
    )
    _attend[(work.tiles.shape[0] * (heads // kv_heads),)](
        q, k, v, out, out if other is None else other, lse,
        modes, *places(segments), *listing(lists), *listing(rest), work.tiles, work.total,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        queries, keys, kv_heads, *listing_shape(lists), sink, local, int(both),
        scale * math.log2(math.e),
        GROUP=heads // kv_heads, DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK=block_size, ROWS=tiling.rows, KEYS=tiling.keys, STAGES=tiling.stages,
        num_warps=tiling.warps,
    )  # fmt: skip
    return out, other, lse


@triton.jit(
    do_not_specialize=["queries", "keys", "kv_heads", "list_rows", "list_width", "sink", "local",
                       "both"],
    do_not_specialize_on_alignment=[
        "modes", "batch_rows", "query_starts", "query_lengths", "key_starts", "key_lengths",
        "indices", "counts", "rest_indices", "rest_counts",
    ],
)  # fmt: skip
def _attend(
    q, k, v, out, other, lse,
    modes, batch_rows, query_starts, query_lengths, key_starts, key_lengths,
    indices, counts, rest_indices, rest_counts, tiles, total,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    out_batch, out_head, out_token,
    queries, keys, kv_heads, list_rows, list_width, sink, local, both, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program computes ROWS queries of one query head, as in the portable prefill, but in another
    # order: the sparse mode's blocks before the diagonal, the diagonal tiles, and then, after the
    # output so far was stored as the sparse one, the blocks that the sparse mode leaves out. A head
    # in its sparse mode stops before them unless `both` are wanted. That is a value and no
    # constant, so that one compiled kernel does either: its bits are the same.
    #
    # FLOPs: 4 * D per query and key of the FULL mode, for both modes together.
    work = tl.program_id(0) // GROUP
    if work >= tl.load(total):
        return
    pair = tl.load(tiles + 2 * work)
    first = tl.load(tiles + 2 * work + 1) * ROWS
    sequence = pair // kv_heads
    kv_head = pair % kv_heads
    head = (kv_head * GROUP + tl.program_id(0) % GROUP).to(tl.int64)
    batch_row, query_start, key_start, key_length, past = locate(
        sequence, batch_rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys
    )

    is_full = tl.load(modes + pair) == FULL
    diagonal = first // BLOCK
    if indices is not None:
        entry = (sequence.to(tl.int64) * kv_heads * GROUP + head) * list_rows
        entry += diagonal - past // BLOCK
        before = tl.load(counts + entry) - 1
        left_out = tl.load(rest_counts + entry)
        listing = indices + entry * list_width
        # The lists of what is left out are as wide as the key axis has blocks.
        rest_listing = rest_indices + entry * ((keys + BLOCK - 1) // BLOCK)
    else:
        left_out = tl.maximum(diagonal + 1 - sink - local, 0)
        before = diagonal - left_out

    position = first + tl.arange(0, ROWS)
    token = query_start + position - past
    column = tl.arange(0, PADDED_DIM)
    valid = (position >= past) & (position < key_length)
    inside = valid[:, None] & (column < DIM)[None, :]
    q += batch_row * q_batch + head * q_head
    query = load_rows(q, token, q_token, valid, DIM, PADDED_DIM)
    k += batch_row * k_batch + kv_head.to(tl.int64) * k_head + key_start * k_token
    v += batch_row * v_batch + kv_head.to(tl.int64) * v_head + key_start * v_token
    place = batch_row * out_batch + head * out_head + token[:, None] * out_token + column[None, :]
    lse_row = lse + (batch_row * kv_heads * GROUP + head) * queries + token

    largest = tl.full([ROWS], -float("inf"), tl.float32)
    mass = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    TILES: tl.constexpr = BLOCK // KEYS
    for n in tl.range(0, before * TILES + first % BLOCK // KEYS, num_stages=STAGES):
        if indices is not None:
            # Past the listed ones comes the diagonal block, the last of every list.
            block = tl.load(listing + n // TILES).to(tl.int32)
        else:
            block = n // TILES + tl.where(n // TILES < sink, 0, left_out)
        index = (block * BLOCK + n % TILES * KEYS + tl.arange(0, KEYS)).to(tl.int64)
        key = load_rows(k, index, k_token, None, DIM, PADDED_DIM)
        value = load_rows(v, index, v_token, None, DIM, PADDED_DIM)
        largest, mass, acc = visit(query, key, value, None, scale, largest, mass, acc)
    for start in tl.range(first // KEYS * KEYS, first + ROWS, KEYS, num_stages=STAGES):
        index = start + tl.arange(0, KEYS)
        key = load_rows(k, index.to(tl.int64), k_token, index < key_length, DIM, PADDED_DIM)
        value = load_rows(v, index.to(tl.int64), v_token, index < key_length, DIM, PADDED_DIM)
        visible = index[None, :] <= position[:, None]
        largest, mass, acc = visit(query, key, value, visible, scale, largest, mass, acc)

    if is_full:
        if both:
            tl.store(other + place, (acc / mass[:, None]).to(out.dtype.element_ty), inside)
    else:
        tl.store(out + place, (acc / mass[:, None]).to(out.dtype.element_ty), inside)
        tl.store(lse_row, (largest + tl.log2(mass)) * LN2, valid)
        left_out = tl.where(both != 0, left_out, 0)
    for n in tl.range(0, left_out * TILES, num_stages=STAGES):
        if indices is not None:
            block = tl.load(rest_listing + n // TILES).to(tl.int32)
        else:
            block = sink + n // TILES
        index = (block * BLOCK + n % TILES * KEYS + tl.arange(0, KEYS)).to(tl.int64)
        key = load_rows(k, index, k_token, None, DIM, PADDED_DIM)
        value = load_rows(v, index, v_token, None, DIM, PADDED_DIM)
        largest, mass, acc = visit(query, key, value, None, scale, largest, mass, acc)
    if is_full:
        tl.store(out + place, (acc / mass[:, None]).to(out.dtype.element_ty), inside)
        tl.store(lse_row, (largest + tl.log2(mass)) * LN2, valid)
    elif both:
        tl.store(other + place, (acc / mass[:, None]).to(out.dtype.element_ty), inside)
