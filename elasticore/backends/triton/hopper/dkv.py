"""The gradients of k and v."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from elasticore.backends.triton.arguments import places
from elasticore.backends.triton.columns import columns
from elasticore.backends.triton.hopper.memory import (
    ROWS,
    copy,
    copy_masked,
    descriptor,
    processors,
    store,
    strides_by_8,
)
from elasticore.backends.triton.hopper.work import (
    BATCH,
    BLOCKS,
    EXTRA,
    FIELDS,
    FIRST,
    HEAD,
    HIGH,
    claim,
    finish,
    get,
    locate,
    put,
)
from elasticore.backends.triton.launch import aligned, integers, launch
from elasticore.backends.triton.lists import transposed
from elasticore.backends.triton.tiles import LOG2E, SELECTED, STREAMING
from elasticore.layout import Segments
from elasticore.patterns import BlockLists

__all__ = ["key_value_gradients"]

STAGES = 4
"""Row tiles of 64 queries (q and the output's gradient) in shared memory at a time."""

# Here a piece's FIRST, HIGH and HEAD are the block's first key on k's token axis, its keys, and the
# KV head. The blocks that it visits are tiles of 64 rows:
OWN = BLOCKS  # of its own rows, causally masked; -1 ends the work
LATER = EXTRA  # after them


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
    """The gradients of k and v, through the mode of every head; zero outside the sequences.

    Parameters
    ----------
    q, k, v, grad
        ``[B, Hq, Tq, D]`` and ``[B, Hkv, Tk, D]``, as ``supports`` of this package wants them;
        ``grad``, the output's gradient, as q.
    lse, delta
        float32 ``[B, Hq, Tq]``, contiguous: the natural-log LSE, and each row's product of the
        output and its gradient.
    modes
        int8 ``[sequences, Hkv]``; read on the device.
    segments
        Where the sequences lie; None means that every row of the batch is one and fills it.
    lists
        What SELECTED heads read; None if no head may be SELECTED.
    sink, local
        What STREAMING heads read, in blocks.
    wanted
        Which of the two to return; one alone takes as long as both.

    Returns
    -------
    tuple
        dk and dv, as k and v, or None for what is not wanted.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    new = torch.empty_like if segments is None else torch.zeros_like
    dk, dv = new(k), new(v)
    readers = None if lists is None else transposed(lists, -(-keys // block_size))
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
    # Without lists, any int32 tensor stands in for them: nothing of it is read.
    indices = work.tiles if readers is None else readers.indices
    counts = work.total if readers is None else readers.counts
    strides = (
        *strides_by_8(q),
        *strides_by_8(grad),
        *dk.stride()[:3],
        *dv.stride()[:3],
        *modes.stride(),
        *((0, 0, 0) if readers is None else indices.stride()[:3]),
        *((0, 0) if readers is None else counts.stride()[:2]),
    )
    launch(
        _dkv,
        (min(processors(q.device), work.tiles.shape[0]),),
        (
            *(descriptor(x, ROWS.value) for x in (q, k, v, grad)),
            q,
            grad,
            lse,
            delta,
            dk,
            dv,
            work.tiles,
            work.total,
            modes,
            *places(segments),
            indices,
            counts,
            *strides,
            kv_heads,
            heads // kv_heads,
            queries,
            keys,
            sink,
            local,
            scale,
            dim,
            STAGES,
            lists is not None,
            segments is not None,
        ),
        (
            q.device,
            q.dtype,
            dim,
            indices.dtype,
            lists is None,
            segments is None,
            aligned(lse, delta),
            integers(*strides),
        ),
        num_warps=4,
        maxnreg=168,
        enable_fp_fusion=True,
    )
    return dk if wanted[0] else None, dv if wanted[1] else None


@gluon.jit
def _produce(q_desc, k_desc, v_desc, grad_desc, q, grad, lse, delta, q_shared, grad_shared,
             lse_shared, delta_shared, k_shared, v_shared, work, full, free, kv_full, kv_free,
             work_full, work_free, tiles, total, modes, rows, query_starts, query_lengths,
             key_starts, key_lengths, indices, counts, q_batch, q_head, q_token, grad_batch,
             grad_head, grad_token, mode_row, mode_column, list_sequence, list_head, list_row,
             count_sequence, count_head, kv_heads, group, queries, keys, sink, local,
             D: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
             RAGGED: gl.constexpr):  # fmt: skip
    """Fetch pieces of work one by one, and for each its keys, values and row tiles."""
    SIZE: gl.constexpr = 2 * ROWS
    pieces = gl.load(total)
    visited = 0
    turn = 0
    piece = gl.atomic_add(total + 1, 1)
    while piece < pieces:
        pair = gl.load(tiles + piece * 2)
        block = gl.load(tiles + piece * 2 + 1)
        sequence = pair // kv_heads
        kv_head = pair % kv_heads
        mode = gl.load(modes + sequence * mode_row + kv_head * mode_column)
        batch, query_start, key_start, key_length, past = locate(
            sequence, rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys,
            RAGGED)  # fmt: skip

        # The block's own rows, if they are queries, and the row blocks [after, end) behind it; for
        # SELECTED heads the list says which, its own first.
        origin = past // SIZE
        own = (block >= origin).to(gl.int32)
        after = gl.maximum(block + 1, origin)
        end = gl.cdiv(key_length, SIZE)
        if (mode == STREAMING) & (block >= sink):
            end = gl.minimum(end, block + local)
        later = gl.maximum(end - after, 0)
        all_later = later * group
        listed = False
        at = sequence.to(gl.int64) * count_sequence + block
        chosen = indices
        if LISTED:
            listed = mode == SELECTED
            chosen += sequence.to(gl.int64) * list_sequence + block.to(gl.int64) * list_row + own
            if listed:
                all_later = 0
                for g in range(group):
                    head = kv_head * group + g
                    # A list without the block's own rows breaks its contract, but must not stop
                    # the consumers.
                    entries = gl.load(counts + at + head.to(gl.int64) * count_head)
                    all_later += gl.maximum(entries - own, 0)

        slot = claim(work_free, turn)
        put(work, slot, OWN, own * group * 2)
        put(work, slot, LATER, all_later * 2)
        put(work, slot, FIRST, key_start + block * SIZE)
        put(work, slot, HIGH, gl.minimum(key_length - block * SIZE, SIZE))
        put(work, slot, BATCH, batch)
        put(work, slot, HEAD, kv_head)
        mbarrier.arrive(work_full.index(slot), count=1)

        mbarrier.wait(kv_free.index(0), (turn & 1) ^ 1)
        mbarrier.expect(kv_full.index(0), 4 * k_desc.block_type.nbytes)
        for w in gl.static_range(2):
            key = key_start + block * SIZE + w * ROWS
            copy(k_desc, [batch, kv_head, key, 0], kv_full.index(0), k_shared.index(w))
            copy(v_desc, [batch, kv_head, key, 0], kv_full.index(0), v_shared.index(w))

        for part in range(2 - own, 2 + 1):
            # Part 1: the own rows of all heads; part 2: the later ones.
            for g in range(group):
                head = kv_head * group + g
                count = 1
                if part == 2:
                    count = later
                    if LISTED:
                        if listed:
                            entries = gl.load(counts + at + head.to(gl.int64) * count_head)
                            count = gl.maximum(entries - own, 0)
                for n in range(count * 2):
                    row_block = block
                    if part == 2:
                        row_block = after + n // 2
                        if LISTED:
                            if listed:
                                entry = chosen + head.to(gl.int64) * list_head + n // 2
                                row_block = origin + gl.load(entry).to(gl.int32)
                    position = row_block * SIZE + n % 2 * ROWS
                    token = query_start + position - past
                    # Rows [low, high) of the tile are queries.
                    low = past - position
                    high = key_length - position
                    line = gl.arange(0, ROWS, gl.BlockedLayout([2], [32], [1], [0]))
                    inside = (line >= low) & (line < high)
                    scalars = (batch * kv_heads * group + head).to(gl.int64) * queries + token
                    # A row that is no query weighs nothing: its LSE is infinite.
                    tile_lse = gl.load(lse + scalars + line, mask=inside, other=float("inf"))
                    tile_delta = gl.load(delta + scalars + line, mask=inside, other=0.0)
                    stage = visited % STAGES
                    mbarrier.wait(free.index(stage), ((visited // STAGES) & 1) ^ 1)
                    whole = True
                    if RAGGED:
                        # What is no query may be NaN, and a weight of 0 does not silence that.
                        whole = (low <= 0) & (high >= ROWS)
                        if not whole:
                            q_rows = q + batch.to(gl.int64) * q_batch * 8
                            q_rows += head.to(gl.int64) * q_head * 8
                            grad_rows = grad + batch.to(gl.int64) * grad_batch * 8
                            grad_rows += head.to(gl.int64) * grad_head * 8
                            _copy_rows(q_rows, token, q_token, q_shared.index(stage), low, high, D)
                            _copy_rows(grad_rows, token, grad_token, grad_shared.index(stage),
                                       low, high, D)  # fmt: skip
                            async_copy.commit_group()
                            async_copy.wait_group(0)
                            fence_async_shared()
                            mbarrier.arrive(full.index(stage), count=1)
                    mbarrier.expect(full.index(stage), 2 * q_desc.block_type.nbytes, pred=whole)
                    copy(q_desc, [batch, head, token, 0], full.index(stage),
                          q_shared.index(stage), pred=whole)  # fmt: skip
                    copy(grad_desc, [batch, head, token, 0], full.index(stage),
                          grad_shared.index(stage), pred=whole)  # fmt: skip
                    lse_shared.index(stage).store(tile_lse * LOG2E)
                    delta_shared.index(stage).store(tile_delta)
                    mbarrier.arrive(full.index(stage), count=1)
                    visited += 1
        turn += 1
        piece = gl.atomic_add(total + 1, 1)
    finish(work, work_full, work_free, turn, -1)


@gluon.jit
def _copy_rows(base, token, stride, shared, low, high, D: gl.constexpr):
    """Start to copy rows [low, high) of a tile to shared memory and to zero the others.

    ``stride`` is in units of 16 bytes, which is what a thread copies at a time.
    """
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    tile = shared.reshape([ROWS, D])
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    for part in gl.static_range(ROWS // 8):
        row = part * 8 + gl.arange(0, 8, gl.SliceLayout(1, layout))
        at = base + (token + row).to(gl.int64)[:, None] * stride * 8 + column[None, :]
        inside = (row >= low) & (row < high)
        copy_masked(tile.slice(part * 8, 8), at, mask=inside[:, None])


@gluon.jit
def _visit(dk, dv, k_shared, v_shared, q_shared, grad_shared, lse_shared, delta_shared, full, free,
           zero, scale, visited, CAUSAL: gl.constexpr, ahead, W: gl.constexpr, D: gl.constexpr,
           STAGES: gl.constexpr):  # fmt: skip
    """Add one row tile to dk / scale and dv; all products transposed, keys by rows."""
    dtype: gl.constexpr = q_shared.dtype
    scores: gl.constexpr = zero.type.layout
    operand: gl.constexpr = gl.DotOperandLayout(0, dk.type.layout, 2)
    stage = visited % STAGES
    mbarrier.wait(full.index(stage), (visited // STAGES) & 1)
    q = q_shared.index(stage).reshape([ROWS, D])
    grad = grad_shared.index(stage).reshape([ROWS, D])
    s_next = warpgroup_mma(k_shared.index(W).reshape([ROWS, D]), q.permute((1, 0)), zero,
                           use_acc=False, is_async=True)  # fmt: skip
    dp_next = warpgroup_mma(v_shared.index(W).reshape([ROWS, D]), grad.permute((1, 0)), zero,
                            use_acc=False, is_async=True)  # fmt: skip
    lse = lse_shared.index(stage).load(gl.SliceLayout(0, scores))
    s = warpgroup_mma_wait(1, deps=[s_next])
    p = gl.exp2(s * scale - lse[None, :])
    if CAUSAL:  # a future key's weight may be infinite
        key = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
        row = ahead + gl.arange(0, ROWS, gl.SliceLayout(0, scores))
        p = gl.where(key[:, None] <= row[None, :], p, 0.0)
    weights = gl.convert_layout(p.to(dtype), operand)
    dv_next = warpgroup_mma(weights, grad, dv, is_async=True)
    delta = delta_shared.index(stage).load(gl.SliceLayout(0, scores))
    dp = warpgroup_mma_wait(1, deps=[dp_next])
    ds = gl.convert_layout((p * (dp - delta[None, :])).to(dtype), operand)
    dk_next = warpgroup_mma(ds, q, dk, is_async=True)
    dv, dk = warpgroup_mma_wait(0, deps=[dv_next, dk_next])
    mbarrier.arrive(free.index(stage), count=1)
    return dk, dv


@gluon.jit
def _consume(dk_out, dv_out, q_shared, grad_shared, lse_shared, delta_shared, k_shared, v_shared,
             work, full, free, kv_full, kv_free, work_full, work_free, dk_batch, dk_head, dk_token,
             dv_batch, dv_head, dv_token, scale, W: gl.constexpr, D: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """One warpgroup: keys ``64 W .. 64 W + 63`` of every piece of work."""
    dtype: gl.constexpr = q_shared.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    zero = gl.zeros([ROWS, ROWS], gl.float32, scores)
    visited = 0
    turn = 0
    mbarrier.wait(work_full.index(0), 0)
    own = get(work, 0, OWN)
    while own >= 0:
        later = get(work, turn % 2, LATER)
        mbarrier.wait(kv_full.index(0), turn & 1)
        dk = gl.zeros([ROWS, D], gl.float32, values)
        dv = gl.zeros([ROWS, D], gl.float32, values)
        for n in range(own):
            dk, dv = _visit(dk, dv, k_shared, v_shared, q_shared, grad_shared, lse_shared,
                            delta_shared, full, free, zero, scale * LOG2E, visited,
                            True, n % 2 * ROWS, W, D, STAGES)  # fmt: skip
            visited += 1
        for _ in range(later):
            dk, dv = _visit(dk, dv, k_shared, v_shared, q_shared, grad_shared, lse_shared,
                            delta_shared, full, free, zero, scale * LOG2E, visited,
                            False, 0, W, D, STAGES)  # fmt: skip
            visited += 1
        mbarrier.arrive(kv_free.index(0), count=1)

        slot = turn % 2
        first = get(work, slot, FIRST)
        high = get(work, slot, HIGH)
        batch = get(work, slot, BATCH).to(gl.int64)
        head = get(work, slot, HEAD).to(gl.int64)
        mbarrier.arrive(work_free.index(slot), count=1)
        store(dk_out + batch * dk_batch + head * dk_head, (dk * scale).to(dtype), W * ROWS, first,
               0, high, dk_token, D)  # fmt: skip
        store(dv_out + batch * dv_batch + head * dv_head, dv.to(dtype), W * ROWS, first, 0, high,
               dv_token, D)  # fmt: skip
        turn += 1
        mbarrier.wait(work_full.index(turn % 2), (turn // 2) & 1)
        own = get(work, turn % 2, OWN)


@gluon.jit(
    do_not_specialize=[
        "mode_row", "mode_column", "list_sequence", "list_head", "list_row", "count_sequence",
        "count_head", "kv_heads", "group", "queries", "keys", "sink", "local",
    ],
    do_not_specialize_on_alignment=[
        "modes", "rows", "query_starts", "query_lengths", "key_starts", "key_lengths", "indices",
        "counts",
    ],
)  # fmt: skip
def _dkv(q_desc, k_desc, v_desc, grad_desc, q, grad, lse, delta, dk, dv, tiles, total, modes, rows,
         query_starts, query_lengths, key_starts, key_lengths, indices, counts, q_batch, q_head,
         q_token, grad_batch, grad_head, grad_token, dk_batch, dk_head, dk_token, dv_batch,
         dv_head, dv_token, mode_row, mode_column, list_sequence, list_head, list_row,
         count_sequence, count_head, kv_heads, group, queries, keys, sink, local, scale,
         D: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
         RAGGED: gl.constexpr):  # fmt: skip
    """dk and dv of all KV heads, by one program on each multiprocessor.

    A piece of work is one key block of 128 of one KV head. Its keys and values stay in shared
    memory while the rows that read them come by in tiles of 64: for each query head of the group
    first the block's own rows, with the causal mask, then the later ones. A producer warp brings
    them; each of two consumer warpgroups has 64 keys and, in registers, their dk and dv:

        P = exp2(scale · K qᵀ - LSE)      dv += P dO
        dS = P ∘ (V dOᵀ - delta)          dk += dS q

    Cost: 8·D FLOPs for each pair of a query and a key of a visited block. A block reads q and dO of
    its rows once, from L2 where neighbouring blocks run at the same time. Nothing is summed across
    programs, so results do not depend on who did what.

    Barriers, by the number n of the piece (turn) or of the visit, with their arrivals:

    ==========  ========  ==================================================================
    work_full   1         fields of piece n are in slot n % 2; producer → consumers
    work_free   2         both consumers have read all fields of piece n
    kv_full     1 + copy  keys and values of piece n
    kv_free     2         both consumers are through with them
    full        2 + copy  row tile n is in stage n % STAGES: one arrival expects the bytes (or
                          follows a copy by hand), one follows LSE and delta
    free        2         both consumers are through with row tile n
    ==========  ========  ==================================================================
    """
    dtype: gl.constexpr = q_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    k_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], v_desc.layout)
    q_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], q_desc.layout)
    grad_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, ROWS, D], grad_desc.layout)
    lse_shared = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    delta_shared = gl.allocate_shared_memory(gl.float32, [STAGES, ROWS], line)
    work = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], line)
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    kv_full = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    kv_free = gl.allocate_shared_memory(gl.int64, [1, 1], bar)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    mbarrier.init(kv_full.index(0), count=1)
    mbarrier.init(kv_free.index(0), count=2)
    for slot in gl.static_range(2):
        mbarrier.init(work_full.index(slot), count=1)
        mbarrier.init(work_free.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=2)
        mbarrier.init(free.index(stage), count=2)
    fence_async_shared()
    PRODUCER: gl.constexpr = 24
    gl.warp_specialize([
        (_consume, (dk, dv, q_shared, grad_shared, lse_shared, delta_shared, k_shared, v_shared,
                    work, full, free, kv_full, kv_free, work_full, work_free, dk_batch, dk_head,
                    dk_token, dv_batch, dv_head, dv_token, scale, 0, D, STAGES)),
        (_consume, (dk, dv, q_shared, grad_shared, lse_shared, delta_shared, k_shared, v_shared,
                    work, full, free, kv_full, kv_free, work_full, work_free, dk_batch, dk_head,
                    dk_token, dv_batch, dv_head, dv_token, scale, 1, D, STAGES)),
        (_produce, (q_desc, k_desc, v_desc, grad_desc, q, grad, lse, delta, q_shared, grad_shared,
                    lse_shared, delta_shared, k_shared, v_shared, work, full, free, kv_full,
                    kv_free, work_full, work_free, tiles, total, modes, rows, query_starts,
                    query_lengths, key_starts, key_lengths, indices, counts, q_batch, q_head,
                    q_token, grad_batch, grad_head, grad_token, mode_row, mode_column,
                    list_sequence, list_head, list_row, count_sequence, count_head, kv_heads,
                    group, queries, keys, sink, local, D, STAGES, LISTED, RAGGED)),
    ], [4, 1], [(504 - PRODUCER) // 2, PRODUCER])  # fmt: skip
