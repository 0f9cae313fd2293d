"""Decoding: a few new queries over a long cache, split along the keys (Flash-Decoding)."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticore.backends.triton.arguments import next_power_of_two, places
from elasticore.backends.triton.launch import aligned, integers, launch
from elasticore.backends.triton.outputs import outputs
from elasticore.backends.triton.tiles import LN2, SELECTED, STREAMING
from elasticore.layout import Segments
from elasticore.patterns import BlockLists

__all__ = ["Tile", "attention"]

MERGED = 128
"""Splits that one step of the merge reads."""
MERGED_COLUMNS = 32
"""Columns of the output that one of its programs makes."""


class Tile(NamedTuple):
    """How one program of the attention kernel works.

    Attributes
    ----------
    rows, keys
        Of the scores that one step computes, powers of two of at least 16.
    warps
        Warps of the program.
    stages
        Depth of the pipeline of steps, the one being computed included.
    """

    rows: int
    keys: int
    warps: int
    stages: int


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
    max_queries: int | None = None,
    split: int | None = None,
    tile: Tile | None = None,
    table: Tensor | None = None,
    lengths: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of every head in its mode, for up to 16 queries per sequence.

    Two launches and no synchronisation: every program attends to ``split`` keys of one KV head for
    all queries of its group, then the splits of each query are merged. A head's result depends on
    its own keys and on ``split`` only, not on its neighbours' modes or lengths.

    Parameters
    ----------
    q
        ``[B, Hq, Tq, D]``, float16, bfloat16 or float32, D a multiple of 16 up to 256, any strides
        with a unit last one; ``k`` and ``v`` are ``[B, Hkv, Tk, D]``.
    modes
        int8 ``[sequences, Hkv]`` of :class:`HeadMode` values, read on the device only.
    segments
        Where the sequences lie; None means that every row of the batch is one and fills it.
    lists
        The key blocks of SELECTED heads, or None if there are none such.
    scale
        Factor on q·k.
    sink, local
        What STREAMING heads read, in blocks.
    block_size
        Tokens per block.
    max_queries
        The most queries of any sequence, ``Tq`` by default; a packed batch, whose ``Tq`` is the sum
        over its sequences, should give it. K and V are read once per 128 of the
        ``Hq / Hkv * max_queries`` rows of a KV head, so the kernel is for no more than these.
    split, tile
        Keys per program and how it works; None means what suits the sizes and the GPU. A sequence's
        last bits depend on them.
    table
        Where ``k`` and ``v`` are in pages, ``[pages, Hkv, page, D]``: int32
        ``[sequences, Hkv, blocks]``, see :class:`elasticore.Pages`. ``segments`` or ``lengths``
        gives how many keys there are, and no start of keys counts.
    lengths
        Instead of ``segments``: int64 ``[B]``, the keys of each row of the batch, which is one
        sequence. Of a row with more queries than keys, only the last ones are its own.

    Returns
    -------
    out : Tensor
        ``[B, Hq, Tq, D]`` in q's dtype, zero at queries of no sequence.
    lse : Tensor
        float32 ``[B, Hq, Tq]``, the natural logarithm of the softmax's denominator, ``-inf`` at
        queries of no sequence.

    Notes
    -----
    Dao et al. 2023, "Flash-Decoding for long-context inference".
    """
    batch, query_heads, queries, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    sequences = modes.shape[0]
    total = batch * keys
    if table is not None:
        keys = table.shape[2] * k.shape[2]
        total = sequences * keys
    group = query_heads // kv_heads
    rows = group * (queries if max_queries is None else min(max_queries, queries))
    gpu = _gpu(q.device)
    if split is None:
        split = _keys_per_split(kv_heads * total, rows, gpu.processors)
    if tile is None:
        tile = _tile(rows, dim, q.element_size(), gpu.shared_memory)

    # Sequences of n1, n2, ... keys have sum(ceil(n / split)) splits, which is at most this.
    items = kv_heads * ((total + sequences * (split - 1)) // split)
    single = keys <= split
    chosen, chosen_strides = None, [0, 0, 0]
    if lists is not None:
        chosen = lists.to_mask(-(-keys // block_size)).view(torch.uint8)
        chosen_strides = [*chosen.stride()[:3]]
    out, lse = outputs(q, dense=segments is None and lengths is None)
    where = (*places(segments)[:4], lengths) if segments is None else places(segments)
    partial_out = partial_lse = None
    if not single:
        partial_out = q.new_empty(items, rows, dim, dtype=torch.float32)
        partial_lse = q.new_empty(rows, items, dtype=torch.float32)

    # Keys behind a table are two loads away, each of which takes stages of the pipeline.
    stages = tile.stages if table is None else 2 * tile.stages - 1
    modes = modes.contiguous()
    heads = sequences * kv_heads
    page, table_strides = 1, (0, 0)
    if table is not None:
        page = k.shape[2]
        table = table if table.stride(2) == 1 else table.contiguous()
        table_strides = (table.stride(0), table.stride(1))
    strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *chosen_strides)
    reads = (sink * block_size, local * block_size, split)
    padded_dim = next_power_of_two(dim)
    shape = (
        kv_heads,
        group,
        block_size,
        max(128, next_power_of_two(heads)),
        dim,
        padded_dim,
    )
    key = (
        *(q.device, q.dtype, segments is None, lengths is None, lists is None, single, shape),
        tile,
        *(aligned(q, k, v), integers(*strides, *out.stride()[:3], *reads)),
        *(table is None, page),
    )
    launch(
        _attend,
        (items * -(-rows // tile.rows),),
        (
            *(q, k, v, modes, *where, chosen, table, out, lse, partial_out, partial_lse),
            *(*strides, *table_strides, *out.stride()[:3], scale * math.log2(math.e)),
            *(heads, items, queries, keys, *reads, rows, *shape),
            *(tile.rows, tile.keys, stages, page),
        ),
        key,
        num_warps=tile.warps,
    )
    if not single:
        columns = min(padded_dim, MERGED_COLUMNS)
        launch(
            _merge,
            (heads, rows, padded_dim // columns),
            (
                *(modes, *where, out, lse, partial_out, partial_lse, *out.stride()[:3]),
                *(heads, items, queries, keys, *reads, rows, *shape, MERGED, columns),
            ),
            key,
            num_warps=4,
        )
    return out, lse


class _Gpu(NamedTuple):
    processors: int
    shared_memory: int


@functools.cache
def _gpu(device: torch.device) -> _Gpu:
    if device.type != "cuda":
        return _Gpu(1, 2**18)  # the interpreter
    properties = triton.runtime.driver.active.utils.get_device_properties(device.index)
    return _Gpu(properties["multiprocessor_count"], properties["max_shared_mem"])


def _keys_per_split(keys: int, rows: int, processors: int) -> int:
    """Keys of one program, of ``keys`` over all KV heads and sequences.

    Some four programs per processor, so that there is enough for everyone also where three quarters
    of the heads are STREAMING, whose window is two or three programs' worth; and enough keys that
    writing and reading the partial results, 8 bytes per row and dimension, is little beside
    reading K and V. The most is 896 and not 1,024 for a few per cent: with 8 KV heads over 128K
    keys, the programs then fill three rounds of an H200's three per processor.
    """
    least = max(256, 8 * rows)
    return max(least, min(896, next_power_of_two(keys // (4 * processors))))


@functools.cache
def _tile(rows: int, dim: int, itemsize: int, shared_memory: int) -> Tile:
    """The tile for ``rows`` rows: as many bytes in flight as two programs per processor allow."""
    dim = next_power_of_two(dim)
    rows = min(next_power_of_two(max(rows, 16)), 128, 128 * 128 // dim)
    if itemsize == 4:  # no tensor cores: few multiplications per thread, or the registers spill
        rows = min(rows, 64 * 128 // dim)
        return Tile(rows, 16, min(max(rows * dim // 512, 4), 16), 2)
    budget = shared_memory // 2 - 8192  # the rest holds the queries and weights
    keys = 64 if 4 * 64 * dim * itemsize < budget else 32
    if rows < 64 and 2 * 128 * dim * itemsize < budget:
        keys = 128
    stages = 1 + budget // (2 * keys * dim * itemsize) - (rows >= 64)
    stages = min(max(stages, 2), 3 if keys == 128 else 4)
    return Tile(rows, keys, 8 if rows * dim > 64 * 128 else 4, stages)


# What changes from call to call must not compile the kernels again.
_COUNTS = ["heads", "items", "queries", "keys", "rows"]
_COUNTS += ["chosen_sequence", "chosen_head", "chosen_row", "table_sequence", "table_head"]
_TABLES = ["modes", "chosen", "table", "sequence_rows"]
_TABLES += ["query_starts", "query_lengths", "key_starts", "key_lengths"]


@triton.jit
def _lengths(query_lengths, key_lengths, sequence, inside, queries, keys):
    """Queries and keys of ``sequence`` (one or a vector of them)."""
    if key_lengths is None:
        return queries, keys
    else:
        keys = tl.load(key_lengths + sequence, inside, 0).to(tl.int32)
        if query_lengths is None:
            return tl.minimum(queries, keys), keys
        else:
            return tl.load(query_lengths + sequence, inside, 0).to(tl.int32), keys


@triton.jit
def _gap(mode, past, sink, local, BLOCK_SIZE: tl.constexpr):
    """Keys between the sink and the first query's window, which a STREAMING head leaves out."""
    window = (past // BLOCK_SIZE + 1) * BLOCK_SIZE - local
    return tl.where(mode == STREAMING, tl.maximum(window - sink, 0), 0)


@triton.jit
def _ends(modes, query_lengths, key_lengths, heads, queries, keys, sink, local, split,
          KV_HEADS: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    """The work list: where each (sequence, KV head)'s splits end in it, int32 ``[HEADS]``."""
    head = tl.arange(0, HEADS)
    inside = head < heads
    mode = tl.load(modes + head, inside, 0)
    queries, keys = _lengths(query_lengths, key_lengths, head // KV_HEADS, inside, queries, keys)
    read = keys - _gap(mode, keys - queries, sink, local, BLOCK_SIZE)
    return tl.cumsum(tl.where(inside & (queries > 0), tl.cdiv(read, split), 0), 0)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def _attend(
    q, k, v, modes, sequence_rows, query_starts, query_lengths, key_starts, key_lengths, chosen,
    table, out, lse, partial_out, partial_lse,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    chosen_sequence, chosen_head, chosen_row, table_sequence, table_head,
    out_batch, out_head, out_token,
    scale, heads, items, queries, keys, sink, local, split, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    # The keys that a head reads, with what it leaves out in the middle cut out, are cut into splits
    # of `split` keys; the splits of all heads of all sequences, one after the other, are the work
    # list, and program i does its i-th entry. Programs beyond its end return at once, so what
    # STREAMING heads leave out costs nothing but these, and they come last.
    #
    # A program is the forward of FlashAttention-2 for one tile of rows: the group's query heads
    # times the sequence's queries, which all read the same K and V. Per key it reads 4 * D bytes
    # (in 16 bits) for 4 * BLOCK_M * D FLOPs, three quarters of them for nothing where a group of
    # four has one query, as the tensor cores need 16 rows; still the time is that of the bytes. It
    # writes 4 * (D + 1) bytes per row.
    row_tiles = tl.cdiv(rows, BLOCK_M)
    item = tl.program_id(0) // row_tiles
    ends = _ends(modes, query_lengths, key_lengths, heads, queries, keys, sink, local, split,
                 KV_HEADS, BLOCK_SIZE, HEADS)  # fmt: skip
    before = ends <= item
    index = tl.sum(before.to(tl.int32), 0)
    if index >= heads:
        return
    split_index = item - tl.max(tl.where(before, ends, 0), 0)
    sequence = index // KV_HEADS
    head = index % KV_HEADS
    mode = tl.load(modes + index)
    query_length, key_length = _lengths(query_lengths, key_lengths, sequence, True, queries, keys)
    past = key_length - query_length
    batch_row = sequence.to(tl.int64)
    query_start = tl.zeros_like(batch_row)
    if sequence_rows is not None:
        batch_row = tl.load(sequence_rows + sequence)
        query_start = tl.load(query_starts + sequence)
        if table is None:
            key_start = tl.load(key_starts + sequence)
            k += key_start * k_token
            v += key_start * v_token
    elif key_lengths is not None:
        query_start += queries - query_length

    d = tl.arange(0, BLOCK_D)
    row = tl.program_id(0) % row_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    query = row // GROUP
    query_head = (head * GROUP + row % GROUP).to(tl.int64)
    exists = (query < query_length) & (row < rows)
    position = tl.where(exists, past + query, -1)
    window = tl.where(mode == STREAMING, (position // BLOCK_SIZE + 1) * BLOCK_SIZE - local, 0)
    token = query_start + query
    q += batch_row * q_batch + query_head[:, None] * q_head + token[:, None] * q_token
    q_tile = tl.load(q + d[None, :], exists[:, None] & (d < DIM)[None, :], 0.0)
    k += head.to(tl.int64) * k_head
    v += head.to(tl.int64) * v_head
    if table is None:
        k += batch_row * k_batch
        v += batch_row * v_batch
    else:
        table += sequence.to(tl.int64) * table_sequence + head * table_head
    if chosen is not None:
        row_block = position // BLOCK_SIZE - past // BLOCK_SIZE
        chosen += sequence.to(tl.int64) * chosen_sequence + query_head * chosen_head
        chosen += row_block * chosen_row

    gap = _gap(mode, past, sink, local, BLOCK_SIZE)
    first = split_index * split
    last = tl.minimum(first + split, key_length - gap)
    top = tl.full([BLOCK_M], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for start in tl.range(first, last, BLOCK_N, num_stages=STAGES):
        n = start + tl.arange(0, BLOCK_N)
        read = n < last
        key = n + tl.where(n >= sink, gap, 0)
        visible = (key[None, :] <= position[:, None]) & read[None, :]
        visible &= (key < sink)[None, :] | (key[None, :] >= window[:, None])
        if chosen is not None:
            listed = tl.load(chosen[:, None] + (key // BLOCK_SIZE)[None, :], visible, 0)
            visible &= tl.where(mode == SELECTED, listed, 1) != 0
            # What no row has chosen may hold anything: it is not even read.
            read = tl.max(visible.to(tl.int32), 0) > 0
        there = read[:, None] & (d < DIM)[None, :]
        if table is None:
            offset = key.to(tl.int64)
            k_offset, v_offset = offset * k_token, offset * v_token
        else:
            page = tl.load(table + key // PAGE, read, 0).to(tl.int64)
            offset = (key % PAGE).to(tl.int64)
            k_offset = page * k_batch + offset * k_token
            v_offset = page * v_batch + offset * v_token
        k_tile = tl.load(k + k_offset[:, None] + d[None, :], there, 0.0)
        scores = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee") * scale
        scores = tl.where(visible, scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        # A row that has seen nothing yet has -inf here, and -inf minus itself is no number.
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weights = tl.exp2(scores - shift[:, None])
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weights, 1)
        v_tile = tl.load(v + v_offset[:, None] + d[None, :], there, 0.0)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * fade[:, None], input_precision="ieee")
        top = new_top

    total = tl.where(total == 0, 1.0, total)  # a row that reads nothing of this split
    acc = acc / total[:, None]
    level = top + tl.log2(total)
    stored = exists[:, None] & (d < DIM)[None, :]
    if partial_out is None:
        target = batch_row * out_batch + query_head * out_head + token * out_token
        tl.store(out + target[:, None] + d[None, :], acc.to(out.dtype.element_ty), stored)
        lse += (batch_row * KV_HEADS * GROUP + query_head) * queries + token
        tl.store(lse, level * LN2, exists)
    else:
        target = (item.to(tl.int64) * rows + row)[:, None] * DIM + d[None, :]
        tl.store(partial_out + target, acc, stored)
        tl.store(partial_lse + row.to(tl.int64) * items + item, level, exists)


@triton.jit(do_not_specialize=_COUNTS, do_not_specialize_on_alignment=_TABLES)
def _merge(
    modes, sequence_rows, query_starts, query_lengths, key_starts, key_lengths,
    out, lse, partial_out, partial_lse, out_batch, out_head, out_token,
    heads, items, queries, keys, sink, local, split, rows,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, BLOCK_SIZE: tl.constexpr, HEADS: tl.constexpr,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    # A few columns of one query and query head: the splits' outputs, weighted by exp(their LSE),
    # over the sum of the weights. Reads 4 * (D + 1) bytes per split, most of them still in L2.
    index = tl.program_id(0)
    row = tl.program_id(1)
    sequence = index // KV_HEADS
    query_length, _ = _lengths(query_lengths, key_lengths, sequence, True, queries, keys)
    query = row // GROUP
    if query >= query_length:
        return
    ends = _ends(modes, query_lengths, key_lengths, heads, queries, keys, sink, local, split,
                 KV_HEADS, BLOCK_SIZE, HEADS)  # fmt: skip
    head = tl.arange(0, HEADS)
    first = tl.sum(tl.where(head == index - 1, ends, 0), 0)
    last = tl.sum(tl.where(head == index, ends, 0), 0)

    d = tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    top = -float("inf")
    total = 0.0
    acc = tl.zeros([COLUMNS], tl.float32)
    partial_lse += row.to(tl.int64) * items
    for start in range(first, last, SPLITS):
        item = start + tl.arange(0, SPLITS)
        there = item < last
        level = tl.load(partial_lse + item, there, -float("inf"))
        source = (item.to(tl.int64) * rows + row)[:, None] * DIM + d[None, :]
        part = tl.load(partial_out + source, there[:, None] & (d < DIM)[None, :], 0.0)
        new_top = tl.maximum(top, tl.max(level, 0))
        # The first splits may hold nothing for this query (its window starts later).
        shift = tl.where(new_top == -float("inf"), 0.0, new_top)
        weight = tl.exp2(level - shift)
        fade = tl.exp2(top - shift)
        total = total * fade + tl.sum(weight, 0)
        acc = acc * fade + tl.sum(part * weight[:, None], 0)
        top = new_top

    query_head = (index % KV_HEADS * GROUP + row % GROUP).to(tl.int64)
    batch_row = sequence.to(tl.int64)
    token = query.to(tl.int64)
    if sequence_rows is not None:
        batch_row = tl.load(sequence_rows + sequence)
        token += tl.load(query_starts + sequence)
    elif key_lengths is not None:
        token += queries - query_length
    target = out + batch_row * out_batch + query_head * out_head + token * out_token
    tl.store(target + d, (acc / total).to(out.dtype.element_ty), d < DIM)
    lse += (batch_row * KV_HEADS * GROUP + query_head) * queries + token
    if tl.program_id(2) == 0:
        tl.store(lse, (top + tl.log2(total)) * LN2)
