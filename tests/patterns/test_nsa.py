"""NSA's selected branch against its definition, written out as slowly and plainly as possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticore.patterns import NSASelected
from tests.patterns.calls import draw, lists
from tests.patterns.slow import slow_lists


def slow_score(selector: NSASelected, weights: dict[int, float], block: int) -> float:
    """Every stride of the block counts with all compressed keys that hold it."""
    total = 0.0
    for first in range(block * selector.block, (block + 1) * selector.block, selector.stride):
        for cell, weight in weights.items():
            start = cell * selector.stride
            if start <= first < start + selector.kernel:
                total += weight
    return total


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    keys=st.integers(1, 220),
    past=st.integers(0, 219),
    block=st.sampled_from([16, 32]),
    kernel=st.sampled_from([4, 8, 12, 40]),
    top_k=st.integers(1, 5),
)
def test_it_chooses_as_defined(
    seed: int, keys: int, past: int, block: int, kernel: int, top_k: int
) -> None:
    past = min(past, keys - 1)
    q, k = draw(seed, 4, 2, keys - past, keys, torch.float32, dim=4)
    selector = NSASelected(32, top_k, kernel, 4, sink=32, local=64)
    expected = slow_lists(
        selector,
        q[0],
        k[0],
        block,
        0.5,
        lambda weights, b: slow_score(selector, weights, b),
        count=top_k,
    )
    assert lists(selector, q, k, block=block, scale=0.5) == [expected]


def test_the_weights_of_the_papers_sizes() -> None:
    """Blocks of 64 and compressed keys of 32, one every 16: equation 9 counts 1, 2, 2, 2, 1."""
    weights = torch.eye(5, dtype=torch.float64)
    assert NSASelected().score(weights).tolist() == [1, 2, 2, 2, 1]


def test_many_light_keys_outweigh_a_heavy_one() -> None:
    # Of blocks 0 to 3 block 1 has the heaviest compressed key, block 2 the largest sum.
    k = torch.zeros(1, 1, 80, 1)
    k[:, :, 20:24] = 2.0
    k[:, :, 32:48] = 1.5
    selector = NSASelected(16, 2, kernel=4, stride=4, sink=0, local=16)
    ((rows,),) = lists(selector, torch.ones_like(k), k, block=16)
    assert rows[4] == [2, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": -64}, ValueError, "block must be at least 1"),
        ({"top_k": 1.5}, TypeError, "top_k must be an int"),
        ({"kernel": 40}, ValueError, "kernel must be a multiple of stride=16 tokens, got 40"),
        ({"sink": 32}, ValueError, "sink must be a multiple of block=64 tokens, got 32"),
        ({"local": 100}, ValueError, "local must be a multiple of block=64 tokens, got 100"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        NSASelected(**arguments)


def test_blocks_must_be_whole_blocks_of_the_plan() -> None:
    NSASelected().check(64)
    with pytest.raises(ValueError, match="block=64 must be a multiple of block_size=128"):
        NSASelected().check(128)
