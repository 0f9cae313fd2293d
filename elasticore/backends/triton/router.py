"""The Attention Router's decision in two kernel launches, whatever the sequences' lengths.

The decision reads 2 * boundary keys of each (sequence, KV head) and every weight of two MLPs, 1 MB
at head_dim 128: as PyTorch operations, some sixty launches that each take longer to start than to
run. Here a pair's MLPs are cut into slices of hidden units, one program each, so that many
multiprocessors read the weights at once. There is one launch per MLP, since the slices of an MLP
have to be added up before anything can follow.

:class:`~elasticore.router.AttentionRouter` stays the definition: it asks :func:`supports`, and runs
its modules where the answer is no.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from elasticore.backends.triton.arguments import next_power_of_two
from elasticore.backends.triton.launch import aligned, integers, launch
from elasticore.layout import Segments

__all__ = ["route", "supports"]

SLICE = 32
"""Hidden units of one program."""
POOLED = 65536
"""Key values that one program can hold: slots (a power of two) times ``head_dim``."""
KEY_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def supports(
    keys: Tensor, boundary: int, parameters: Sequence[Tensor], calibration: Sequence[Tensor] = ()
) -> bool:
    """Whether :func:`route` can decide this call; reads no values.

    Parameters
    ----------
    keys, boundary
        As :func:`route` takes them.
    parameters
        Weight and bias of five linear layers, in their order.
    calibration
        Scale and shift of pooled keys, or nothing.
    """
    # Subclasses (fake, sharded or quantised tensors) have no memory that a kernel could read.
    if type(keys) is not Tensor or keys.ndim != 4 or keys.dtype not in KEY_DTYPES:
        return False
    dim, device = keys.shape[3], keys.device
    if dim not in (32, 64, 128, 256) or _slots(boundary) * dim > POOLED:
        return False
    hidden = parameters[0].shape[0]
    up, down = ((hidden, dim), (hidden,)), ((dim, hidden), (dim,))
    shapes = [*up, *down, *up, *down, (2, dim), (2,)]
    shapes += [tuple(keys.shape[2:])] * len(calibration)
    return hidden % SLICE == 0 and all(
        type(p) in (nn.Parameter, Tensor)
        and p.dtype is torch.float32
        and p.shape == shape
        and p.device == device
        and p.is_contiguous()
        for p, shape in zip([*parameters, *calibration], shapes, strict=True)
    )


def route(
    keys: Tensor,
    segments: Segments,
    boundary: int,
    parameters: list[Tensor],
    calibration: list[Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Decide for every sequence and KV head; call it only where :func:`supports` says yes.

    Never waits for the device, and reads no keys but the first and the last ``boundary`` of each
    sequence. The result of a sequence is the same bit for bit alone, padded or packed. There is no
    gradient.

    Parameters
    ----------
    keys
        Key states before rotary embedding: bfloat16, float16 or float32 ``[B, T, Hkv, D]``, any
        strides.
    segments
        Where the sequences lie, on the keys' device; only ``row``, ``key_start`` and ``key_length``
        are read.
    boundary
        Tokens pooled at each end.
    parameters
        Weight and bias of the linear layers D → H → D (task MLP) and D → H → D → 2 (router MLP),
        float32.
    calibration
        Scale and shift of pooled keys, float32 ``[Hkv, D]``; None or empty for neither.

    Returns
    -------
    decisions, logits : Tensor
        int8 ``[sequences, Hkv]``, 1 = sparse, and float32 ``[sequences, Hkv, 2]``.
    """
    # A compiler sees one operation; in between, PyTorch's dispatch would cost as much as a launch.
    run = _operation if torch.compiler.is_compiling() else _launch
    places = segments.row, segments.key_start, segments.key_length
    return run(keys, *places, boundary, parameters, calibration or [])


