"""InfLLM-V2 against its definition, written out as slowly and plainly as possible."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticore.patterns import InfLLMV2
from tests.patterns.calls import draw, lists
from tests.patterns.slow import slow_lists


def slow_score(selector: InfLLMV2, weights: dict[int, float], block: int) -> float:
    """The heaviest compressed key that holds a token of the block."""
    tokens = set(range(block * selector.block, (block + 1) * selector.block))
    return max(
        (
            weight
            for cell, weight in weights.items()
            if tokens & set(range(cell * selector.stride, cell * selector.stride + selector.kernel))
        ),
        default=0.0,
    )


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**16),
    keys=st.integers(1, 220),
    past=st.integers(0, 219),
    block=st.sampled_from([16, 32]),
    kernel=st.sampled_from([4, 8, 12]),
    top_k=st.integers(1, 4),
    dense=st.sampled_from([0, 64, 70, 1000]),
)
def test_it_chooses_as_defined(
    seed: int, keys: int, past: int, block: int, kernel: int, top_k: int, dense: int
) -> None:
    past = min(past, keys - 1)
    q, k = draw(seed, 4, 2, keys - past, keys, torch.float32, dim=4)
    selector = InfLLMV2(32, top_k, kernel, 4, sink=32, local=64, dense=dense)
    expected = slow_lists(
        selector,
        q[0],
        k[0],
        block,
        0.5,
        lambda weights, b: slow_score(selector, weights, b),
        count=top_k + 2,
        dense=dense,
    )
    assert lists(selector, q, k, block=block, scale=0.5) == [expected]


def test_by_hand() -> None:
    # One dimension, a compressed key for every 4 tokens; block 2 holds the heaviest of them.
    k = torch.zeros(1, 1, 80, 1)
    k[:, :, 40:44] = 4.0
    selector = InfLLMV2(16, 1, kernel=4, stride=4, sink=0, local=16, dense=0)
    ((rows,),) = lists(selector, torch.ones_like(k), k, block=16)
    assert rows == [[0], [0, 1], [0, 2], [2, 3], [2, 4]]  # equals in row 2: the earlier one
    ((rows,),) = lists(
        InfLLMV2(16, 1, kernel=4, stride=4, sink=0, local=16, dense=64),
        torch.ones_like(k),
        k,
        block=16,
    )
    assert rows == [[0], [0, 1], [0, 1, 2], [0, 1, 2, 3], [2, 4]]


def test_a_compressed_key_across_a_border_counts_for_both_blocks() -> None:
    k = torch.zeros(1, 1, 96, 1)
    k[:, :, 44:52] = 9.0  # the compressed key of tokens 44 to 51: blocks 2 and 3
    selector = InfLLMV2(16, 2, kernel=8, stride=4, sink=0, local=16, dense=0)
    ((rows,),) = lists(selector, torch.ones_like(k), k, block=16)
    assert rows[5] == [2, 3, 5]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"stride": 16.0}, TypeError, "stride must be an int"),
        ({"kernel": 40}, ValueError, "kernel must be a multiple of stride=16 tokens, got 40"),
        ({"block": 72}, ValueError, "block must be a multiple of stride=16 tokens, got 72"),
        ({"sink": 32}, ValueError, "sink must be a multiple of block=64 tokens, got 32"),
        ({"local": 100}, ValueError, "local must be a multiple of block=64 tokens, got 100"),
        ({"local": 0}, ValueError, "local must be at least 1"),
        ({"dense": -1}, ValueError, "dense must be at least 0"),
        ({"dense": None}, TypeError, "dense must be an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        InfLLMV2(**arguments)


def test_blocks_must_be_whole_blocks_of_the_plan() -> None:
    InfLLMV2().check(32)
    with pytest.raises(ValueError, match="block=64 must be a multiple of block_size=128"):
        InfLLMV2().check(128)
