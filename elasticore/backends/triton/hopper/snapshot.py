"""The forward pass of training: both modes of every head in one launch.

For pairs of modes of which the sparse one reads a part of what FULL reads: a row tile visits the
sparse mode's blocks, stores what it has, and goes on with the blocks that the sparse mode leaves
out.
"""

from __future__ import annotations

import torch
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
    EXTRA,
    FIELDS,
    FIRST,
    HEAD,
    HIGH,
    LOW,
    announce,
    claim,
    finish,
    get,
    locate,
    put,
)
from elasticore.backends.triton.launch import integers, launch
from elasticore.backends.triton.lists import remaining
from elasticore.backends.triton.outputs import outputs
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import FULL, LN2, LOG2E
from elasticore.layout import Segments
from elasticore.patterns import BlockLists, HeadMode

__all__ = ["attention"]

STAGES = 2
"""Key and value blocks in shared memory at a time."""

# The fields of a piece of work that only this kernel has. BLOCKS counts the sparse mode's blocks.
REST = gl.constexpr(EXTRA.value)  # key blocks to visit after a first store; 0 for none
STORES = gl.constexpr(EXTRA.value + 1)  # what to store: two bits after the blocks, two after REST
OUT = gl.constexpr(1)  # the chosen mode's output and LSE
OTHER = gl.constexpr(2)  # the other mode's output


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

    The outputs of the chosen modes have the same bits whether ``both`` or not: a head in FULL mode
    visits its keys in the same order, and waits for the tensor cores at the same place.

    Parameters
    ----------
    q, k, v
        ``[B, Hq, Tq, D]`` and ``[B, Hkv, Tk, D]``, as ``supports`` of this package wants them.
    modes
        int8 ``[sequences, Hkv]``, each FULL or ``sparse``; read on the device.
    segments
        Where the sequences lie; None means that every row of the batch is one and fills it.
    lists
        What SELECTED heads read: of every head, also of those in FULL mode. None if ``sparse`` is
        not SELECTED.
    sparse
        STREAMING or SELECTED.
    sink, local
        What STREAMING heads read, in blocks.

    Returns
    -------
    out, other
        ``[B, Hq, Tq, D]`` of the chosen mode, and of the one that was not chosen or None; zero at
        queries of no sequence.
    lse
        float32 ``[B, Hq, Tq]`` of the chosen mode; minus infinity at queries of no sequence.
    """
    batch, heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    dense = segments is None
    out, lse = outputs(q, dense=dense)
    other = None
    if both:
        other = torch.empty_like(out) if dense else torch.zeros_like(out)
    rest = None
    if sparse is HeadMode.SELECTED:
        assert lists is not None
        rest = remaining(lists, segments, queries=queries, keys=keys, block_size=block_size)
    else:
        lists = None
    work = schedule(
        # Both modes cost what FULL costs, whatever was chosen.
        torch.zeros_like(modes) if both else modes,
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
    rest_indices = work.tiles if rest is None else rest.indices
    rest_counts = work.total if rest is None else rest.counts
    strides = (
        *v.stride()[:3],
        *out.stride()[:3],
        *lse.stride()[:2],
        *modes.stride(),
        *((0, 0, 0) if lists is None else indices.stride()[:3]),
        *((0, 0, 0) if rest is None else rest_indices.stride()[:3]),
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
            out if other is None else other,
            lse,
            work.tiles,
            work.total,
            modes,
            *places(segments),
            indices,
            counts,
            rest_indices,
            rest_counts,
            *strides,
            kv_heads,
            heads // kv_heads,
            queries,
            keys,
            sink,
            local,
            int(both),
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
            rest_indices.dtype,
            lists is None,
            segments is None,
            integers(*strides),
        ),
        num_warps=4,
        maxnreg=168,
        enable_fp_fusion=True,
    )
    return out, other, lse


@gluon.jit
def _produce(q_desc, k_desc, v_desc, v, q_shared, k_shared, v_shared, work, q_full, q_free, k_full,
             v_full, kv_free, work_full, work_free, tiles, total, modes, rows, query_starts,
             query_lengths, key_starts, key_lengths, indices, counts, rest_indices, rest_counts,
             v_batch, v_head, v_token, mode_row, mode_column, list_sequence, list_head, list_row,
             rest_sequence, rest_head, rest_row, count_sequence, count_head, kv_heads, group,
             queries, keys, sink, local, both, D: gl.constexpr, STAGES: gl.constexpr,
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
        is_full = gl.load(modes + sequence * mode_row + kv_head * mode_column) == FULL
        batch, query_start, key_start, key_length, past = locate(
            sequence, rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys,
            RAGGED)  # fmt: skip
        first = query_start + tile * SIZE - past

        # The sparse mode's blocks from the diagonal back: its window, then the sink, or its list.
        # Then the rest, from the back too.
        if LISTED:
            row = tile - past // SIZE
            at = sequence.to(gl.int64) * count_sequence + head.to(gl.int64) * count_head + row
            # A list without a block breaks its contract, but must not stop the consumers.
            blocks = gl.maximum(gl.load(counts + at), 1)
            rest = gl.load(rest_counts + at)
            chosen = indices + (sequence.to(gl.int64) * list_sequence
                                + head.to(gl.int64) * list_head
                                + row.to(gl.int64) * list_row)  # fmt: skip
            left_out = rest_indices + (sequence.to(gl.int64) * rest_sequence
                                       + head.to(gl.int64) * rest_head
                                       + row.to(gl.int64) * rest_row)  # fmt: skip
        else:
            rest = gl.maximum(tile + 1 - sink - local, 0)
            blocks = tile + 1 - rest
        # A FULL head's own output is the one after the rest, which a head in its sparse mode visits
        # for the other output only. `both` is a value and no constant, so that one compiled kernel
        # does either: its bits are the same.
        unchosen = both * OTHER
        stores = gl.where(is_full, unchosen + 4 * OUT, OUT + 4 * unchosen)
        rest = gl.where(is_full | (both != 0), rest, 0)
        stores = gl.where(rest == 0, stores % 4 + stores // 4, stores)

        slot = claim(work_free, turn)
        put(work, slot, REST, rest)
        put(work, slot, STORES, stores)
        announce(work, work_full, slot, blocks, first, tile, past, key_length, batch, head, SIZE)
        for w in gl.static_range(2):
            mbarrier.wait(q_free.index(w), (turn & 1) ^ 1)
            mbarrier.expect(q_full.index(w), q_desc.block_type.nbytes)
            copy(q_desc, [batch, head, first + w * ROWS, 0], q_full.index(w), q_shared.index(w))

        for n in range(blocks + rest):
            back = blocks - 1 - n  # negative: that of the rest
            if LISTED:
                if back >= 0:
                    block = gl.load(chosen + back).to(gl.int32)
                else:
                    block = gl.load(left_out + rest + back).to(gl.int32)
            else:
                block = gl.where(n < local, tile - n, gl.where(back >= 0, back, sink + rest + back))
            visited = fetch(
                k_desc, v_desc, v, k_shared, v_shared, k_full, v_full, kv_free, batch, kv_head,
                key_start, key_length, block, visited, v_batch, v_head, v_token, D, STAGES,
                RAGGED)  # fmt: skip
        turn += 1
        piece = gl.atomic_add(total + 1, 1)
    finish(work, work_full, work_free, turn, 0)


@gluon.jit
def _consume(out, other, lse, q_shared, k_shared, v_shared, work, q_full, q_free, k_full, v_full,
             kv_free, work_full, work_free, out_batch, out_head, out_token, lse_batch, lse_head,
             scale, W: gl.constexpr, D: gl.constexpr, SIZE: gl.constexpr,
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
        # In registers, q costs shared memory no bandwidth, and its place is free at once.
        mbarrier.wait(q_full.index(W), turn & 1)
        q = q_shared.index(W).reshape([ROWS, D]).load(gl.DotOperandLayout(0, scores, 2))
        mbarrier.arrive(q_free.index(W), count=1)

        top = gl.full([ROWS], float("-inf"), gl.float32, gl.SliceLayout(1, scores))
        total = partial_sums(zero)
        o = gl.zeros([ROWS, D], gl.float32, values)
        # The first block of all is the diagonal one, the only one with a mask: later keys, and
        # those beyond the end. The first of the rest lies before all rows.
        ahead = 0
        while blocks > 0:
            stage = visited % STAGES
            phase = (visited // STAGES) & 1
            mbarrier.wait(k_full.index(stage), phase)
            s = warpgroup_mma(q, k_shared.index(stage).reshape([SIZE, D]).permute((1, 0)), zero,
                              use_acc=False)  # fmt: skip
            mbarrier.arrive(kv_free.index(stage), count=1)
            column = gl.arange(0, SIZE, gl.SliceLayout(0, scores))
            s = gl.where((row + ahead)[:, None] >= column[None, :], s, float("-inf"))
            found = gl.max(s, 1)
            higher = gl.where(found > top + slack, found, top)
            shrink = gl.exp2((top - higher) * scale)
            p = gl.exp2(s * scale - (higher * scale)[:, None])
            by_thread: gl.constexpr = gl.SliceLayout(1, total.type.layout)
            total = total * gl.convert_layout(shrink, by_thread)[:, None] + partial_sums(p)
            top = higher
            weights = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, values, 2))
            o = o * gl.convert_layout(shrink, gl.SliceLayout(1, values))[:, None]
            mbarrier.wait(v_full.index(stage), phase)

            for _ in range(1, blocks):
                o, top, total, weights, visited = step(
                    q, o, top, total, weights, visited, k_shared, v_shared, k_full, v_full, kv_free,
                    zero, scale, slack, SIZE, D, STAGES)  # fmt: skip
            o = warpgroup_mma(weights, v_shared.index(visited % STAGES).reshape([SIZE, D]), o)
            visited += 1

            sums = gl.convert_layout(gl.sum(total, 1), gl.SliceLayout(1, scores))
            result = o * gl.convert_layout(1.0 / sums, gl.SliceLayout(1, values))[:, None]
            result = result.to(dtype)
            # Read when they are needed, the piece's fields take no registers before.
            slot = turn % 2
            first = get(work, slot, FIRST)
            low = get(work, slot, LOW)
            high = get(work, slot, HIGH)
            batch = get(work, slot, BATCH)
            head = get(work, slot, HEAD)
            stores = get(work, slot, STORES)
            blocks = get(work, slot, REST)
            if ahead > 0:
                stores = stores // 4
                blocks = 0
            place = batch.to(gl.int64) * out_batch + head.to(gl.int64) * out_head
            if stores % 2 == OUT:
                at = batch.to(gl.int64) * lse_batch + head.to(gl.int64) * lse_head + first + row
                natural = (top * scale + gl.log2(sums)) * LN2
                gl.store(lse + at, natural, mask=(row >= low) & (row < high))
                store(out + place, result, W * ROWS, first, low, high, out_token, D)
            if stores % 4 >= OTHER:
                store(other + place, result, W * ROWS, first, low, high, out_token, D)
            ahead = SIZE

        mbarrier.arrive(work_free.index(turn % 2), count=1)
        turn += 1
        slot = turn % 2
        mbarrier.wait(work_full.index(slot), (turn // 2) & 1)
        blocks = get(work, slot, BLOCKS)


@gluon.jit(
    do_not_specialize=[
        "lse_batch", "lse_head", "mode_row", "mode_column", "list_sequence", "list_head",
        "list_row", "rest_sequence", "rest_head", "rest_row", "count_sequence", "count_head",
        "kv_heads", "group", "queries", "keys", "sink", "local", "both",
    ],
    do_not_specialize_on_alignment=[
        "modes", "rows", "query_starts", "query_lengths", "key_starts", "key_lengths", "indices",
        "counts", "rest_indices", "rest_counts",
    ],
)  # fmt: skip
def _forward(q_desc, k_desc, v_desc, v, out, other, lse, tiles, total, modes, rows, query_starts,
             query_lengths, key_starts, key_lengths, indices, counts, rest_indices, rest_counts,
             v_batch, v_head, v_token, out_batch, out_head, out_token, lse_batch, lse_head,
             mode_row, mode_column, list_sequence, list_head, list_row, rest_sequence, rest_head,
             rest_row, count_sequence, count_head, kv_heads, group, queries, keys, sink, local,
             both, scale, D: gl.constexpr, STAGES: gl.constexpr, LISTED: gl.constexpr,
             RAGGED: gl.constexpr):  # fmt: skip
    """Both modes of every head, by one program on each multiprocessor.

    The prefill kernel with another order of visits: a piece of work is one row tile of 128
    positions of one query head, whose sparse mode's key blocks come first and those that it leaves
    out after them. In between the pipeline runs empty and the output so far is stored. A producer
    warp tells the two consumer warpgroups how many blocks come before and after, and what each of
    the outputs is, so the consumers know nothing of modes.

    Cost: 4·D FLOPs for each pair of a query and a key of the FULL mode, for both modes together.
    Every piece of work is done by one program in one order, so results do not depend on who did it.
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
    PRODUCER: gl.constexpr = 40 if LISTED or RAGGED else 24
    gl.warp_specialize([
        (_consume, (out, other, lse, q_shared, k_shared, v_shared, work, q_full, q_free, k_full,
                    v_full, kv_free, work_full, work_free, out_batch, out_head, out_token,
                    lse_batch, lse_head, scale, 0, D, SIZE, STAGES)),
        (_consume, (out, other, lse, q_shared, k_shared, v_shared, work, q_full, q_free, k_full,
                    v_full, kv_free, work_full, work_free, out_batch, out_head, out_token,
                    lse_batch, lse_head, scale, 1, D, SIZE, STAGES)),
        (_produce, (q_desc, k_desc, v_desc, v, q_shared, k_shared, v_shared, work, q_full, q_free,
                    k_full, v_full, kv_free, work_full, work_free, tiles, total, modes, rows,
                    query_starts, query_lengths, key_starts, key_lengths, indices, counts,
                    rest_indices, rest_counts, v_batch, v_head, v_token, mode_row, mode_column,
                    list_sequence, list_head, list_row, rest_sequence, rest_head, rest_row,
                    count_sequence, count_head, kv_heads, group, queries, keys, sink, local, both,
                    D,
                    STAGES, LISTED, RAGGED)),
    ], [4, 1], [(504 - PRODUCER) // 2, PRODUCER])  # fmt: skip
