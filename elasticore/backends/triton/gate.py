"""What the backward takes from the outputs: each row's dO · O, and the gate's own gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from elasticore.backends.triton.arguments import places
from elasticore.backends.triton.schedule import schedule
from elasticore.backends.triton.tiles import load_rows, locate
from elasticore.layout import Segments
from elasticore.patterns import HeadMode

__all__ = ["gate_gradient", "row_sums"]


def row_sums(
    out: Tensor,
    other: Tensor | None,
    grad: Tensor,
    modes: Tensor,
    segments: Segments | None,
    *,
    keys: int,
    sparse: HeadMode,
    block_size: int,
) -> tuple[Tensor, Tensor | None]:
    """``rowsum(dO * O)`` and ``rowsum(dO * (O_sparse - O_retrieval))``.

    Parameters
    ----------
    out, other
        ``[B, Hq, Tq, D]`` of the modes that were chosen, and of those that were not; ``other`` is
        None where the gate wants no gradient.
    grad
        dO, ``[B, Hq, Tq, D]``, a unit stride last.
    modes
        int8 ``[sequences, Hkv]``: what was chosen.
    keys
        ``Tk``.
    sparse
        The mode in which ``out`` is O_sparse.

    Returns
    -------
    delta, difference
        float32 ``[B, Hq, Tq]``, undefined at queries of no sequence; ``difference`` is None
        without ``other``.
    """
    batch, heads, queries, head_dim = out.shape
    kv_heads = modes.shape[1]
    delta = out.new_empty(out.shape[:3], dtype=torch.float32)
    difference = None if other is None else torch.empty_like(delta)
    rows = min(block_size, 64)
    work = schedule(
        modes,
        segments,
        batch=batch,
        queries=queries,
        keys=keys,
        tile=rows,
        block_size=block_size,
        sink=0,  # what heads read plays no part
        local=1,
    )
    _row_sums[(work.tiles.shape[0] * (heads // kv_heads),)](
        out, other, grad, delta, difference,
        modes.contiguous(), *places(segments), work.tiles, work.total,
        *out.stride()[:3], *(out if other is None else other).stride()[:3], *grad.stride()[:3],
        queries, keys, kv_heads, int(sparse),
        GROUP=heads // kv_heads, DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
        ROWS=rows, num_warps=4,
    )  # fmt: skip
    return delta, difference


def gate_gradient(
    difference: Tensor, segments: Segments | None, *, sequences: int, kv_heads: int
) -> Tensor:
    """``difference`` ``[B, Hq, Tq]`` summed per sequence and KV head: float32 ``[S, Hkv]``."""
    _, heads, queries = difference.shape
    result = difference.new_empty(sequences, kv_heads)
    _gate_sums[(sequences * kv_heads,)](
        difference, result, *places(segments), queries, queries, kv_heads,
        GROUP=heads // kv_heads, CHUNK=1024, num_warps=4,
    )  # fmt: skip
    return result


@triton.jit(
    do_not_specialize=["queries", "keys", "kv_heads", "sparse"],
    do_not_specialize_on_alignment=[
        "modes", "batch_rows", "query_starts", "query_lengths", "key_starts", "key_lengths",
    ],
)  # fmt: skip
def _row_sums(
    out, other, grad, delta, difference,
    modes, batch_rows, query_starts, query_lengths, key_starts, key_lengths, tiles, total,
    out_batch, out_head, out_token, other_batch, other_head, other_token,
    grad_batch, grad_head, grad_token,
    queries, keys, kv_heads, sparse,
    GROUP: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # One pass over the outputs and their gradient. FLOPs: 4 * D per row, next to nothing. Bytes:
    # dO, O and the other O.
    work = tl.program_id(0) // GROUP
    if work >= tl.load(total):
        return
    pair = tl.load(tiles + 2 * work)
    position = tl.load(tiles + 2 * work + 1) * ROWS + tl.arange(0, ROWS)
    sequence = pair // kv_heads
    head = (pair % kv_heads * GROUP + tl.program_id(0) % GROUP).to(tl.int64)
    batch_row, query_start, _, key_length, past = locate(
        sequence, batch_rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys
    )
    token = query_start + position - past
    valid = (position >= past) & (position < key_length)
    grad += batch_row * grad_batch + head * grad_head
    out += batch_row * out_batch + head * out_head
    do = load_rows(grad, token, grad_token, valid, DIM, PADDED_DIM).to(tl.float32)
    chosen = load_rows(out, token, out_token, valid, DIM, PADDED_DIM).to(tl.float32)
    row = (batch_row * kv_heads * GROUP + head) * queries + token
    tl.store(delta + row, tl.sum(do * chosen, 1), valid)
    if difference is not None:
        other += batch_row * other_batch + head * other_head
        unchosen = load_rows(other, token, other_token, valid, DIM, PADDED_DIM).to(tl.float32)
        # Subtracted before the sum: where the branches agree, nothing cancels.
        sign = tl.where(tl.load(modes + pair) == sparse, 1.0, -1.0)
        tl.store(difference + row, tl.sum(do * (chosen - unchosen), 1) * sign, valid)


@triton.jit(do_not_specialize=["queries", "keys", "kv_heads"])
def _gate_sums(
    difference, result, batch_rows, query_starts, query_lengths, key_starts, key_lengths,
    queries, keys, kv_heads, GROUP: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    # One program per (sequence, KV head): its rows in a fixed order.
    pair = tl.program_id(0)
    sequence = pair // kv_heads
    batch_row, query_start, _, key_length, past = locate(
        sequence, batch_rows, query_starts, query_lengths, key_starts, key_lengths, queries, keys
    )
    acc = tl.zeros([CHUNK], tl.float32)
    for g in range(0, GROUP):
        head = (batch_row * kv_heads + pair % kv_heads) * GROUP + g
        base = difference + head * queries + query_start
        for start in range(0, key_length - past, CHUNK):
            step = start + tl.arange(0, CHUNK)
            acc += tl.load(base + step, step < key_length - past, 0.0)
    tl.store(result + pair, tl.sum(acc, 0))
