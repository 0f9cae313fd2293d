"""Keys and values are found in pages of any inner order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from elasticore.serving.vllm.pages import Places

PAGE, D, HEADS = 32, 64, 3


def writer(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(PAGE * D, generator=generator) for _ in range(2))  # type: ignore[return-value]


def put(orders: tuple[Tensor, Tensor], keys: Tensor, values: Tensor, cache: Tensor) -> None:
    """Write a page ``[PAGE, heads, D]`` into page 0 in an order of its own."""
    halves = cache.flatten(2).chunk(2, 2)
    for half, order, x in zip(halves, orders, (keys, values), strict=True):
        half[0, :, order] = x.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("seed", range(3))
def test_what_was_written_is_read(dtype: torch.dtype, seed: int) -> None:
    orders = writer(seed)
    places = Places(lambda k, v, cache: put(orders, k, v, cache), PAGE, D, dtype)
    keys, values = (torch.randn(5 * PAGE, HEADS, D).to(dtype) for _ in range(2))
    cache = torch.zeros(9, HEADS, PAGE, 2 * D, dtype=dtype)
    table = torch.randperm(9)[:5]
    for block, page in enumerate(table.tolist()):
        own = slice(block * PAGE, (block + 1) * PAGE)
        put(orders, keys[own], values[own], cache[page : page + 1])
    position = torch.randperm(5 * PAGE)[:40]
    found = places.read(cache, table.int(), position)
    assert torch.equal(found[0], keys[position]) and torch.equal(found[1], values[position])


def test_a_cache_that_holds_other_numbers_is_refused() -> None:
    orders = writer(0)
    with pytest.raises(ValueError, match="not hold keys and values as they were written"):
        Places(lambda k, v, cache: put(orders, k.clamp(max=9), v, cache), PAGE, D, torch.float32)
