"""How the Hopper kernels read and write tensors: descriptors on the host, copies on the device."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

__all__ = [
    "BLOCK",
    "DTYPES",
    "ROWS",
    "copy",
    "copy_masked",
    "copyable",
    "descriptor",
    "load_values",
    "processors",
    "store",
    "strides_by_8",
]

BLOCK = 128
"""Tokens of a key block and of a row tile: the block size that the kernels are made for."""
ROWS = gl.constexpr(64)
"""Rows of one consumer: what a warpgroup's tensor-core instruction takes."""
DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Newer Gluon calls both async_load; the older names were dropped in Triton 3.9.
copy = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
copy_masked = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


def copyable(x: Tensor) -> bool:
    """Whether the copy engine can read ``x`` ``[B, H, T, D]`` in 16 bits where it lies."""
    return x.data_ptr() % 16 == 0 and _fits(x.shape, x.stride())


@functools.lru_cache(maxsize=4096)
def _fits(shape: torch.Size, strides: tuple[int, ...]) -> bool:
    used = [s for s, size in zip(strides[:3], shape[:3], strict=True) if size > 1]
    return strides[3] == 1 and all(stride > 0 and stride % 8 == 0 for stride in used)


class _Descriptor(TensorDescriptor):
    """A descriptor of a :func:`copyable` tensor, which need not be looked at again."""

    def __post_init__(self) -> None:
        pass


def descriptor(x: Tensor, rows: int) -> TensorDescriptor:
    """What the copy engine needs to read ``rows`` tokens of one head of ``x`` at a time."""
    return _Descriptor(x, *_box(x.shape, x.stride(), x.dtype, rows))


@functools.lru_cache(maxsize=4096)
def _box(
    shape: torch.Size, strides: tuple[int, ...], dtype: torch.dtype, rows: int
) -> tuple[list[int], list[int], list[int], gl.NVMMASharedLayout]:
    """Shape, strides, the shape of a copy, and how that lies in shared memory."""
    dim = shape[3]
    block = [1, 1, rows, dim]
    # The stride of an axis of one entry is never used, but has to be a valid one.
    valid = [s if size > 1 else dim for s, size in zip(strides[:3], shape[:3], strict=True)]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[dtype])
    return list(shape), [*valid, 1], block, layout


def strides_by_8(x: Tensor) -> tuple[int, ...]:
    """Strides of the first three axes of a :func:`copyable` tensor, in units of 16 bytes.

    A kernel that multiplies them by 8 itself knows that they are aligned, which Triton would see of
    multiples of 32 bytes only. The stride of an axis of one entry is never used, and 0 here.
    """
    return tuple(x.stride(axis) // 8 if x.shape[axis] > 1 else 0 for axis in range(3))


@functools.cache
def processors(device: torch.device) -> int:
    """Multiprocessors of a GPU: a persistent kernel runs one program on each."""
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.jit
def load_values(base, key, stride, shared, inside, SIZE: gl.constexpr, D: gl.constexpr):
    """Copy the first ``inside`` tokens of a block to shared memory and zero the others."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // D, D // 8], [1, 1], [1, 0])
    block = shared.reshape([SIZE, D])
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    for part in gl.static_range(SIZE // 8):
        row = part * 8 + gl.arange(0, 8, gl.SliceLayout(1, layout))
        at = base + (key + row).to(gl.int64)[:, None] * stride + column[None, :]
        block.slice(part * 8, 8).store(gl.load(at, mask=(row < inside)[:, None], other=0.0))


@gluon.jit
def store(base, x, start, first, low, high, stride, D: gl.constexpr):
    """Write rows [low, high) of a tile, of which ``x`` holds ROWS from ``start`` on.

    The tile's row 0 is token ``first``. A thread writes 16 bytes; every warp keeps its 16 rows.
    """
    wide: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [2, 0], [4, 0], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [0, 64], [1, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[ROWS, 128])  # fmt: skip
    narrow: gl.constexpr = gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [4, 0], [8, 0]],
        lane_bases=[[0, 8], [0, 16], [0, 32], [1, 0], [2, 0]],
        warp_bases=[[16, 0], [32, 0]], block_bases=[], shape=[ROWS, 64])  # fmt: skip
    layout: gl.constexpr = wide if D == 128 else narrow
    x = gl.convert_layout(x, layout)
    row = start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    column = gl.arange(0, D, gl.SliceLayout(0, layout))
    at = base + (first + row).to(gl.int64)[:, None] * stride + column[None, :]
    gl.store(at, x, mask=((row >= low) & (row < high))[:, None])
