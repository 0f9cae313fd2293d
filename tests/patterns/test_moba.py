"""MoBA against its definition, written out as slowly and plainly as possible."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elasticore.patterns import MoBA
from tests.patterns.calls import Lists, draw, lists


def slow_lists(selector: MoBA, q: Tensor, k: Tensor, block: int) -> Lists:
    """The lists of one sequence: q ``[Hq, Tq, D]``, k ``[Hkv, Tk, D]``."""
    past, group = k.shape[1] - q.shape[1], q.shape[0] // k.shape[0]
    heads = []
    for head in range(q.shape[0]):
        queries, keys = q[head].double().numpy(), k[head // group].double().numpy()
        rows = []
        for row in range(past // block, math.ceil(len(keys) / block)):
            positions = range(max(row * block, past), min((row + 1) * block, len(keys)))
            own = row * block // selector.block
            score = {}
            for b in range(own):
                mean = keys[b * selector.block : (b + 1) * selector.block].mean(0)
                score[b] = np.mean([queries[p - past] @ mean for p in positions])
            best = sorted(score, key=lambda b: (-score[b], b))[: selector.top_k - 1]
            rows.append([b for b in range(row + 1) if b * block // selector.block in {own, *best}])
        heads.append(rows)
    return heads


@given(
    seed=st.integers(0, 2**16),
    keys=st.integers(1, 300),
    past=st.integers(0, 299),
    sizes=st.sampled_from([(16, 16), (16, 32), (32, 96)]),
    top_k=st.integers(1, 5),
    heads=st.sampled_from([(1, 1), (4, 2), (2, 2)]),
)
def test_it_chooses_as_defined(
    seed: int, keys: int, past: int, sizes: tuple[int, int], top_k: int, heads: tuple[int, int]
) -> None:
    past = min(past, keys - 1)
    q, k = draw(seed, *heads, keys - past, keys, torch.float32)
    selector = MoBA(sizes[1], top_k)
    assert lists(selector, q, k, block=sizes[0]) == [slow_lists(selector, q[0], k[0], sizes[0])]


def test_by_hand() -> None:
    # One dimension; the blocks' mean keys are 1, 5, 3, 5, 0 and every query is 1.
    k = torch.tensor([1.0, 5, 3, 5, 0]).repeat_interleave(16).reshape(1, 1, -1, 1)
    ((rows,),) = lists(MoBA(16, 3), torch.ones_like(k), k, block=16)
    assert rows == [[0], [0, 1], [0, 1, 2], [1, 2, 3], [1, 3, 4]]
    ((rows,),) = lists(MoBA(16, 2), torch.ones_like(k), k, block=16)
    assert rows[4] == [1, 4]  # of two equals the earlier
    ((rows,),) = lists(MoBA(16, 2), -torch.ones_like(k), k, block=16)
    assert rows[4] == [0, 4]


def test_where_all_queries_of_a_row_are_equal_it_is_the_choice_of_each_query() -> None:
    q, k = draw(1, 4, 2, 20, 320, torch.float32)
    q = q[:, :, ::16].repeat_interleave(16, 2)[:, :, :32]
    (together,) = lists(MoBA(32, 3), q, k, block=16)
    for index in range(32):
        (alone,) = lists(MoBA(32, 3), q[:, :, index : index + 1], k[:, :, : 289 + index], block=16)
        assert [rows[0] for rows in alone] == [rows[index // 16] for rows in together]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"block": 0}, ValueError, "block must be at least 1"),
        ({"block": 64.0}, TypeError, "block must be an int"),
        ({"top_k": 0}, ValueError, "top_k must be at least 1"),
        ({"top_k": True}, TypeError, "top_k must be an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        MoBA(**arguments)


def test_blocks_must_be_whole_blocks_of_the_plan() -> None:
    MoBA().check(128)
    with pytest.raises(ValueError, match="block=64 must be a multiple of block_size=128"):
        MoBA(64).check(128)
