"""What attention kernels have in common on the device: places, loads and one softmax step."""

from __future__ import annotations

import math

import triton
import triton.language as tl

from elasticore.patterns import HeadMode

__all__ = ["FULL", "LN2", "LOG2E", "SELECTED", "STREAMING", "load_rows", "locate", "visit"]

FULL = tl.constexpr(int(HeadMode.FULL))
STREAMING = tl.constexpr(int(HeadMode.STREAMING))
SELECTED = tl.constexpr(int(HeadMode.SELECTED))
LN2 = tl.constexpr(math.log(2))
LOG2E = tl.constexpr(math.log2(math.e))


@triton.jit
def locate(sequence, batch_rows, query_starts, query_lengths, key_starts, key_lengths, queries,
           keys):  # fmt: skip
    """Batch row, first query, first key, length and position of the first query of a sequence."""
    if batch_rows is None:  # every row of the batch is one sequence
        batch_row = sequence.to(tl.int64)
        query_start = tl.full([], 0, tl.int64)
        key_start = query_start
        key_length = keys
        past = keys - queries
    else:
        batch_row = tl.load(batch_rows + sequence)
        query_start = tl.load(query_starts + sequence)
        key_start = tl.load(key_starts + sequence)
        key_length = tl.load(key_lengths + sequence).to(tl.int32)
        past = key_length - tl.load(query_lengths + sequence).to(tl.int32)
    return batch_row, query_start, key_start, key_length, past


@triton.jit
def load_rows(x, index, stride, valid, DIM: tl.constexpr, PADDED_DIM: tl.constexpr):
    """Rows ``index`` (int64) of ``x``, zero where not ``valid``; None for all valid."""
    column = tl.arange(0, PADDED_DIM)[None, :]
    place = x + index[:, None] * stride + column
    if valid is not None:
        tile = tl.load(place, valid[:, None] & (column < DIM), 0.0)
    elif DIM < PADDED_DIM:
        tile = tl.load(place, column < DIM, 0.0)
    else:
        tile = tl.load(place)
    return tile


@triton.jit
def visit(query, key_tile, value_tile, visible, scale, largest, mass, acc):
    """Add one tile of keys to the softmax and the output; ``visible``: a mask, or None for all.

    ``scale`` holds the change to base 2. A row's first tile must hold a key that it sees, so that
    its maximum does not stay at -inf.
    """
    scores = tl.dot(query, tl.trans(key_tile), input_precision="ieee")
    if visible is not None:
        scores = tl.where(visible, scores, -float("inf"))
    new = tl.maximum(largest, tl.max(scores, 1) * scale)
    weights = tl.math.exp2(tl.fma(scores, scale, -new[:, None]))
    fade = tl.math.exp2(largest - new)
    mass = mass * fade + tl.sum(weights, 1)
    acc = tl.dot(
        weights.to(value_tile.dtype), value_tile, acc * fade[:, None], input_precision="ieee"
    )
    return new, mass, acc
