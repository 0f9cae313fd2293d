"""Launching a kernel again without asking Triton what it was compiled for.

Triton looks at every argument of every launch, which takes longer than a short prompt's attention.
What its answer depends on is known to the caller; with that as the key, the compiled kernel is
found at once.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from typing import Any

from torch import Tensor

__all__ = ["aligned", "integers", "launch"]

_kernels: dict[Hashable, Any] = {}


def launch(
    function: Any, grid: tuple[int, ...], arguments: Sequence[Any], key: Hashable, **options: Any
) -> None:
    """Launch ``function`` with all its parameters, compile-time constants too, by position.

    Parameters
    ----------
    grid
        Programs along one to three axes.
    key
        Whatever the compiled kernel depends on: device, dtypes, constants, which pointers are None,
        and :func:`aligned` and :func:`integers` of what Triton may specialise.
    options
        Compile options, the same for every call with this key.
    """
    # Kernels are there as long as their module; their own hash is slow.
    place = (id(function), key)
    kernel = _kernels.get(place)
    if kernel is None:
        # In the interpreter this returns None, and every launch goes this way.
        _kernels[place] = function[grid](*arguments, **options)
    else:
        kernel[(*grid, 1, 1)[:3]](*arguments)


def aligned(*tensors: Tensor) -> tuple[bool, ...]:
    """What Triton reads off pointers: whether they are multiples of 16 bytes."""
    return tuple(tensor.data_ptr() % 16 == 0 for tensor in tensors)


@functools.lru_cache(maxsize=4096)
def integers(*values: int) -> tuple[int, ...]:
    """What Triton reads off integers: 1, a multiple of 16, and whether 32 bits hold it."""
    return tuple(
        (value == 1) | (value % 16 == 0) << 1 | (not -(2**31) <= value < 2**31) << 2
        for value in values
    )
