"""The gradients of q, k and v, through the mode that each head ran.

Two kernels: dq by row tiles, dk and dv by key tiles, each with the forward's own visits. Neither
uses atomics, so both are deterministic.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticore.backends.triton.arguments import LARGE, capability, listing, listing_shape, places
from elasticore.backends.triton.columns import columns
from elasticore.backends.triton.lists import transposed
from elasticore.backends.triton.portable import Tiling
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import LOG2E, SELECTED, STREAMING, load_rows, locate
from elasticore.layout import Segments
from elasticore.patterns import BlockLists

__all__ = ["key_value_gradients", "query_gradient"]


def query_gradient(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    modes: Tensor,
    segments: Segments | None,
    lists: BlockLists | None,
    *,
    scale: float,
    sink: int,
    local: int,
    block_size: int,
) -> Tensor:
    """The gradient of q, with q's strides; 0 at queries of no sequence.

    Parameters
    ----------
    q, k, v, modes, segments, lists, scale, sink, local, block_size
        What the forward was given.
    grad
        dO, ``[B, Hq, Tq, D]`` in q's dtype, a unit stride last.
    lse
        float32 ``[B, Hq, Tq]``, the forward's.
    delta
        float32 ``[B, Hq, Tq]``: :func:`elasticore.backends.triton.gate.row_sums`.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    dq = torch.empty_like(q) if segments is None else torch.zeros_like(q)
    tiling = _tiling(q, block_size, 128, 64)
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
    _dq[(work.tiles.shape[0] * (heads // kv_heads),)](
        q, k, v, grad, lse, delta, dq,
        modes.contiguous(), *places(segments), *listing(lists), work.tiles, work.total,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3], *dq.stride()[:3],
        queries, keys, kv_heads, *listing_shape(lists), sink, local, scale,
        GROUP=heads // kv_heads, DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK=block_size, ROWS=tiling.rows, KEYS=tiling.keys, STAGES=tiling.stages,
        num_warps=tiling.warps,
    )  # fmt: skip
    return dq


def key_value_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    lse: Tensor,
    delta: Tensor,
    modes: Tensor,
    segments: Segments | None,
    lists: BlockLists | None,
    *,
    scale: float,
    sink: int,
    local: int,
    block_size: int,
    wanted: tuple[bool, bool] = (True, True),
) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of k and v, those that are ``wanted``; 0 at keys of no sequence.

    The parameters are those of :func:`query_gradient`.
    """
    batch, heads, queries, head_dim = q.shape
    kv_heads, keys = k.shape[1:3]
    new = torch.empty_like if segments is None else torch.zeros_like
    dk, dv = (new(x) if want else None for x, want in zip((k, v), wanted, strict=True))
    readers = None if lists is None else transposed(lists, triton.cdiv(keys, block_size))
    tiling = _tiling(q, block_size, 64, 128)
    work = columns(
        modes,
        segments,
        batch=batch,
        queries=queries,
        keys=keys,
        block_size=block_size,
        sink=sink,
        local=local,
    )
    _dkv[(work.tiles.shape[0] * (block_size // tiling.keys),)](
        q, k, v, grad, lse, delta, dk, dv,
        modes.contiguous(), *places(segments), *listing(readers), work.tiles, work.total,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *grad.stride()[:3],
        *(k if dk is None else dk).stride()[:3], *(v if dv is None else dv).stride()[:3],
        queries, keys, kv_heads, *listing_shape(readers), sink, local, scale,
        GROUP=heads // kv_heads, DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        BLOCK=block_size, ROWS=tiling.rows, KEYS=tiling.keys, STAGES=tiling.stages,
        num_warps=tiling.warps,
    )  # fmt: skip
    return dk, dv


def _tiling(q: Tensor, block_size: int, rows: int, keys: int) -> Tiling:
    """``rows`` x ``keys`` in 16 bits on a large GPU, as far as the block allows; less elsewhere."""
    if q.dtype.itemsize == 4:  # multiplied in registers: one side of a product must be small
        rows, keys, warps = (32, 16, 4) if rows > keys else (16, 32, 4)
    elif capability(q.device) not in LARGE:
        rows, keys, warps = 64, 64, 4
    else:
        warps = 8 if block_size == 128 else 4
    return Tiling(min(rows, block_size), min(keys, block_size), warps, 2)


@triton.jit(
    do_not_specialize=["queries", "keys", "kv_heads", "list_rows", "list_width", "sink", "local"],
    do_not_specialize_on_alignment=[
        "modes", "batch_rows", "query_starts", "query_lengths", "key_starts", "key_lengths",
        "indices", "counts",
    ],
)  # fmt: skip
def _dq(
    q, k, v, grad, lse, delta, dq,
    modes, batch_rows, query_starts, query_lengths, key_starts, key_lengths,
    indices, counts, tiles, total,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    grad_batch, grad_head, grad_token, dq_batch, dq_head, dq_token,
    queries, keys, kv_heads, list_rows, list_width, sink, local, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program computes dq of ROWS queries of one query head: it visits the key tiles that the
    # forward visited and adds P * (dO V^T - delta) K, with P made anew from the LSE.
    #
    # FLOPs: 6 * D per query and key visited. Bytes: K and V of the keys visited, per program.
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
    valid = (position >= past) & (position < key_length)
    q += batch_row * q_batch + head * q_head
    grad += batch_row * grad_batch + head * grad_head
    query = load_rows(q, token, q_token, valid, DIM, PADDED_DIM)
    do = load_rows(grad, token, grad_token, valid, DIM, PADDED_DIM)
    row = (batch_row * kv_heads * GROUP + head) * queries + token
    # A row that is no query weighs nothing.
    row_lse = tl.load(lse + row, valid, float("inf")) * LOG2E
    row_delta = tl.load(delta + row, valid, 0.0)
    k += batch_row * k_batch + kv_head.to(tl.int64) * k_head + key_start * k_token
    v += batch_row * v_batch + kv_head.to(tl.int64) * v_head + key_start * v_token

    acc = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    TILES: tl.constexpr = BLOCK // KEYS
    for n in tl.range(0, before * TILES + first % BLOCK // KEYS, num_stages=STAGES):
        block = n // TILES + tl.where(n // TILES < sink, 0, gap)
        if indices is not None:
            block = tl.where(listed, tl.load(listing + n // TILES, listed, 0).to(tl.int32), block)
        other = (block * BLOCK + n % TILES * KEYS + tl.arange(0, KEYS)).to(tl.int64)
        key = load_rows(k, other, k_token, None, DIM, PADDED_DIM)
        value = load_rows(v, other, v_token, None, DIM, PADDED_DIM)
        acc = _add_dq(query, do, key, value, row_lse, row_delta, None, scale, acc)
    for start in tl.range(first // KEYS * KEYS, first + ROWS, KEYS, num_stages=STAGES):
        other = start + tl.arange(0, KEYS)
        key = load_rows(k, other.to(tl.int64), k_token, other < key_length, DIM, PADDED_DIM)
        value = load_rows(v, other.to(tl.int64), v_token, other < key_length, DIM, PADDED_DIM)
        visible = other[None, :] <= position[:, None]
        acc = _add_dq(query, do, key, value, row_lse, row_delta, visible, scale, acc)

    column = tl.arange(0, PADDED_DIM)[None, :]
    target = dq + batch_row * dq_batch + head * dq_head + token[:, None] * dq_token + column
    tl.store(target, (acc * scale).to(dq.dtype.element_ty), valid[:, None] & (column < DIM))


@triton.jit
def _add_dq(query, do, key, value, row_lse, row_delta, visible, scale, acc):
    """Add one tile of keys to dq / scale; ``visible``: a mask, or None for all."""
    scores = tl.dot(query, tl.trans(key), input_precision="ieee")
    weights = tl.math.exp2(tl.fma(scores, scale * LOG2E, -row_lse[:, None]))
    if visible is not None:  # a future key's weight may be inf
        weights = tl.where(visible, weights, 0.0)
    dweights = tl.dot(do, tl.trans(value), input_precision="ieee")
    dscores = weights * (dweights - row_delta[:, None])
    return tl.dot(dscores.to(key.dtype), key, acc, input_precision="ieee")


@triton.jit(
    do_not_specialize=["queries", "keys", "kv_heads", "list_rows", "list_width", "sink", "local"],
    do_not_specialize_on_alignment=[
        "modes", "batch_rows", "query_starts", "query_lengths", "key_starts", "key_lengths",
        "indices", "counts",
    ],
)  # fmt: skip
def _dkv(
    q, k, v, grad, lse, delta, dk, dv,
    modes, batch_rows, query_starts, query_lengths, key_starts, key_lengths,
    indices, counts, tiles, total,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    grad_batch, grad_head, grad_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    queries, keys, kv_heads, list_rows, list_width, sink, local, scale,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    # A program computes dk and dv of KEYS keys of one KV head: it goes through the query heads of
    # the group and, for each, through the row blocks that read its key block. The block's own rows
    # come first, with the causal mask; then the row blocks after it: all of them, the `local - 1`
    # next ones of a STREAMING head's window, or those of the head's transposed list.
    #
    # FLOPs: 8 * D per query and key visited. Bytes: q and dO of the rows visited, per program.
    work = tl.program_id(0) // (BLOCK // KEYS)
    if work >= tl.load(total):
        return
    pair = tl.load(tiles + 2 * work)
    block = tl.load(tiles + 2 * work + 1)
    first = block * BLOCK + tl.program_id(0) % (BLOCK // KEYS) * KEYS
    sequence = pair // kv_heads
    kv_head = pair % kv_heads
    batch_row, query_start, key_start, key_length, past = locate(
        sequence, batch_rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys
    )

    mode = tl.load(modes + pair)
    origin = past // BLOCK  # the first row block
    after = tl.maximum(block + 1, origin)
    end = (key_length - 1) // BLOCK + 1
    windowed = (mode == STREAMING) & (block >= sink)
    end = tl.where(windowed, tl.minimum(end, block + local), end)
    has_diagonal = block >= origin

    position = first + tl.arange(0, KEYS)
    within = position < key_length
    index = key_start + position
    k += batch_row * k_batch + kv_head.to(tl.int64) * k_head
    v += batch_row * v_batch + kv_head.to(tl.int64) * v_head
    key = load_rows(k, index, k_token, within, DIM, PADDED_DIM)
    value = load_rows(v, index, v_token, within, DIM, PADDED_DIM)
    dkey = tl.zeros([KEYS, PADDED_DIM], tl.float32)
    dvalue = tl.zeros([KEYS, PADDED_DIM], tl.float32)
    TILES: tl.constexpr = BLOCK // ROWS
    for g in range(0, GROUP):
        head = kv_head.to(tl.int64) * GROUP + g
        q_rows = q + batch_row * q_batch + head * q_head
        do_rows = grad + batch_row * grad_batch + head * grad_head
        scalars = (batch_row * kv_heads * GROUP + head) * queries
        count = tl.maximum(end - after, 0)
        skipped = has_diagonal.to(tl.int32)
        if indices is not None:
            entry = (sequence.to(tl.int64) * kv_heads * GROUP + head) * list_rows + block
            listed = mode == SELECTED
            listing = indices + entry * list_width + skipped
            count = tl.where(listed, tl.load(counts + entry, listed, 0) - skipped, count)
        start = first // ROWS * ROWS
        stop = tl.where(has_diagonal, (block + 1) * BLOCK, start)
        for row in tl.range(start, stop, ROWS, num_stages=1):
            dkey, dvalue = _add_dkv(
                q_rows, do_rows, lse + scalars, delta + scalars, row, query_start, past,
                key_length, q_token, grad_token, key, value, position, scale, dkey, dvalue,
                DIM, PADDED_DIM, ROWS, True, dk is not None, dv is not None)  # fmt: skip
        for n in tl.range(0, count * TILES, num_stages=STAGES):
            row_block = after + n // TILES
            if indices is not None:
                listed_block = origin + tl.load(listing + n // TILES, listed, 0).to(tl.int32)
                row_block = tl.where(listed, listed_block, row_block)
            row = row_block * BLOCK + n % TILES * ROWS
            dkey, dvalue = _add_dkv(
                q_rows, do_rows, lse + scalars, delta + scalars, row, query_start, past,
                key_length, q_token, grad_token, key, value, position, scale, dkey, dvalue,
                DIM, PADDED_DIM, ROWS, False, dk is not None, dv is not None)  # fmt: skip

    column = tl.arange(0, PADDED_DIM)[None, :]
    inside = within[:, None] & (column < DIM)
    if dk is not None:
        target = dk + batch_row * dk_batch + kv_head.to(tl.int64) * dk_head
        target += index[:, None] * dk_token + column
        tl.store(target, (dkey * scale).to(dk.dtype.element_ty), inside)
    if dv is not None:
        target = dv + batch_row * dv_batch + kv_head.to(tl.int64) * dv_head
        target += index[:, None] * dv_token + column
        tl.store(target, dvalue.to(dv.dtype.element_ty), inside)


@triton.jit
def _add_dkv(q, grad, lse, delta, row, query_start, past, key_length, q_token, grad_token,
             key, value, position, scale, dkey, dvalue, DIM: tl.constexpr,
             PADDED_DIM: tl.constexpr, ROWS: tl.constexpr, CAUSAL: tl.constexpr,
             WANT_DK: tl.constexpr, WANT_DV: tl.constexpr):  # fmt: skip
    """Add ROWS queries from position ``row`` on to dk / scale and dv; all products transposed."""
    other = row + tl.arange(0, ROWS)
    valid = (other >= past) & (other < key_length)
    token = query_start + other - past
    query = load_rows(q, token, q_token, valid, DIM, PADDED_DIM)
    do = load_rows(grad, token, grad_token, valid, DIM, PADDED_DIM)
    # A row that is no query weighs nothing.
    row_lse = tl.load(lse + token, valid, float("inf")) * LOG2E
    scores = tl.dot(key, tl.trans(query), input_precision="ieee")
    weights = tl.math.exp2(tl.fma(scores, scale * LOG2E, -row_lse[None, :]))
    if CAUSAL:  # a future key's weight may be inf
        weights = tl.where(position[:, None] <= other[None, :], weights, 0.0)
    if WANT_DV:
        dvalue = tl.dot(weights.to(do.dtype), do, dvalue, input_precision="ieee")
    if WANT_DK:
        row_delta = tl.load(delta + token, valid, 0.0)
        dweights = tl.dot(value, tl.trans(do), input_precision="ieee")
        dscores = weights * (dweights - row_delta[None, :])
        dkey = tl.dot(dscores.to(query.dtype), query, dkey, input_precision="ieee")
    return dkey, dvalue
