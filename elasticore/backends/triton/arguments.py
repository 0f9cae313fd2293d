"""What attention kernels are given beside q, k and v, in the form that a launch takes."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns import BlockLists

__all__ = [
    "DECODE_ROWS",
    "LARGE",
    "capability",
    "listing",
    "listing_shape",
    "next_power_of_two",
    "places",
    "positive_scale",
]

DECODE_ROWS = 128
"""Queries times query heads of a group up to which the decode kernel runs a call."""
LARGE = (9, 10, 11)
"""Major compute capabilities with 227 KiB of shared memory and warpgroup instructions or newer."""


@functools.cache
def capability(device: torch.device) -> int:
    """The major compute capability; the interpreter plays a Hopper GPU."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


def next_power_of_two(n: int) -> int:
    """The smallest power of two that is not below ``n``; Triton's own takes microseconds."""
    return 1 << max(n - 1, 0).bit_length()


def places(segments: Segments | None) -> tuple[Tensor | None, ...]:
    """Row, query start and length, key start and length of every sequence; None if dense."""
    if segments is None:
        return (None,) * len(Segments._fields)
    return tuple(field.contiguous() for field in segments)


def listing(lists: BlockLists | None) -> tuple[Tensor | None, Tensor | None]:
    """The indices and the counts of ``lists``."""
    if lists is None:
        return None, None
    return lists.indices.contiguous(), lists.counts.contiguous()


def listing_shape(lists: BlockLists | None) -> tuple[int, int]:
    """Lists of a head, and entries that a list has room for."""
    return (0, 0) if lists is None else (lists.indices.shape[2], lists.indices.shape[3])


def positive_scale(q: Tensor, scale: float) -> tuple[Tensor, float]:
    """The same scores with a scale above 0.

    Kernels scale a row's largest product, and -inf where they mask: both must stay so.
    """
    if scale > 0:
        return q, scale
    return q * (-1 if scale < 0 else 0), abs(scale) or 1.0
