"""Pieces of work: where each lies, what it visits, and what the consumers are told about it.

A producer warp takes pieces from the schedule and puts their fields into one of two slots in shared
memory. So it is a piece ahead of the consumers, and the only one who knows modes and sequences.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from elasticore.backends.triton.tiles import SELECTED, STREAMING

__all__ = [
    "BATCH",
    "BLOCKS",
    "EXTRA",
    "FIELDS",
    "FIRST",
    "HEAD",
    "HIGH",
    "LOW",
    "announce",
    "block_at",
    "claim",
    "finish",
    "get",
    "locate",
    "put",
    "visits",
]

BLOCKS = gl.constexpr(0)  # blocks to visit; for most kernels 0 ends the work
FIRST = gl.constexpr(1)  # the tile's first row on its tensor's token axis; may be negative
LOW = gl.constexpr(2)  # rows [LOW, HIGH) of the tile belong to the sequence
HIGH = gl.constexpr(3)
BATCH = gl.constexpr(4)
HEAD = gl.constexpr(5)
EXTRA = gl.constexpr(6)  # this one and the next: what a kernel needs beside
FIELDS = gl.constexpr(8)


@gluon.jit
def put(work, slot, field: gl.constexpr, value):
    """Write a field of a slot."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    work.index(slot * FIELDS + field).store(gl.zeros([1], gl.int32, layout) + value)


@gluon.jit
def get(work, slot, field: gl.constexpr):
    """Read a field of a slot."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.max(work.index(slot * FIELDS + field).load(layout), 0)


@gluon.jit
def claim(work_free, turn):
    """The slot of piece number ``turn``, when the consumers have read what was in it."""
    slot = turn % 2
    mbarrier.wait(work_free.index(slot), ((turn // 2) & 1) ^ 1)
    return slot


@gluon.jit
def announce(work, work_full, slot, blocks, first, tile, past, key_length, batch, head,
             SIZE: gl.constexpr):  # fmt: skip
    """Write the fields of a row tile of SIZE positions, and hand the slot over."""
    put(work, slot, BLOCKS, blocks)
    put(work, slot, FIRST, first)
    put(work, slot, LOW, gl.maximum(past - tile * SIZE, 0))
    put(work, slot, HIGH, gl.minimum(key_length - tile * SIZE, SIZE))
    put(work, slot, BATCH, batch)
    put(work, slot, HEAD, head)
    mbarrier.arrive(work_full.index(slot), count=1)


@gluon.jit
def finish(work, work_full, work_free, turn, end):
    """Tell the consumers that there is no more work: ``end`` in place of BLOCKS."""
    slot = claim(work_free, turn)
    put(work, slot, BLOCKS, end)
    mbarrier.arrive(work_full.index(slot), count=1)


@gluon.jit
def locate(sequence, rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys,
           RAGGED: gl.constexpr):  # fmt: skip
    """Batch row, first query, first key, length and position of the first query of a sequence."""
    batch = sequence
    query_start = 0
    key_start = 0
    key_length = keys
    past = keys - queries
    if RAGGED:
        batch = gl.load(rows + sequence).to(gl.int32)
        key_start = gl.load(key_starts + sequence).to(gl.int32)
        key_length = gl.load(key_lengths + sequence).to(gl.int32)
        past = key_length - gl.load(query_lengths + sequence).to(gl.int32)
        query_start = gl.load(query_starts + sequence).to(gl.int32)
    return batch, query_start, key_start, key_length, past


@gluon.jit
def visits(mode, tile, row, sequence, head, sink, local, indices, counts, list_sequence, list_head,
           list_row, count_sequence, count_head, LISTED: gl.constexpr):  # fmt: skip
    """Key blocks that a row tile visits, how many of them are its window, and its list.

    ``row`` counts the tile from the sequence's first one, as lists do.
    """
    blocks = tile + 1
    window = blocks
    if mode == STREAMING:
        blocks = gl.minimum(blocks, sink + local)
        window = local
    chosen = indices
    if LISTED:
        if mode == SELECTED:
            at = sequence.to(gl.int64) * count_sequence + head.to(gl.int64) * count_head + row
            # A list without a block breaks its contract, but must not stop the consumers.
            blocks = gl.maximum(gl.load(counts + at), 1)
            chosen += (sequence.to(gl.int64) * list_sequence + head.to(gl.int64) * list_head
                       + row.to(gl.int64) * list_row)  # fmt: skip
    return blocks, window, chosen


@gluon.jit
def block_at(n, mode, tile, blocks, window, chosen, LISTED: gl.constexpr):
    """Block number ``n`` of a visit, from the diagonal back.

    Within the window it is the n-th before the diagonal, then come the sink's last ones; for
    SELECTED heads the list says.
    """
    block = gl.where(n < window, tile - n, blocks - 1 - n)
    if LISTED:
        if mode == SELECTED:
            block = gl.load(chosen + blocks - 1 - n).to(gl.int32)
    return block
