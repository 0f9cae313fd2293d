"""XAttention's choice of blocks on the GPU, for the heads that are SELECTED and no others.

The definition is :meth:`elasticore.patterns.XAttention.select`. Its unit is the *cell*: ``stride``
tokens of a sequence, counted from its first key. Every row cell is scored against the column cells
up to it, and a row block votes with its cells. Three kernels do one part of that each:

1. ``_score``, a matrix product, keeps of each tile of scores the rows' peaks and, per key block,
   the sum of the exponentials below the peak.
2. ``_fold`` brings the tiles of a row to one peak and adds up the rows of a row block.
3. ``_choose`` finds how far down the threshold reaches among a row block's masses, and lists them.

What lies between them is 4 bytes per row cell and key block of a query head: 32 MB a head at 128K
tokens with a stride of 16 and blocks of 128. The kernels take as many heads at a time as fit into
``WORKSPACE`` bytes, or as many rows of one KV head.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from elasticore.attention import Verdict
from elasticore.layout import Segments
from elasticore.patterns.selector import BlockLists, BlockSelector
from elasticore.patterns.xattention import XAttention

__all__ = ["select", "supports"]

WORKSPACE = 2**29
"""Bytes held between the kernels; one row tile of one KV head may need more."""


def supports(selector: BlockSelector) -> Verdict:
    """Whether :func:`select` chooses what ``selector`` does."""
    if type(selector) is not XAttention:
        return Verdict(False, f"selector {type(selector).__name__} is not XAttention.")
    if selector.official_quirk:
        return Verdict(False, "selector official_quirk=True has no kernel.")
    if not 4 <= selector.stride <= 64:
        return Verdict(False, f"selector stride={selector.stride} is not from 4 to 64.")
    return Verdict(True)


def select(
    selector: XAttention,
    q: Tensor,
    k: Tensor,
    modes: Tensor,
    segments: Segments,
    *,
    block_size: int,
    scale: float,
    max_queries: int,
    max_keys: int,
) -> BlockLists:
    """Choose the key blocks of the SELECTED heads; the lists of the others are empty.

    The choice is the definition's up to the rounding of scores and sums in float32: where two
    masses, or the mass kept and the threshold, are no further apart, either may win. A threshold of
    1 keeps every block. Nothing is read on the host, and two calls give the same lists.

    Parameters
    ----------
    selector
        One that :func:`supports` accepts, whose stride divides ``block_size``.
    q, k
        float16, bfloat16 or float32 ``[B, Hq, Tq, D]`` and ``[B, Hkv, Tk, D]``, any strides with a
        unit last one, D a multiple of 16.
    modes
        int8 ``[sequences, Hkv]`` of :class:`elasticore.HeadMode` values.
    segments
        Where the sequences lie.
    block_size, scale
        See :meth:`elasticore.BlockSelector.select`.
    max_queries, max_keys
        No sequence has more queries or keys than this; the lists are sized for it.

    Returns
    -------
    BlockLists
        ``indices`` are int16 if every block's number fits, int32 otherwise; what follows the
        counted ones is undefined. A row block without a query, or of a head that is not SELECTED,
        counts 0.

    Notes
    -----
    Xu et al. 2025 (XAttention). ``1 / (2 stride)`` of dense causal attention's FLOPs.
    """
    sequences, kv_heads = modes.shape
    pairs, query_heads = sequences * kv_heads, q.shape[1]
    group, stride = query_heads // kv_heads, selector.stride
    cells = block_size // stride
    width = max(1, triton.cdiv(max_keys, block_size))
    # Queries touch the most row blocks when the first one is the last of its block.
    rows = max(1, min((max_queries + block_size - 2) // block_size + 1, width))
    indices = torch.empty(
        sequences,
        query_heads,
        rows,
        width,
        dtype=torch.int16 if width < 2**15 else torch.int32,
        device=q.device,
    )
    counts = torch.empty(sequences, query_heads, rows, dtype=torch.int32, device=q.device)
    thresholds = q.new_full((query_heads,), selector.threshold, dtype=torch.float32)
    if scale <= 0:  # a row's peak is taken before the scale, which must not turn it around
        q, scale = (-q, -scale) if scale else (torch.zeros_like(q), 1.0)

    tiling = _tiling(q, rows * cells, group)
    row_tiles = triton.cdiv(rows * cells, tiling.rows)
    column_tiles = triton.cdiv(width * cells, tiling.columns)
    # One row tile of one KV head: a peak, a total and the parts of every tile; then the masses.
    floats = tiling.rows * column_tiles * (2 + tiling.columns // cells)
    held = 4 * group * (floats + tiling.rows // cells * width)
    row_tiles_at_once = _share(row_tiles, WORKSPACE // held)
    pairs_at_once = _share(pairs, WORKSPACE // (held * row_tiles))
    heads_at_once, cells_at_once = pairs_at_once * group, row_tiles_at_once * tiling.rows
    scored = q.new_empty(2, heads_at_once, cells_at_once, column_tiles, dtype=torch.float32)
    parts = q.new_empty(*scored.shape[1:], tiling.columns // cells, dtype=torch.float32)
    masses = q.new_empty(heads_at_once, cells_at_once // cells, width, dtype=torch.float32)

    places = _by_place(q, stride, tiling.rows, tiling), _by_place(k, stride, tiling.columns, tiling)
    if tiling.heads > 1 or None in places:
        places = None, None
    # Tiles of one row go to several programs, enough to fill a GPU but not one tile each.
    programs = pairs_at_once * row_tiles_at_once * triton.cdiv(group, tiling.heads)
    strips = min(column_tiles, max(8, 1024 // programs))
    sizes = {"GROUP": group, "BLOCK": block_size, "S": stride, "COLUMNS": tiling.columns}
    row, query_start, query_length, key_start, key_length = (x.contiguous() for x in segments)
    lengths = modes, query_length, key_length
    chunk = min(triton.next_power_of_2(width), 4096 // cells)
    wide = min(triton.next_power_of_2(width), 2048)
    with torch.cuda.device(q.device) if q.is_cuda else nullcontext():
        for first_pair in range(0, pairs, pairs_at_once):
            for first_tile in range(0, row_tiles, row_tiles_at_once):
                some_pairs = min(pairs_at_once, pairs - first_pair)
                some_tiles = min(row_tiles_at_once, row_tiles - first_tile)
                first_row = first_tile * tiling.rows // cells
                some_rows = min(some_tiles * tiling.rows // cells, rows - first_row)
                _score[(some_pairs * some_tiles * triton.cdiv(group, tiling.heads) * strips,)](
                    *lengths,
                    q,
                    k,
                    *places,
                    row,
                    query_start,
                    key_start,
                    *scored,
                    parts,
                    scale / stride * math.log2(math.e),
                    *modes.stride(),
                    *q.stride()[:3],
                    *k.stride()[:3],
                    q.shape[2],
                    k.shape[2],
                    kv_heads,
                    first_pair,
                    first_row,
                    some_tiles,
                    cells_at_once,
                    column_tiles,
                    strips,
                    **sizes,
                    D=q.shape[3],
                    ROWS=tiling.rows,
                    HEADS=tiling.heads,
                    DEPTH=tiling.depth,
                    STAGES=tiling.stages,
                    num_warps=tiling.warps,
                )
                _fold[(some_pairs * group * some_rows * triton.cdiv(width, chunk),)](
                    *lengths,
                    *scored,
                    parts,
                    masses,
                    *modes.stride(),
                    kv_heads,
                    first_pair,
                    first_row,
                    some_rows,
                    cells_at_once,
                    column_tiles,
                    width,
                    **sizes,
                    CHUNK=chunk,
                    TILES=min(triton.next_power_of_2(column_tiles), 64),
                    num_warps=4,
                )
                _choose[(some_pairs * group * some_rows,)](
                    *lengths,
                    masses,
                    thresholds,
                    indices,
                    counts,
                    *modes.stride(),
                    kv_heads,
                    first_pair,
                    first_row,
                    some_rows,
                    rows,
                    cells_at_once // cells,
                    width,
                    GROUP=group,
                    BLOCK=block_size,
                    CHUNK=wide,
                    num_warps=max(1, min(wide // 256, 4)),
                )
    return BlockLists(indices, counts)


class _Tiling(NamedTuple):
    """The tile of ``_score``: ``rows`` cells of each of ``heads`` query heads by ``columns`` cells.

    ``depth`` values of a token are multiplied at a time.
    """

    rows: int
    heads: int
    columns: int
    depth: int
    warps: int
    stages: int


def _tiling(q: Tensor, cells: int, group: int) -> _Tiling:
    """The tile for q and ``cells`` row cells of each query head."""
    if q.dtype == torch.float32:
        tiling = _Tiling(64, 1, 64, 32, 8, 2)
    elif q.is_cuda and torch.cuda.get_device_capability(q.device)[0] in (9, 10):
        tiling = _Tiling(128, 1, 256, 64, 8, 3)
    else:
        tiling = _Tiling(128, 1, 128, 32, 8, 3)
    if cells < tiling.rows:
        # A few queries, such as in decoding, read every key: the heads of a group read them once.
        rows = triton.next_power_of_2(cells)
        heads = min(triton.next_power_of_2(group), tiling.rows // rows)
        rows = max(rows, 16 // heads)
        columns, warps = min(tiling.columns, 128), 8 if rows * heads == 128 else 4
        tiling = tiling._replace(rows=rows, heads=heads, columns=columns, warps=warps)
    return tiling._replace(depth=min(tiling.depth, q.shape[3] & -q.shape[3]))


def _share(total: int, most: int) -> int:
    """The size of ``total`` things' parts, none above ``most`` (or 1), when they are cut evenly."""
    return triton.cdiv(total, triton.cdiv(total, max(1, most)))


