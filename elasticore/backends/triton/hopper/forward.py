"""The prefill kernel."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from elasticore.backends.triton.arguments import places
from elasticore.backends.triton.hopper.memory import (
    BLOCK,
    ROWS,
    copy,
    descriptor,
    processors,
    store,
)
from elasticore.backends.triton.hopper.pipeline import LAG, fetch, partial_sums, step
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
from elasticore.backends.triton.launch import integers, launch
from elasticore.backends.triton.outputs import outputs
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import LN2, LOG2E
from elasticore.layout import Segments
from elasticore.patterns import BlockLists

__all__ = ["attention"]

STAGES = 2
"""Key and value blocks in shared memory at a time."""


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
) -> tuple[Tensor, Tensor]:
    """Attention of every head in its mode, in one launch after that of the schedule.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Tq, D]`` and ``[B, Hkv, Tk, D]``, as ``supports`` of this package wants them.
    modes
        int8 ``[sequences, Hkv]``, read on the device.
    segments
        Where the sequences lie; None means that every row of the batch is one and fills it.
    lists
        What SELECTED heads read; None if no head may be SELECTED.
    sink, local
        What STREAMING heads read, in blocks.

    Returns
    -------
    tuple of Tensor
        The output ``[B, Hq, Tq, D]``, zero at queries of no sequence, and the natural-log LSE,
        float32 ``[B, Hq, Tq]``, there minus infinity.
    """
    batch, heads, queries, dim = q.shape
    kv_heads = k.shape[1]
    out, lse = outputs(q, dense=segments is None)
    work = schedule(
        modes,
        segments,
        batch=batch,
        queries=queries,
        keys=k.shape[2],
        tile=BLOCK,
        block_size=block_size,
        sink=sink,
        local=local,
    )
    # Without lists, any int32 tensor stands in for them: nothing of it is read.
    indices = work.tiles if lists is None else lists.indices.contiguous()
    counts = work.total if lists is None else lists.counts.contiguous()
    strides = (
        *v.stride()[:3],
        *out.stride()[:3],
        *lse.stride()[:2],
        *modes.stride(),
        *((0, 0, 0) if lists is None else indices.stride()[:3]),
        *((0, 0) if lists is None else counts.stride()[:2]),
    )
    launch(
        _forward,
        (min(processors(q.device), work.tiles.shape[0] * heads // kv_heads),),
        (
            descriptor(q, ROWS.value),
            descriptor(k, BLOCK),
            descriptor(v, BLOCK),
            v,
            out,
            lse,
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
            k.shape[2],
            sink,
            local,
            scale * LOG2E.value,
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
            integers(*strides),
        ),
        num_warps=4,
        maxnreg=168,
        enable_fp_fusion=True,
    )
    return out, lse


@gluon.jit
def _produce(q_desc, k_desc, v_desc, v, q_shared, k_shared, v_shared, work, q_full, q_free, k_full,
             v_full, kv_free, work_full, work_free, tiles, total, modes, rows, query_starts,
             query_lengths, key_starts, key_lengths, indices, counts, v_batch, v_head, v_token,
             mode_row, mode_column, list_sequence, list_head, list_row, count_sequence, count_head,
             kv_heads, group, queries, keys, sink, local, D: gl.constexpr, STAGES: gl.constexpr,
             LISTED: gl.constexpr, RAGGED: gl.constexpr):  # fmt: skip
    """Fetch pieces of work one by one, and for each its rows of q and its key blocks."""
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
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
            copy(q_desc, [batch, head, first + w * ROWS, 0], q_full.index(w), q_shared.index(w))
        for n in range(blocks):
            block = block_at(n, mode, tile, blocks, window, chosen, LISTED)
            visited = fetch(
                k_desc, v_desc, v, k_shared, v_shared, k_full, v_full, kv_free, batch, kv_head,
                key_start, key_length, block, visited, v_batch, v_head, v_token, D, STAGES,
                RAGGED)  # fmt: skip
        turn += 1
        piece = gl.atomic_add(total + 1, 1)
    finish(work, work_full, work_free, turn, 0)


@gluon.jit
def _consume(out, lse, q_shared, k_shared, v_shared, work, q_full, q_free, k_full, v_full, kv_free,
             work_full, work_free, out_batch, out_head, out_token, lse_batch, lse_head, scale,
             W: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr,
             STAGES: gl.constexpr):  # fmt: skip
    """One warpgroup: rows ``64 W .. 64 W + 63`` of every piece of work."""
    dtype: gl.constexpr = q_shared.dtype
    scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, SIZE, 16])
    values: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, D, 16])
    zero = gl.zeros([ROWS, SIZE], gl.float32, scores)
    row = W * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, scores))
    slack = LAG / scale
    visited = 0
    turn = 0
    mbarrier.wait(work_full.index(0), 0)
    blocks = get(work, 0, BLOCKS)
    while blocks > 0:
        slot = turn % 2
        first = get(work, slot, FIRST)
        low = get(work, slot, LOW)
        high = get(work, slot, HIGH)
        batch = get(work, slot, BATCH)
        head = get(work, slot, HEAD)
        mbarrier.arrive(work_free.index(slot), count=1)

        # In registers, q costs shared memory no bandwidth, and its place is free at once.
        mbarrier.wait(q_full.index(W), turn & 1)
        q = q_shared.index(W).reshape([ROWS, D]).load(gl.DotOperandLayout(0, scores, 2))
        mbarrier.arrive(q_free.index(W), count=1)

        # The diagonal block, the only one with a mask: later keys, and those beyond the end.
        stage = visited % STAGES
        phase = (visited // STAGES) & 1
        mbarrier.wait(k_full.index(stage), phase)
        s = warpgroup_mma(q, k_shared.index(stage).reshape([SIZE, D]).permute((1, 0)), zero,
                          use_acc=False)  # fmt: skip
        mbarrier.arrive(kv_free.index(stage), count=1)
        column = gl.arange(0, SIZE, gl.SliceLayout(0, scores))
        s = gl.where(row[:, None] >= column[None, :], s, float("-inf"))
        top = gl.max(s, 1)
        p = gl.exp2(s * scale - (top * scale)[:, None])
        total = partial_sums(p)
        weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, values, 2))
        o = gl.zeros([ROWS, D], gl.float32, values)
        mbarrier.wait(v_full.index(stage), phase)

        for _ in range(1, blocks):
            o, top, total, weights, visited = step(
                q, o, top, total, weights, visited, k_shared, v_shared, k_full, v_full, kv_free,
                zero, scale, slack, SIZE, D, STAGES)  # fmt: skip
        o = warpgroup_mma(weights, v_shared.index(visited % STAGES).reshape([SIZE, D]), o)
        visited += 1

        sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, scores))
        at = batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head + first + row
        natural = (top * scale + gl.log2(sums)) * LN2
        gl.store(lse + at, natural, mask=(row >= low) & (row < high))
        o = o * gl.convert_layout(1.0 / sums, gl.SliceLayout(1, values))[:, None]
        store(out + batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head,
               o.to(dtype), W * ROWS, first, low, high, out_token, D)  # fmt: skip

        turn += 1
        slot = turn % 2
        mbarrier.wait(work_full.index(slot), (turn // 2) & 1)
        blocks = get(work, slot, BLOCKS)


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
def _forward(q_desc, k_desc, v_desc, v, out, lse, tiles, total, modes, rows, query_starts,
             query_lengths, key_starts, key_lengths, indices, counts, v_batch, v_head, v_token,
             out_batch, out_head, out_token, lse_batch, lse_head, mode_row, mode_column,
             list_sequence, list_head, list_row, count_sequence, count_head, kv_heads, group,
             queries, keys, sink, local, scale, D: gl.constexpr, STAGES: gl.constexpr,
             LISTED: gl.constexpr, RAGGED: gl.constexpr):  # fmt: skip
    """Attention of all heads, whatever their modes, by one program on each multiprocessor.

    A piece of work is one row tile of 128 positions of one query head. A producer warp takes the
    next piece from the schedule by an atomic count, and copies its q rows, keys and values to
    shared memory. Two consumer warpgroups of 64 rows each do the arithmetic: one pass over the key
    blocks with a running maximum (FlashAttention), from the diagonal back. Which blocks is the
    producer's business alone, so the consumers know nothing of modes.

    Cost: 4·D FLOPs for each pair of a query and a key of a visited block. A tile reads its key
    blocks once, from L2 mostly: tiles that run at the same time share a KV head. Every piece of
    work is done by one program in one order, so results do not depend on who did it.
    """
    SIZE: gl.constexpr = k_desc.block_shape[2]
    dtype: gl.constexpr = q_desc.dtype
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    q_shared = gl.allocate_shared_memory(dtype, [2, 1, 1, ROWS, D], q_desc.layout)
    k_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, SIZE, D], k_desc.layout)
    v_shared = gl.allocate_shared_memory(dtype, [STAGES, 1, 1, SIZE, D], v_desc.layout)
    work = gl.allocate_shared_memory(
        gl.int32, [2 * FIELDS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))  # fmt: skip
    q_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    q_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_full = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    work_free = gl.allocate_shared_memory(gl.int64, [2, 1], bar)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    kv_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for w in gl.static_range(2):
        mbarrier.init(q_full.index(w), count=1)
        mbarrier.init(q_free.index(w), count=1)
        mbarrier.init(work_full.index(w), count=1)
        mbarrier.init(work_free.index(w), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(kv_free.index(stage), count=2)
    fence_async_shared()
    # The registers that the producer does not need go to the consumers. Where it has more to do,
    # looking up blocks or copying values itself, it keeps some.
    PRODUCER: gl.constexpr = 40 if LISTED or RAGGED else 24
    gl.warp_specialize([
        (_consume, (out, lse, q_shared, k_shared, v_shared, work, q_full, q_free, k_full, v_full,
                    kv_free, work_full, work_free, out_batch, out_head, out_token, lse_batch,
                    lse_head, scale, 0, D, SIZE, STAGES)),
        (_consume, (out, lse, q_shared, k_shared, v_shared, work, q_full, q_free, k_full, v_full,
                    kv_free, work_full, work_free, out_batch, out_head, out_token, lse_batch,
                    lse_head, scale, 1, D, SIZE, STAGES)),
        (_produce, (q_desc, k_desc, v_desc, v, q_shared, k_shared, v_shared, work, q_full, q_free,
                    k_full, v_full, kv_free, work_full, work_free, tiles, total, modes, rows,
                    query_starts, query_lengths, key_starts, key_lengths, indices, counts, v_batch,
                    v_head, v_token, mode_row, mode_column, list_sequence, list_head, list_row,
                    count_sequence, count_head, kv_heads, group, queries, keys, sink, local, D,
                    STAGES, LISTED, RAGGED)),
    ], [4, 1], [(504 - PRODUCER) // 2, PRODUCER])  # fmt: skip
