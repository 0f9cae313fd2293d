"""Where vLLM's CPU kernels put keys and values inside a page."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["Places"]

_BASE = 128  # numbers below it are exact in every dtype


class Places:
    """Reads keys and values out of pages whose inner order is the kernels' own.

    Each machine has its own order: keys may lie transposed, or in the tiles of its matrix units.
    It is learnt by writing a page of numbers and looking where they went.

    Parameters
    ----------
    write
        Writes keys and values ``[page_size, 1, D]`` into the page 0 of a cache of one head.
    page_size, head_dim
        Of the cache.
    dtype
        Of the cache.

    Raises
    ------
    ValueError
        If a page does not hold what was written, in any order.
    """

    def __init__(
        self,
        write: Callable[[Tensor, Tensor, Tensor], None],
        page_size: int,
        head_dim: int,
        dtype: torch.dtype,
    ) -> None:
        size = page_size * head_dim
        number = torch.arange(size)
        places = [torch.zeros(size, dtype=torch.int64) for _ in range(2)]
        unit = 1
        while unit < size:  # digit by digit
            digit = (number // unit % _BASE).to(dtype).view(page_size, 1, head_dim)
            cache = torch.zeros(1, 1, page_size, 2 * head_dim, dtype=dtype)
            write(digit, digit, cache)
            for place, half in zip(places, _halves(cache), strict=True):
                place += half[0, 0].long() * unit
            unit *= _BASE
        found = [torch.empty(size, dtype=torch.int64) for _ in range(2)]
        for place, there in zip(places, found, strict=True):
            if not torch.equal(place.sort().values, number):
                raise ValueError(
                    "vLLM's cache does not hold keys and values as they were written, so routers "
                    "cannot read them; choose a cache of the model's own dtype."
                )
            there[place] = number
        self.keys, self.values = (there.view(page_size, head_dim) for there in found)
        self.page_size = page_size

    def read(self, cache: Tensor, table: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of one sequence.

        Parameters
        ----------
        cache
            vLLM's, ``[pages, Hkv, page_size, 2 * D]``.
        table
            int ``[n]``: the sequence's pages.
        position
            int64 ``[tokens]``: which tokens.

        Returns
        -------
        tuple of Tensor
            ``[tokens, Hkv, D]`` each.
        """
        page = table.long()[position // self.page_size][:, None, None]
        head = torch.arange(cache.shape[1])[:, None]
        slot = position % self.page_size
        keys, values = _halves(cache)
        return keys[page, head, self.keys[slot][:, None]], values[
            page, head, self.values[slot][:, None]
        ]


def _halves(cache: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values as ``[pages, Hkv, page_size * D]``: the first half of a head's page, and the
    second."""
    keys, values = cache.flatten(2).chunk(2, 2)
    return keys, values