def _launch(
    keys: Tensor,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    boundary: int,
    parameters: list[Tensor],
    calibration: list[Tensor],
) -> tuple[Tensor, Tensor]:
    if keys.is_cuda and keys.device.index != torch.cuda.current_device():
        with torch.cuda.device(keys.device):  # Triton launches on the current one
            return _launch(keys, row, start, length, boundary, parameters, calibration)
    decisions, logits = _outputs(keys, row)
    dim, pairs, slices = keys.shape[3], decisions.numel(), parameters[0].shape[0] // SLICE
    if pairs == 0:
        return decisions, logits
    task, final = (keys.new_empty(pairs, slices, dim, dtype=torch.float32) for _ in range(2))
    finished = keys.new_empty(pairs, dtype=torch.int32)
    up, up_bias, down, down_bias, *router = parameters
    scale, shift = calibration or (None, None)
    places = row.contiguous(), start.contiguous(), length.contiguous()
    slots = _slots(boundary)
    sizes = dim, slices, SLICE
    key = (
        *(keys.device, keys.dtype, row.dtype, start.dtype, length.dtype, boundary, sizes),
        *(aligned(keys, *places, *parameters, *calibration), integers(*keys.stride())),
    )
    launch(
        _task_slice,
        (pairs, slices),
        (
            *(keys, *places, *keys.stride(), keys.shape[2], scale, shift, up, up_bias, down),
            *(task, finished, boundary, slots, *sizes),
        ),
        key,
        num_warps=min(max(slots * dim // 4096, 4), 16),
    )
    launch(
        _router_slice,
        (pairs, slices),
        (task, down_bias, *router, final, finished, logits, decisions, *sizes),
        key,
        num_warps=max(dim // 32, 4),
    )
    return decisions, logits


_operation = torch.library.custom_op("elasticore::route", _launch, mutates_args=())


@_operation.register_fake
def _fake(
    keys: Tensor,
    row: Tensor,
    start: Tensor,
    length: Tensor,
    boundary: int,
    parameters: list[Tensor],
    calibration: list[Tensor],
) -> tuple[Tensor, Tensor]:
    return _outputs(keys, row)


def _outputs(keys: Tensor, row: Tensor) -> tuple[Tensor, Tensor]:
    shape = row.shape[0], keys.shape[2]
    logits = keys.new_empty(*shape, 2, dtype=torch.float32)
    return keys.new_empty(shape, dtype=torch.int8), logits


def _slots(boundary: int) -> int:
    return next_power_of_two(2 * boundary)


@triton.jit(do_not_specialize=["kv_heads"])
def _task_slice(keys, row, start, length, stride_b, stride_t, stride_h, stride_d, kv_heads,
                scale, shift, up, up_bias, down, parts, finished, BOUNDARY: tl.constexpr,
                SLOTS: tl.constexpr, DIM: tl.constexpr, SLICES: tl.constexpr,
                SLICE: tl.constexpr):  # fmt: skip
    """Pool a pair's keys, then one slice of the task MLP's hidden units.

    Every slice pools for itself: only the first reads the keys from memory, the others find them in
    L2, and a launch of its own would take longer. FLOPs: 4 * SLICE * DIM. Bytes: 8 * SLICE * DIM of
    weights and 2 * BOUNDARY keys.
    """
    pair, index = tl.program_id(0), tl.program_id(1)
    if index == 0:
        tl.store(finished + pair, 0)  # for the launch that follows
    sequence = pair // kv_heads
    tokens = tl.load(length + sequence).to(tl.int64)
    keys += tl.load(row + sequence).to(tl.int64) * stride_b
    keys += tl.load(start + sequence).to(tl.int64) * stride_t
    keys += (pair % kv_heads).to(tl.int64) * stride_h
    # All loads are under way before the first addition waits for one. Weights come second: loaded
    # before the keys, Triton 3.9 gives them the layout of the pooled keys, which spills.
    ends = _both_ends(keys, tokens, stride_t, stride_d, BOUNDARY, SLOTS, DIM)
    weights = _weights(up, up_bias, down, index, DIM, SLICES, SLICE)
    pooled = _mean(ends, tokens, BOUNDARY, SLOTS, DIM)
    if scale is not None:
        place = (pair % kv_heads) * DIM + tl.arange(0, DIM)
        pooled = pooled * tl.load(scale + place) + tl.load(shift + place)
    _add_slice(pooled, weights, parts, pair, index, DIM, SLICES)


@triton.jit
def _router_slice(task, task_bias, up, up_bias, down, down_bias, last, last_bias, parts, finished,
                  logits, decisions, DIM: tl.constexpr, SLICES: tl.constexpr,
                  SLICE: tl.constexpr):  # fmt: skip
    """One slice of the router MLP's hidden units; the last slice of a pair to finish decides it.

    FLOPs: 4 * SLICE * DIM. Bytes: 8 * SLICE * DIM of weights, 4 * SLICES * DIM of the task MLP.
    """
    pair, index = tl.program_id(0), tl.program_id(1)
    weights = _weights(up, up_bias, down, index, DIM, SLICES, SLICE)
    x = _sum_slices(task, task_bias, pair, DIM, SLICES)
    _add_slice(x, weights, parts, pair, index, DIM, SLICES)
    # Every thread has stored its part before the slice counts as finished.
    tl.debug_barrier()
    if tl.atomic_add(finished + pair, 1, sem="acq_rel") == SLICES - 1:
        column = tl.arange(0, DIM)
        retrieval, retrieval_bias = tl.load(last + column), tl.load(last_bias)
        sparse, sparse_bias = tl.load(last + DIM + column), tl.load(last_bias + 1)
        x = _silu(_sum_slices(parts, down_bias, pair, DIM, SLICES))
        retrieval = tl.sum(x * retrieval) + retrieval_bias
        sparse = tl.sum(x * sparse) + sparse_bias
        tl.store(logits + 2 * pair.to(tl.int64), retrieval)
        tl.store(logits + 2 * pair.to(tl.int64) + 1, sparse)
        tl.store(decisions + pair, (sparse >= retrieval).to(tl.int8))


@triton.jit
def _both_ends(keys, tokens, stride_t, stride_d, BOUNDARY: tl.constexpr, SLOTS: tl.constexpr,
               DIM: tl.constexpr):  # fmt: skip
    """The pooled keys of one head as float32 [SLOTS, DIM], in the order in which _mean adds them.

    pool_boundary adds a list by halves: entry i gains entry half + i, and where the length is odd,
    the last entry becomes entry ``half`` as it is. _mean does the same with all lengths a power of
    two. So bit j of a row says whether it is the second addend of the j-th addition from the end;
    followed back from there, the bits lead to the row's entry of the list. An addition that the
    list does not have gets -0.0, which changes no bit of the other addend.
    """
    LEVELS: tl.constexpr = SLOTS.bit_length() - 1
    row = tl.arange(0, SLOTS)
    slot = tl.zeros_like(row)
    for level in tl.static_range(LEVELS):
        # This addition's list: 2 * BOUNDARY entries, halved LEVELS - 1 - level times, rounded up.
        half = (((2 * BOUNDARY - 1) >> (LEVELS - 1 - level)) + 1) // 2
        second = ((row >> level) & 1) == 1
        alone = slot == half
        slot = tl.where(second | alone, tl.where(second & alone, 2 * BOUNDARY, slot + half), slot)
    exists = slot < 2 * BOUNDARY
    position = slot + tl.where(slot < BOUNDARY, 0, tl.maximum(tokens - 2 * BOUNDARY, 0))
    x = tl.load(
        keys + position[:, None] * stride_t + tl.arange(0, DIM)[None, :] * stride_d,
        mask=(exists & (position < tokens))[:, None],
        other=0.0,
    )
    # Written as -0.0, Triton would take it for 0.0.
    nothing = tl.full((1, 1), -(2**31), tl.int32).to(tl.float32, bitcast=True)
    return tl.where(exists[:, None], x.to(tl.float32), nothing)


@triton.jit
def _mean(x, tokens, BOUNDARY: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr):
    """Add the rows of x, the second half to the first until one is left: float32 [DIM]."""
    for level in tl.static_range(SLOTS.bit_length() - 1):
        x = tl.sum(tl.reshape(x, (2, SLOTS >> (level + 1), DIM)), 0)
    counted = tl.maximum(tl.minimum(tokens, 2 * BOUNDARY), 1)
    return tl.div_rn(tl.reshape(x, (DIM,)), counted.to(tl.float32))


@triton.jit
def _weights(up, up_bias, down, index, DIM: tl.constexpr, SLICES: tl.constexpr,
             SLICE: tl.constexpr):  # fmt: skip
    """A slice's weights and biases inwards, [SLICE, DIM] and [SLICE], and outwards [DIM, SLICE]."""
    unit = index * SLICE + tl.arange(0, SLICE)
    column = tl.arange(0, DIM)
    inwards = tl.load(up + unit[:, None] * DIM + column[None, :])
    outwards = tl.load(down + column[:, None] * (SLICES * SLICE) + unit[None, :])
    return inwards, tl.load(up_bias + unit), outwards


@triton.jit
def _add_slice(x, weights, parts, pair, index, DIM: tl.constexpr, SLICES: tl.constexpr):
    """Store what a slice of hidden units adds to its MLP's output for the input x [DIM]."""
    inwards, bias, outwards = weights
    hidden = _silu(tl.sum(inwards * x[None, :], 1) + bias)
    part = tl.sum(outwards * hidden[None, :], 1)
    tl.store(parts + (pair.to(tl.int64) * SLICES + index) * DIM + tl.arange(0, DIM), part)


@triton.jit
def _sum_slices(parts, bias, pair, DIM: tl.constexpr, SLICES: tl.constexpr):
    """The output of an MLP from all its slices: float32 [DIM]."""
    ROWS: tl.constexpr = 16
    column = tl.arange(0, DIM)
    x = tl.load(bias + column)
    for first in range(0, SLICES, ROWS):
        index = first + tl.arange(0, ROWS)[:, None]
        part = tl.load(
            parts + (pair.to(tl.int64) * SLICES + index) * DIM + column[None, :],
            mask=index < SLICES,
            other=0.0,
            cache_modifier=".cg",  # past L1, which misses what other multiprocessors store
        )
        x += tl.sum(part, 0)
    return x


@triton.jit
def _silu(x):
    return x / (1 + tl.exp(-x))
