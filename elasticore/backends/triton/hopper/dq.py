"""The gradient of q."""

from __future__ import annotations

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from elasticore.backends.triton.arguments import places
from elasticore.backends.triton.hopper.memory import (
    BLOCK,
    ROWS,
    copy,
    descriptor,
    load_values,
    processors,
    store,
)
from elasticore.backends.triton.hopper.work import (
    BATCH,
    BLOCKS,
    FIELDS,
    FIRST,
    HEAD,
    HIGH,
    LOW,
    announce,
    block_at,
    claim,
    finish,
    get,
    locate,
    visits,
)
from elasticore.backends.triton.launch import aligned, integers, launch
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import LOG2E
from elasticore.layout import Segments
from elasticore.patterns import BlockLists

__all__ = ["query_gradient"]

STAGES = 2
"""Key and value blocks in shared memory at a time."""


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
    """The gradient of q, through the mode of every head; zero outside the sequences.

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
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    result = torch.empty_like(q) if segments is None else torch.zeros_like(q)
    work = schedule(
        modes,
        segments,
        batch=batch,
        queries=queries,
        keys=keys,
        tile=BLOCK,
        block_size=block_size,
        sink=sink,
        local=local,
    )
    # Without lists, any int32 tensor stands in for them: nothing of it is read.
    indices = work.tiles if lists is None else lists.indices.contiguous()
    counts = work.total if lists is None else lists.counts.contiguous()
    strides = (
        *k.stride()[:3],
        *result.stride()[:3],
        *lse.stride()[:2],
        *modes.stride(),
        *((0, 0, 0) if lists is None else indices.stride()[:3]),
        *((0, 0) if lists is None else counts.stride()[:2]),
    )
    launch(
        _dq,
        (min(processors(q.device), work.tiles.shape[0] * heads // kv_heads),),
        (
            descriptor(q, ROWS.value),
            descriptor(k, BLOCK),
            descriptor(v, BLOCK),
            descriptor(grad, ROWS.value),
            k,
            lse,
            delta,
            result,
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
    return result


@gluon.jit
def _produce(q_desc, k_desc, v_desc, grad_desc, k, q_shared, grad_shared, k_shared, v_shared, work,
             q_full, q_free, k_full, k_free, v_full, v_free, work_full, work_free, tiles, total,
             modes, rows, query_starts, query_lengths, key_starts, key_lengths, indices, counts,
             k_batch, k_head, k_token, mode_row, mode_column, list_sequence, list_head, list_row,
             count_sequence, count_head, kv_heads, group, queries, keys, sink, local,
             D: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
             RAGGED: gl.constexpr):  # fmt: skip
    """Fetch pieces of work one by one, and for each its rows of q and dO and its key blocks."""
    SIZE: gl.constexpr = k_desc.block_shape[2]
    pieces = gl.load(total) * group
    visited = 0
    turn = 0
    piece = gl.atomic_add(total + 1, 1)
    while piece < pieces:
        pair = gl.load(tiles + piece // group * 2)
        tile = gl.load(tiles + piece // group * 2 + 1)
        sequence = pair // kv_heads
        kv_head = pair % kv_heads
        head = kv_head * group + piece % group
        mode = gl.load(modes + sequence * mode_row + kv_head * mode_column)
        batch, query_start, key_start, key_length, past = locate(
            sequence, rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys,
            RAGGED)  # fmt: skip
        first = query_start + tile * SIZE - past
        blocks, window, chosen = visits(
            mode, tile, tile - past // SIZE, sequence, head, sink, local, indices, counts,
            list_sequence, list_head, list_row, count_sequence, count_head, LISTED)  # fmt: skip

        slot = claim(work_free, turn)
        announce(work, work_full, slot, blocks, first, tile, past, key_length, batch, head, SIZE)
        for w in gl.static_range(2):
            mbarrier.wait(q_free.index(w), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(w), 2 * q_desc.block_type.nbytes)
            place = first + w * ROWS
            copy(q_desc, [batch, head, place, 0], q_full.index(w), q_shared.index(w))
            copy(grad_desc, [batch, head, place, 0], q_full.index(w), grad_shared.index(w))

        for n in range(blocks):
            block = block_at(n, mode, tile, blocks, window, chosen, LISTED)
            key = key_start + block * SIZE
            stage = visited % STAGES
            parity = ((visited // STAGES) & 1) ^ 1
            # The values of a step are free before its keys are.
            mbarrier.wait(v_free.index(stage), parity)
            mbarrier.expect(v_full.index(stage), v_desc.block_type.nbytes)
            copy(v_desc, [batch, kv_head, key, 0], v_full.index(stage), v_shared.index(stage))
            mbarrier.wait(k_free.index(stage), parity)
            whole = True
            if RAGGED:
                # What the copy engine would bring in after the sequence's end may be NaN, and a
                # dS of 0 does not silence that.
                inside = key_length - block * SIZE
                whole = inside >= SIZE
                if inside < SIZE:
                    base = k + batch.to(gl.int64) * k_batch + kv_head.to(gl.int64) * k_head
                    load_values(base, key, k_token, k_shared.index(stage), inside, SIZE, D)
                    fence_async_shared()
                    mbarrier.arrive(k_full.index(stage), count=1)
            mbarrier.expect(k_full.index(stage), k_desc.block_type.nbytes, pred=whole)
            copy(
                k_desc, [batch, kv_head, key, 0], k_full.index(stage), k_shared.index(stage),
                pred=whole)  # fmt: skip
            visited += 1
        turn += 1
        piece = gl.atomic_add(total + 1, 1)
    finish(work, work_full, work_free, turn, 0)


@gluon.jit
def _consume(dq, lse, delta, q_shared, grad_shared, k_shared, v_shared, work, q_full, q_free,
             k_full, k_free, v_full, v_free, work_full, work_free, dq_batch, dq_head, dq_token,
             lse_batch, lse_head, scale, W: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """One warpgroup: rows ``64 W .. 64 W + 63`` of every piece of work."""
    dtype: gl.constexpr = q_shared.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    operand: gl.constexpr = gl.DotOperandLayout(0, values, 2)
    zero = gl.zeros([ROWS, SIZE], gl.float32, scores)
    row = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    q = q_shared.index(W).reshape([ROWS, D])
    grad = grad_shared.index(W).reshape([ROWS, D])
    exponent = scale * LOG2E
    visited = 0
    turn = 0
    mbarrier.wait(work_full.index(0), 0)
    blocks = get(work, 0, BLOCKS)
    while blocks > 0:
        slot = turn % 2
        first = get(work, slot, FIRST)
        inside = (row >= get(work, slot, LOW)) & (row < get(work, slot, HIGH))
        at = get(work, slot, BATCH).to(gl.int64) * lse_batch
        at += get(work, slot, HEAD).to(gl.int64) * lse_head + first
        row_lse = gl.load(lse + at + row, mask=inside, other=float("inf")) * LOG2E
        row_delta = gl.load(delta + at + row, mask=inside, other=0.0)

        # The diagonal block, the only one with a mask: later keys, and those beyond the end.
        stage = visited % STAGES
        phase = (visited // STAGES) & 1
        mbarrier.wait(q_full.index(W), turn & 1)
        mbarrier.wait(k_full.index(stage), phase)
        s_next = warpgroup_mma(q, k_shared.index(stage).reshape([SIZE, D]).permute((1, 0)), zero,
                               use_acc=False, is_async=True)  # fmt: skip
        mbarrier.wait(v_full.index(stage), phase)
        dp_next = warpgroup_mma(grad, v_shared.index(stage).reshape([SIZE, D]).permute((1, 0)),
                                zero, use_acc=False, is_async=True)  # fmt: skip
        s = warpgroup_mma_wait(1, deps=[s_next])
        p = gl.exp2(s * exponent - row_lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp_next])
        mbarrier.arrive(v_free.index(stage), count=1)
        column = gl.arange(0, SIZE, gl.SliceLayout(0, scores))
        # Not the weights alone: a value beyond the sequence's end may be NaN, and so dp.
        ds = gl.where(row[:, None] >= column[None, :], p * (dp - row_delta[:, None]), 0.0)
        ds = gl.convert_layout(ds.to(dtype), operand)
        acc = gl.zeros([ROWS, D], gl.float32, values)
        acc = warpgroup_mma(ds, k_shared.index(stage).reshape([SIZE, D]), acc)
        mbarrier.arrive(k_free.index(stage), count=1)
        visited += 1
        for _ in range(1, blocks):
            stage = visited % STAGES
            phase = (visited // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            mbarrier.wait(v_full.index(stage), phase)
            s_next = warpgroup_mma(q, k_shared.index(stage).reshape([SIZE, D]).permute((1, 0)),
                                   zero, use_acc=False, is_async=True)  # fmt: skip
            dp_next = warpgroup_mma(grad, v_shared.index(stage).reshape([SIZE, D]).permute((1, 0)),
                                    zero, use_acc=False, is_async=True)  # fmt: skip
            s = warpgroup_mma_wait(1, deps=[s_next])
            p = gl.exp2(s * exponent - row_lse[:, None])
            # Full already: a wait at this place keeps the assembler from moving the exponentials
            # behind the wait for the tensor cores.
            mbarrier.wait(v_full.index(stage), phase)
            dp = warpgroup_mma_wait(0, deps=[dp_next])
            mbarrier.arrive(v_free.index(stage), count=1)
            ds = gl.convert_layout((p * (dp - row_delta[:, None])).to(dtype), operand)
            acc = warpgroup_mma(ds, k_shared.index(stage).reshape([SIZE, D]), acc)
            mbarrier.arrive(k_free.index(stage), count=1)
            visited += 1
        mbarrier.arrive(q_free.index(W), count=1)

        slot = turn % 2
        first = get(work, slot, FIRST)
        low = get(work, slot, LOW)
        high = get(work, slot, HIGH)
        batch = get(work, slot, BATCH).to(gl.int64)
        head = get(work, slot, HEAD).to(gl.int64)
        mbarrier.arrive(work_free.index(slot), count=1)
        store(dq + batch * dq_batch + head * dq_head, (acc * scale).to(dtype), W * ROWS, first,
               low, high, dq_token, D)  # fmt: skip
        turn += 1
        mbarrier.wait(work_full.index(turn % 2), (turn // 2) & 1)
        blocks = get(work, turn % 2, BLOCKS)


@gluon.jit(
    do_not_specialize=[
        "lse_batch", "lse_head", "mode_row", "mode_column", "list_sequence", "list_head",
        "list_row", "count_sequence", "count_head", "kv_heads", "group", "queries", "keys", "sink",
        "local",
    ],
    do_not_specialize_on_alignment=[
        "modes", "rows", "query_starts", "query_lengths", "key_starts", "key_lengths", "indices",
        "counts",
    ],
)  # fmt: skip
def _dq(q_desc, k_desc, v_desc, grad_desc, k, lse, delta, dq, tiles, total, modes, rows,
        query_starts, query_lengths, key_starts, key_lengths, indices, counts, k_batch, k_head,
        k_token, dq_batch, dq_head, dq_token, lse_batch, lse_head, mode_row, mode_column,
        list_sequence, list_head, list_row, count_sequence, count_head, kv_heads, group, queries,
        keys, sink, local, scale, D: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
        RAGGED: gl.constexpr):  # fmt: skip
    """dq of all heads, by one program on each multiprocessor.

    A piece of work is one row tile of 128 positions of one query head, as in the prefill kernel,
    and visits the key blocks that the prefill visits. q and dO of the tile stay in shared memory, a
    producer warp brings keys and values, and each of two consumer warpgroups has 64 rows and, in
    registers, their dq:

        P = exp2(scale · q Kᵀ - LSE)      dS = P ∘ (dO Vᵀ - delta)      dq += dS K

    Cost: 6·D FLOPs for each pair of a query and a key of a visited block. A tile reads its key
    blocks once, from L2 mostly. Every piece of work is done by one program in one order, so results
    do not depend on who did it.

    Barriers, by the number n of the piece (turn) or of the visit, with their arrivals:

    ==========  ========  ==================================================================
    work_full   1         fields of piece n are in slot n % 2; producer → consumers
    work_free   2         both consumers have read all fields of piece n
    q_full      1 + copy  q and dO of piece n, one barrier for each consumer
    q_free      1         the consumer is through with them
    k_full      1 + copy  keys of visit n are in stage n % STAGES (or copied there by hand)
    k_free      2         both consumers are through with them: one visit later than with
    v_free      2         the values of visit n, which
    v_full      1 + copy  are in stage n % STAGES
    ==========  ========  ==================================================================
    """
    SIZE: gl.constexpr = k_desc.block_shape[2]
    dtype: gl.constexpr = q_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], q_desc.layout)
    grad_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], grad_desc.layout)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, SIZE, D], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, SIZE, D], v_desc.layout)
    work = gl.allocate_shared_memory(
        gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))  # fmt: skip
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for w in gl.static_range(2):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_free.index(w), count=1)
        mbarrier.init(work_full.index(w), count=1)
        mbarrier.init(work_free.index(w), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_free.index(stage), count=2)
        mbarrier.init(v_free.index(stage), count=2)
    fence_async_shared()
    PRODUCER: gl.constexpr = 24
    gl.warp_specialize([
        (_consume, (dq, lse, delta, q_shared, grad_shared, k_shared, v_shared, work, q_full, q_free,
                    k_full, k_free, v_full, v_free, work_full, work_free, dq_batch, dq_head,
                    dq_token, lse_batch, lse_head, scale, 0, D, SIZE, STAGES)),
        (_consume, (dq, lse, delta, q_shared, grad_shared, k_shared, v_shared, work, q_full, q_free,
                    k_full, k_free, v_full, v_free, work_full, work_free, dq_batch, dq_head,
                    dq_token, lse_batch, lse_head, scale, 1, D, SIZE, STAGES)),
        (_produce, (q_desc, k_desc, v_desc, grad_desc, k, q_shared, grad_shared, k_shared, v_shared,
                    work, q_full, q_free, k_full, k_free, v_full, v_free, work_full, work_free,
                    tiles, total, modes, rows, query_starts, query_lengths, key_starts,
                    key_lengths, indices, counts, k_batch, k_head, k_token, mode_row, mode_column,
                    list_sequence, list_head, list_row, count_sequence, count_head, kv_heads,
                    group, queries, keys, sink, local, D, STAGES, LISTED, RAGGED)),
    ], [4, 1], [(504 - PRODUCER) // 2, PRODUCER])  # fmt: skip