def _by_place(x: Tensor, stride: int, cells: int, tiling: _Tiling) -> TensorDescriptor | None:
    """``x`` as ``[B, H, stride, T // stride, D]``: for each place in a cell, all cells' tokens.

    None where a tensor descriptor cannot be had: it wants strides of 16 bytes.
    """
    batch, heads, tokens, dim = x.shape
    # The stride of an axis of one entry is never used, but has to be a valid one.
    strides = [x.stride(axis) if x.shape[axis] > 1 else dim for axis in range(3)]
    strides += [stride * strides[2], 1]
    if tokens < stride or x.data_ptr() % 16:
        return None
    if any(step <= 0 or step * x.element_size() % 16 for step in strides[:-1]):
        return None
    shape = [batch, heads, stride, tokens // stride, dim]
    return TensorDescriptor(x, shape, strides, [1, 1, 1, cells, tiling.depth])


@triton.jit
def _lengths(modes, query_lengths, key_lengths, mode_row, mode_column, sequence, kv_head):
    """Queries and keys of a sequence; no queries if its KV head is not SELECTED."""
    selected = tl.load(modes + sequence * mode_row + kv_head * mode_column) == 2
    queries = tl.load(query_lengths + sequence).to(tl.int32)
    return tl.where(selected, queries, 0), tl.load(key_lengths + sequence).to(tl.int32)


@triton.jit(
    do_not_specialize=["q_tokens", "k_tokens", "kv_heads", "first_pair", "first_row", "some_tiles",
                       "cells_at_once", "column_tiles", "strips"],
    do_not_specialize_on_alignment=["modes", "query_lengths", "key_lengths", "rows",
                                    "query_starts", "key_starts"],
)  # fmt: skip
def _score(modes, query_lengths, key_lengths, q, k, q_places, k_places, rows, query_starts,
           key_starts, peaks, totals, parts, factor, mode_row, mode_column, q_row, q_head, q_token,
           k_row, k_head, k_token, q_tokens, k_tokens, kv_heads, first_pair, first_row, some_tiles,
           cells_at_once, column_tiles, strips,
           GROUP: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr,
           D: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """Score tiles of ``HEADS * ROWS`` row cells by ``COLUMNS`` column cells.

    A cell's score is the sum over its S places of the dot product of a query, taken from the cell's
    end backwards, and a key: one product of depth ``S * D``, in which place s of all rows (or
    columns) of a tile is a matrix of tokens that lie S apart. Of the scores leave, below the tile's
    causal diagonal, each row's peak, the total of ``exp2(score - peak)``, and its parts by key
    block.

    A program takes every ``strips``-th tile of a row of tiles; the later, longer rows start first,
    and the query heads of a KV head stay together, as they read the same keys. Per query head
    ``Tq Tk D / S`` FLOPs (Tq = Tk), and 4 bytes written per row cell and key block.
    """
    CELLS: tl.constexpr = BLOCK // S
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    strip = tl.program_id(0) % strips
    program = tl.program_id(0) // strips
    head_tile = program % HEAD_TILES
    program //= HEAD_TILES
    tile = some_tiles - 1 - program % some_tiles
    some_pair = program // some_tiles
    sequence = (first_pair + some_pair) // kv_heads
    kv_head = (first_pair + some_pair) % kv_heads
    queries, keys = _lengths(modes, query_lengths, key_lengths, mode_row, mode_column, sequence,
                             kv_head)  # fmt: skip
    past = keys - queries
    first = (past // BLOCK + first_row) * CELLS + tile * ROWS
    last = tl.minimum(first + ROWS, (keys + S - 1) // S)
    if (queries == 0) | (first >= last):
        return

    m = tl.arange(0, HEADS * ROWS)
    group_head = head_tile * HEADS + m // ROWS
    cell = first + m % ROWS
    real = (group_head < GROUP) & (cell < last)
    row = tl.load(rows + sequence)
    # Where the sequence's position 0 lies; its queries begin later, at position `past`.
    q_zero = tl.load(query_starts + sequence) - past
    k_zero = tl.load(key_starts + sequence)
    # A tile is whole if none of its cells sticks out of the sequence, or of the cells that the
    # descriptors know. Rows before the first query may be anything: nobody reads them.
    whole = q_places is not None
    whole &= (past % S == 0) | (past < first * S)
    whole &= last * S <= keys
    whole &= q_zero + last * S <= q_tokens // S * S
    whole &= k_zero + last * S <= k_tokens // S * S

    place = (some_pair * GROUP + group_head).to(tl.int64) * cells_at_once + tile * ROWS + m % ROWS
    for t in range(strip, (last + COLUMNS - 1) // COLUMNS, strips):
        column = t * COLUMNS + tl.arange(0, COLUMNS)
        scores = tl.zeros([HEADS * ROWS, COLUMNS], tl.float32)
        if whole:
            if q_places is not None:
                q_first = (q_zero + first * S).to(tl.int32)
                k_first = (k_zero + t * COLUMNS * S).to(tl.int32)
                for step in tl.range(0, S * (D // DEPTH), num_stages=STAGES):
                    s = step // (D // DEPTH)
                    d = step % (D // DEPTH) * DEPTH
                    q_tile = _cells_at(q_places, row, kv_head * GROUP + head_tile,
                                       q_first + S - 1 - s, d, S, ROWS, DEPTH)  # fmt: skip
                    k_tile = _cells_at(k_places, row, kv_head, k_first + s, d, S, COLUMNS,
                                       DEPTH)  # fmt: skip
                    scores = tl.dot(q_tile, k_tile.T, scores, input_precision="ieee")
        else:
            head = (kv_head * GROUP + group_head).to(tl.int64)
            q_cell = q + row * q_row + head * q_head + (q_zero + cell.to(tl.int64) * S) * q_token
            k_cell = k + row * k_row + kv_head.to(tl.int64) * k_head
            k_cell += (k_zero + column.to(tl.int64) * S) * k_token
            for step in tl.range(0, S * (D // DEPTH), num_stages=STAGES):
                s = step // (D // DEPTH)
                d = step % (D // DEPTH) * DEPTH + tl.arange(0, DEPTH)
                position = cell * S + S - 1 - s
                inside = real & (position >= past) & (position < keys)
                q_tile = tl.load(q_cell[:, None] + ((S - 1 - s) * q_token + d)[None, :],
                                 mask=inside[:, None], other=0.0)  # fmt: skip
                k_tile = tl.load(k_cell[:, None] + (s * k_token + d)[None, :],
                                 mask=(column * S + s < keys)[:, None], other=0.0)  # fmt: skip
                scores = tl.dot(q_tile, k_tile.T, scores, input_precision="ieee")

        if (t + 1) * COLUMNS > first + 1:
            scores = tl.where(column[None, :] <= cell[:, None], scores, float("-inf"))
        peak = tl.max(scores, 1) * factor
        weights = tl.math.exp2(scores * factor - peak[:, None])
        part = tl.sum(tl.reshape(weights, [HEADS * ROWS, COLUMNS // CELLS, CELLS]), 2)
        to = place * column_tiles + t
        tl.store(peaks + to, peak, mask=real)
        tl.store(totals + to, tl.sum(part, 1), mask=real)
        block = tl.arange(0, COLUMNS // CELLS)
        tl.store(parts + to[:, None] * (COLUMNS // CELLS) + block[None, :], part,
                 mask=real[:, None])  # fmt: skip


@triton.jit
def _cells_at(places, row, head, token, d, S: tl.constexpr, CELLS: tl.constexpr,
              DEPTH: tl.constexpr):  # fmt: skip
    """The tokens ``token``, ``token + S``, ...: ``[CELLS, DEPTH]`` from dimension ``d`` on."""
    # The token may be negative, where / and % would round towards zero.
    tile = places.load([row.to(tl.int32), head, token & (S - 1), token >> (S.bit_length() - 1), d])
    return tile.reshape([CELLS, DEPTH])


@triton.jit(
    do_not_specialize=["kv_heads", "first_pair", "first_row", "some_rows", "cells_at_once",
                       "column_tiles", "width"],
    do_not_specialize_on_alignment=["modes", "query_lengths", "key_lengths"],
)  # fmt: skip
def _fold(modes, query_lengths, key_lengths, peaks, totals, parts, masses, mode_row, mode_column,
          kv_heads, first_pair, first_row, some_rows, cells_at_once, column_tiles, width,
          GROUP: tl.constexpr, BLOCK: tl.constexpr, S: tl.constexpr, COLUMNS: tl.constexpr,
          CHUNK: tl.constexpr, TILES: tl.constexpr):  # fmt: skip
    """The masses of ``CHUNK`` key blocks for one row block of one query head.

    Each row's parts are brought from their tile's peak to the row's, divided by the row's total,
    and added up over the rows that have a query. Reads what ``_score`` wrote once.
    """
    CELLS: tl.constexpr = BLOCK // S
    PARTS: tl.constexpr = COLUMNS // CELLS
    chunks = (width + CHUNK - 1) // CHUNK
    chunk = tl.program_id(0) % chunks
    some_row = tl.program_id(0) // chunks % some_rows
    some_head = tl.program_id(0) // chunks // some_rows
    pair = first_pair + some_head // GROUP
    queries, keys = _lengths(modes, query_lengths, key_lengths, mode_row, mode_column,
                             pair // kv_heads, pair % kv_heads)  # fmt: skip
    past = keys - queries
    row_block = past // BLOCK + first_row + some_row
    if (queries == 0) | (row_block * BLOCK >= keys) | (chunk * CHUNK > row_block):
        return

    r = tl.arange(0, CELLS)
    cell = row_block * CELLS + r
    votes = (cell * S + S > past) & (cell * S < keys)
    place = (some_head.to(tl.int64) * cells_at_once + some_row * CELLS + r) * column_tiles
    peak = tl.full([CELLS], float("-inf"), tl.float32)
    total = tl.zeros([CELLS], tl.float32)
    for start in range(0, row_block * CELLS // COLUMNS + 1, TILES):
        tile = start + tl.arange(0, TILES)
        at = place[:, None] + tile[None, :]
        # A row's tiles are those that begin at its own cell or before.
        seen = votes[:, None] & (tile[None, :] * COLUMNS <= cell[:, None])
        others = tl.load(peaks + at, mask=seen, other=float("-inf"))
        new = tl.where(votes, tl.maximum(peak, tl.max(others, 1)), 0.0)
        sums = tl.load(totals + at, mask=seen, other=0.0) * tl.math.exp2(others - new[:, None])
        total = total * tl.math.exp2(peak - new) + tl.sum(sums, 1)
        peak = new

    block = chunk * CHUNK + tl.arange(0, CHUNK)
    at = place[:, None] + (block // PARTS)[None, :]
    seen = votes[:, None] & (block <= row_block)[None, :]
    part = tl.load(parts + at * PARTS + (block % PARTS)[None, :], mask=seen, other=0.0)
    fade = tl.math.exp2(tl.load(peaks + at, mask=seen, other=0.0) - peak[:, None])
    share = part * fade / tl.where(votes, total, 1.0)[:, None]
    mass = tl.sum(tl.where(seen, share, 0.0), 0)
    to = masses + (some_head.to(tl.int64) * (cells_at_once // CELLS) + some_row) * width + block
    tl.store(to, mass, mask=block <= row_block)


@triton.jit(
    do_not_specialize=["kv_heads", "first_pair", "first_row", "some_rows", "rows", "rows_at_once",
                       "width"],
    do_not_specialize_on_alignment=["modes", "query_lengths", "key_lengths"],
)  # fmt: skip
def _choose(modes, query_lengths, key_lengths, masses, thresholds, indices, counts, mode_row,
            mode_column, kv_heads, first_pair, first_row, some_rows, rows, rows_at_once, width,
            GROUP: tl.constexpr, BLOCK: tl.constexpr, CHUNK: tl.constexpr):  # fmt: skip
    """List the blocks of one row block of one query head.

    Block 0 and the diagonal are forced. Taken from the heaviest down, the others reach the
    threshold at some mass: all that are heavier are chosen, and as many of that very mass, the
    earlier ones, as are needed. Floats that are not negative are ordered as their bits are, so 31
    bisections find that mass exactly; each reads the row again, from the nearest cache.
    """
    some_row = tl.program_id(0) % some_rows
    some_head = tl.program_id(0) // some_rows
    pair = first_pair + some_head // GROUP
    head = pair % kv_heads * GROUP + some_head % GROUP
    queries, keys = _lengths(modes, query_lengths, key_lengths, mode_row, mode_column,
                             pair // kv_heads, pair % kv_heads)  # fmt: skip
    diagonal = (keys - queries) // BLOCK + first_row + some_row
    to = (first_pair * GROUP + some_head).to(tl.int64) * rows + first_row + some_row
    if (queries == 0) | (diagonal * BLOCK >= keys):
        tl.store(counts + to, 0)
        return

    masses += (some_head.to(tl.int64) * rows_at_once + some_row) * width
    forced = tl.load(masses) + tl.load(masses + diagonal, mask=diagonal > 0, other=0.0)
    total = forced
    for start in range(0, diagonal, CHUNK):
        block = start + tl.arange(0, CHUNK)
        other = (block > 0) & (block < diagonal)
        total += tl.sum(tl.load(masses + block, mask=other, other=0.0))
    threshold = tl.load(thresholds + head)
    # For a threshold of 1, rounding could leave the sum short of itself.
    required = tl.where(threshold < 1, threshold * total, float("inf"))

    low = 0  # the others whose bits are at least this are enough
    high = 0x7F800000  # those from here on are not: infinity, to begin with
    kept = forced  # with the others from `high` on
    for _ in range(31):
        middle = low + (high - low) // 2
        reached = forced
        for start in range(0, diagonal, CHUNK):
            block = start + tl.arange(0, CHUNK)
            other = (block > 0) & (block < diagonal)
            mass = tl.load(masses + block, mask=other, other=0.0)
            reached += tl.sum(tl.where(mass.to(tl.int32, bitcast=True) >= middle, mass, 0.0))
        enough = reached >= required
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
        kept = tl.where(enough, kept, reached)

    equals = 0
    count = 0
    for start in range(0, diagonal + 1, CHUNK):
        block = start + tl.arange(0, CHUNK)
        other = (block > 0) & (block < diagonal)
        mass = tl.load(masses + block, mask=other, other=0.0)
        bits = mass.to(tl.int32, bitcast=True)
        equal = (other & (bits == low)).to(tl.int32)
        before = equals + tl.cumsum(equal, 0) - equal
        chosen = other & (bits > low) | (equal == 1) & (kept + before * mass < required)
        chosen |= (block == 0) | (block == diagonal)
        order = count + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(indices + to * width + order, block.to(indices.dtype.element_ty), mask=chosen)
        equals += tl.sum(equal)
        count += tl.sum(chosen.to(tl.int32))
    tl.store(counts + to, count)
