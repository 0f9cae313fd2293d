"""Pooling: one vector per KV head that stands for the whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor

from elasticore.checks import check_int
from elasticore.layout import Segments

__all__ = ["pool_boundary"]

_CHUNK = 128  # tokens per partial sum when the whole sequence is pooled


def pool_boundary(keys: Tensor, segments: Segments, boundary: int | None = 100) -> Tensor:
    """Mean of the first and the last ``boundary`` key states of every sequence.

    A sequence of at most ``2 * boundary`` tokens is pooled whole, each token once; an empty one
    gives zeros. The result of a sequence is the same bit for bit alone, padded or packed.
    Differentiable in ``keys``; never waits for the device.

    Parameters
    ----------
    keys
        Key states before rotary embedding, float ``[B, T, Hkv, D]``, any strides.
    segments
        Where the sequences lie; only ``row``, ``key_start`` and ``key_length`` are read.
    boundary
        Tokens taken from each end, or None for the mean of all tokens.

    Returns
    -------
    Tensor
        float32 ``[sequences, Hkv, D]``, summed in float32.

    Raises
    ------
    TypeError, ValueError
        If keys are not float with four axes, are on another device than the segments, or
        ``boundary`` is not None or an int of at least 1.

    Notes
    -----
    Eq. 10; Appendices D.1 and H.5. Reads ``2 * boundary`` tokens of each sequence and copies no
    others, except for ``boundary=None``, which reads all of them once.
    """
    _check(keys, segments, boundary)
    length = segments.key_length
    if keys.shape[1] == 0:
        return keys.new_zeros(length.numel(), *keys.shape[2:], dtype=torch.float32)
    if boundary is None:
        total, counted = _sum_all(keys, segments), length
    else:
        # Slots of the first half are the first tokens. Those of the second half skip the middle of
        # a long sequence; where there is no middle they go on from the first half.
        slot = torch.arange(2 * boundary, device=keys.device)
        middle = (length - 2 * boundary).clamp(min=0)
        position = slot + torch.where(slot < boundary, 0, middle[:, None])
        total = _sum_at(keys, segments.row, segments.key_start, length, position)
        counted = length.clamp(max=2 * boundary)
    return total / counted.clamp(min=1)[:, None, None]


def _sum_at(values: Tensor, row: Tensor, start: Tensor, length: Tensor, position: Tensor) -> Tensor:
    """Sum ``values [B, T, ...]`` over ``position [N, slots]`` of N slices; float32 ``[N, ...]``.

    Positions from ``length`` on count as zero. The slots are added as a binary tree of elementwise
    additions: on a GPU, ``sum`` picks its order by the shape of the batch, which would change the
    last bits.
    """
    index = (start[:, None] + position).clamp(max=values.shape[1] - 1)
    beyond = (position >= length[:, None])[:, :, None, None]
    x = values[row[:, None], index].masked_fill(beyond, 0).float()
    while x.shape[1] > 1:
        half, odd = divmod(x.shape[1], 2)
        pairs = x[:, :half] + x[:, half : 2 * half]
        x = torch.cat((pairs, x[:, -1:]), 1) if odd else pairs
    return x.squeeze(1)


def _sum_all(keys: Tensor, segments: Segments) -> Tensor:
    """Sum over all tokens of every sequence, float32 ``[sequences, Hkv, D]``.

    Each round replaces runs of 128 values, counted from the sequence's own start, by their sum. The
    numbers of rounds and of runs are bounded by shapes, so that nothing is read on the host.
    """
    values = keys
    row, start, length = segments.row, segments.key_start, segments.key_length
    sequences, longest = row.numel(), keys.shape[1]
    slot = torch.arange(_CHUNK, device=keys.device)
    while True:
        runs = ((length + _CHUNK - 1) // _CHUNK).clamp(min=1)
        stop = runs.cumsum(0)
        first = stop - runs
        # ceil(l / c) <= floor(l / c) + 1 for each sequence; what the bound has too many sums to 0.
        bound = values.shape[0] * values.shape[1] // _CHUNK + sequences
        run = torch.arange(bound, device=keys.device)
        owner = torch.searchsorted(stop, run, right=True).clamp(max=sequences - 1)
        position = (run - first[owner])[:, None] * _CHUNK + slot
        values = _sum_at(values, row[owner], start[owner], length[owner], position)[None]
        row, start, length = torch.zeros_like(row), first, runs
        longest = -(-longest // _CHUNK)
        if longest == 1:  # one run per sequence, in order
            return values[0, :sequences]


def _check(keys: Tensor, segments: Segments, boundary: int | None) -> None:
    if not isinstance(keys, Tensor) or not keys.is_floating_point():
        got = keys.dtype if isinstance(keys, Tensor) else type(keys).__name__
        raise TypeError(f"keys must be a float tensor, got {got}.")
    if keys.ndim != 4:
        raise ValueError(
            f"keys must be [batch, tokens, kv_heads, head_dim], got shape {list(keys.shape)}."
        )
    if not isinstance(segments, Segments):
        raise TypeError(
            f"segments must be the Segments of a layout, got {type(segments).__name__}; see "
            "SequenceLayout.segments."
        )
    if segments.row.device != keys.device:
        raise ValueError(
            f"segments are on {segments.row.device} but keys are on {keys.device}; move them there."
        )
    check_int("boundary", boundary, 1, optional=True)
