"""XAttention against its definition, written out as slowly and plainly as possible."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from elasticore import SequenceLayout, XAttention

Array = npt.NDArray[np.float64]
Lists = list[list[list[int]]]  # per head, per row block: the key blocks
CPU = torch.device("cpu")


# --- The definition ------------------------------------------------------------------------------


def slow_masses(
    q: Array, k: Array, row_block: int, block: int, stride: int, scale: float
) -> list[float]:
    """The mass of key blocks 0..row_block of one head; q ends where k does."""
    past = len(k) - len(q)
    masses = [0.0] * (row_block + 1)
    for first in range(row_block * block, (row_block + 1) * block, stride):
        if not any(past <= position < len(k) for position in range(first, first + stride)):
            continue  # a cell without a query does not vote
        scores = []
        for column in range(0, first + 1, stride):
            total = 0.0
            for s in range(stride):
                row, key = first + stride - 1 - s, column + s
                if past <= row < len(k) and key < len(k):
                    total += float(q[row - past] @ k[key])
            scores.append(total * scale / stride)
        weights = [math.exp(score - max(scores)) for score in scores]
        for index, weight in enumerate(weights):
            masses[index * stride // block] += weight / sum(weights)
    return masses


def slow_choice(masses: list[float], threshold: float) -> list[int]:
    """The sink, the diagonal, and the others from the heaviest down until there is enough."""
    chosen = {0, len(masses) - 1}
    for block in sorted(set(range(len(masses))) - chosen, key=lambda b: (-masses[b], b)):
        if sum(masses[b] for b in chosen) >= threshold * sum(masses):
            break
        chosen.add(block)
    return sorted(chosen)


def slow_lists(q: Tensor, k: Tensor, selector: XAttention, block: int, scale: float) -> Lists:
    """The lists of one sequence: q ``[Hq, Tq, D]``, k ``[Hkv, Tk, D]``."""
    past, group = k.shape[1] - q.shape[1], q.shape[0] // k.shape[0]
    rows = range(past // block, math.ceil(k.shape[1] / block))
    return [
        [
            slow_choice(
                slow_masses(
                    q[head].double().numpy(),
                    k[head // group].double().numpy(),
                    row,
                    block,
                    selector.stride,
                    scale,
                ),
                selector.threshold,
            )
            for row in rows
        ]
        for head in range(q.shape[0])
    ]


# --- What the library says -----------------------------------------------------------------------


def draw(
    seed: int, heads: int, kv_heads: int, queries: int, keys: int, dtype: torch.dtype, dim: int = 8
) -> tuple[Tensor, Tensor]:
    """Random q ``[1, heads, queries, dim]`` and k, laid out as models hand them over.

    Keys grow apart from each other, so that some blocks are much heavier than others.
    """
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, queries, heads, dim, generator=generator, dtype=torch.float64)
    k = 3 * torch.randn(1, keys, kv_heads, dim, generator=generator, dtype=torch.float64)
    return q.to(dtype).transpose(1, 2), k.to(dtype).transpose(1, 2)


def lists(
    selector: XAttention,
    q: Tensor,
    k: Tensor,
    layout: SequenceLayout | None = None,
    *,
    block: int,
    scale: float = 1.0,
) -> list[Lists]:
    """Per sequence, per head, per row block: the key blocks chosen."""
    layout = layout or SequenceLayout.dense()
    segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], CPU)
    chosen = selector.select(q, k, segments, block_size=block, scale=scale)
    indices, counts = chosen.indices.tolist(), chosen.counts.tolist()
    # A row block that is not there counts 0; every other one holds at least its diagonal.
    return [
        [
            [row[:count] for row, count in zip(rows, sizes, strict=True) if count]
            for rows, sizes in zip(*head, strict=True)
        ]
        for head in zip(indices, counts, strict=True)
    ]


def weighted(*weights: float) -> tuple[Tensor, Tensor]:
    """One head of one dimension whose query gives key ``j`` the weight ``weights[j]``."""
    k = torch.tensor(weights, dtype=torch.float64).log().reshape(1, 1, -1, 1)
    return torch.ones_like(k), k


# --- By hand -------------------------------------------------------------------------------------

WEIGHTS = (1, 4, 2, 8, 1)  # the last row: sink 1, diagonal 1, total 16


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [
        (0.1, [0, 4]),  # 2 of 16 is enough for 1.6
        (0.5, [0, 3, 4]),  # 2 + 8 >= 8
        (0.75, [0, 1, 3, 4]),  # 2 + 8 < 12 <= 2 + 8 + 4
        (0.9, [0, 1, 2, 3, 4]),  # 14 < 14.4
        (1.0, [0, 1, 2, 3, 4]),
    ],
)
def test_blocks_of_one_token_by_hand(threshold: float, expected: list[int]) -> None:
    q, k = weighted(*WEIGHTS)
    ((rows,),) = lists(XAttention(stride=1, threshold=threshold), q, k, block=1)
    assert rows[4] == expected
    assert rows[:2] == [[0], [0, 1]]  # nothing to choose from


def test_an_earlier_block_wins_a_tie() -> None:
    q, k = torch.ones(1, 1, 4, 1), torch.zeros(1, 1, 4, 1)  # every weight is exactly 1/4
    ((rows,),) = lists(XAttention(stride=1, threshold=0.75), q, k, block=1)
    assert rows[3] == [0, 1, 3]


def test_scores_run_along_the_antidiagonals() -> None:
    # Stride 2: A[i, j] = q[2i + 1] k[2j] + q[2i] k[2j + 1]. With q = (1, 0) only the second key
    # of each pair counts; along the diagonals the first would.
    q = torch.tensor([1.0, 0.0] * 4).reshape(1, 1, -1, 1).double()
    k = torch.tensor([1, 1, 8, 2, 2, 8, 1, 1.0]).log().reshape(1, 1, -1, 1).double()
    ((rows,),) = lists(XAttention(stride=2, threshold=0.7), q, k, block=2, scale=2.0)
    assert rows[3] == [0, 2, 3]  # masses 1, 2, 8, 1 of 12: block 2 outweighs block 1
    ((rows,),) = lists(XAttention(stride=2, threshold=0.7), q.flip(2), k, block=2, scale=2.0)
    assert rows[3] == [0, 1, 3]


# --- Against the definition ----------------------------------------------------------------------


@settings(max_examples=200)
@given(
    seed=st.integers(0, 2**16),
    block=st.sampled_from([32, 64, 128]),
    stride=st.sampled_from([4, 8, 16]),
    threshold=st.sampled_from([0.3, 0.8, 0.9, 0.99, 1.0]),
    keys=st.integers(1, 300),
    share=st.floats(0, 1),
)
def test_lists_are_those_of_the_definition(
    seed: int, block: int, stride: int, threshold: float, keys: int, share: float
) -> None:
    queries = max(1, round(keys * share))  # a chunk may start anywhere inside a row block
    q, k = draw(seed, 2, 1, queries, keys, torch.float64)
    selector = XAttention(stride, threshold)
    ours = lists(selector, q, k, block=block, scale=0.35)
    assert ours == [slow_lists(q[0], k[0], selector, block, 0.35)]


@pytest.mark.parametrize("block", [64, 128])
def test_the_papers_stride_and_threshold(block: int) -> None:
    # Longer than hypothesis draws, and with two KV heads.
    q, k = draw(1, 4, 2, 700, 700, torch.float64, dim=16)
    selector = XAttention()
    assert (selector.stride, selector.threshold) == (16, 0.9)
    ours = lists(selector, q, k, block=block, scale=2.0)
    assert ours == [slow_lists(q[0], k[0], selector, block, 2.0)]
    assert any(len(row) < index + 1 for head in ours[0] for index, row in enumerate(head))


@given(
    seed=st.integers(0, 2**16),
    keys=st.integers(1, 260),
    thresholds=st.tuples(*[st.floats(0.05, 1.0)] * 2),
    quirk=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
)
def test_properties_of_every_list(
    seed: int, keys: int, thresholds: tuple[float, float], quirk: bool, dtype: torch.dtype
) -> None:
    q, k = draw(seed, 2, 1, keys, keys, dtype)
    low, high = (
        lists(XAttention(8, t, quirk, chunk=128), q, k, block=16)[0] for t in sorted(thresholds)
    )
    for head in range(2):
        assert len(low[head]) == math.ceil(keys / 16)
        for row, (fewer, more) in enumerate(zip(low[head], high[head], strict=True)):
            assert fewer[0] == 0, "the sink"
            assert fewer[-1] == row, "the diagonal"
            assert all(a < b for a, b in itertools.pairwise(fewer)), "ascending, each once"
            assert set(fewer) <= set(more), "a higher threshold never drops a block"


@given(seed=st.integers(0, 2**16), keys=st.integers(33, 200), threshold=st.sampled_from([0.6, 0.9]))
def test_enough_mass_and_no_block_too_many(seed: int, keys: int, threshold: float) -> None:
    q, k = draw(seed, 1, 1, keys, keys, torch.float64)
    ((rows,),) = lists(XAttention(8, threshold), q, k, block=16, scale=0.35)
    for row, chosen in enumerate(rows):
        masses = slow_masses(q[0, 0].numpy(), k[0, 0].numpy(), row, 16, 8, 0.35)
        required = threshold * sum(masses)
        kept = sum(masses[b] for b in chosen)
        # Both sums have at most 13 terms of one softmax each.
        assert kept >= required * (1 - 64 * np.finfo(float).eps)
        added = set(chosen) - {0, row}
        if added:
            assert kept - min(masses[b] for b in added) < required


@given(seed=st.integers(0, 2**16), keys=st.integers(1, 200))
def test_threshold_one_keeps_every_block(seed: int, keys: int) -> None:
    q, k = draw(seed, 1, 1, keys, keys, torch.float32)
    ((rows,),) = lists(XAttention(8, 1.0), q, k, block=16, scale=0.1)
    assert rows == [list(range(row + 1)) for row in range(len(rows))]


# --- The same blocks, whatever the call looks like -----------------------------------------------


@given(seed=st.integers(0, 2**16), keys=st.integers(1, 300), block=st.sampled_from([32, 64, 128]))
def test_query_heads_share_a_key_head_without_repetition(seed: int, keys: int, block: int) -> None:
    q, k = draw(seed, 6, 2, keys, keys, torch.float64)
    selector = XAttention(threshold=0.7)
    repeated = lists(selector, q, k.repeat_interleave(3, 1), block=block)
    assert lists(selector, q, k, block=block) == repeated


@given(
    seed=st.integers(0, 2**16),
    keys=st.integers(1, 400),
    block=st.sampled_from([32, 64]),
    chunks=st.lists(st.integers(1, 5), min_size=1, max_size=8),
    quirk=st.booleans(),
)
def test_chunks_from_block_boundaries_choose_the_same_blocks(
    seed: int, keys: int, block: int, chunks: list[int], quirk: bool
) -> None:
    q, k = draw(seed, 2, 1, keys, keys, torch.float32)
    selector = XAttention(threshold=0.8, official_quirk=quirk, chunk=128)
    (whole,) = lists(selector, q, k, block=block)
    begin, parts = 0, [[], []]
    for blocks in itertools.cycle(chunks):
        end = min(keys, begin + blocks * block)
        (part,) = lists(selector, q[:, :, begin:end], k[:, :, :end], block=block)
        parts = [mine + more for mine, more in zip(parts, part, strict=True)]
        begin = end
        if end == keys:
            break
    assert parts == whole


@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    left=st.booleans(),
)
def test_padded_packed_and_alone_choose_the_same_blocks(
    seed: int, lengths: list[int], left: bool
) -> None:
    selector, longest = XAttention(threshold=0.8), max(lengths)
    alone = [
        draw(seed + i, 2, 1, length, length, torch.float32) for i, length in enumerate(lengths)
    ]
    expected = [lists(selector, q, k, block=32)[0] for q, k in alone]

    cumulative = torch.tensor([0, *itertools.accumulate(lengths)])
    q, k = (torch.cat([pair[i] for pair in alone], 2) for i in range(2))
    assert lists(selector, q, k, SequenceLayout.packed(cumulative), block=32) == expected

    missing = longest - torch.tensor(lengths)
    ends = (missing, missing * 0 + longest - 1) if left else (missing * 0, longest - missing - 1)
    q, k = (
        torch.cat(
            [
                torch.nn.functional.pad(
                    pair[i],
                    (0, 0, gap, 0) if left else (0, 0, 0, gap),
                    value=torch.nan,  # whoever reads padding shows it
                )
                for pair, gap in zip(alone, missing.tolist(), strict=True)
            ]
        )
        for i in range(2)
    )
    assert lists(selector, q, k, SequenceLayout.padded(*ends), block=32) == expected


def test_half_precision_is_scored_in_float32() -> None:
    q, k = draw(3, 2, 1, 300, 300, torch.bfloat16)
    selector = XAttention(threshold=0.7)
    assert lists(selector, q, k, block=32) == lists(selector, q.float(), k.float(), block=32)


def test_sequences_without_queries_have_no_lists() -> None:
    q, k = draw(4, 2, 1, 3, 90, torch.float32)
    layout = SequenceLayout.packed(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 40, 80, 90]))
    empty, one, two = lists(XAttention(), q, k, layout, block=32)
    assert empty == [[], []]
    assert [len(head) for head in one] == [1, 1]
    assert two == [[[0]], [[0]]]


# --- The released code's slip --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("threshold", "paper", "official"),
    [
        # Heaviest first the others are 3 (8), 1 (4), 2 (2), 0 (1); the diagonal has 1 of 16.
        # Block 3 always enters; block 1 if 1 < 16 τ; block 2 if 1 + 8 < 16 τ.
        (1 / 32, [0, 4], [0, 3, 4]),
        (0.5, [0, 3, 4], [0, 1, 3, 4]),
        (0.6, [0, 3, 4], [0, 1, 2, 3, 4]),
        (0.75, [0, 1, 3, 4], [0, 1, 2, 3, 4]),
    ],
)
def test_slip_of_the_first_chunk_by_hand(
    threshold: float, paper: list[int], official: list[int]
) -> None:
    q, k = weighted(*WEIGHTS)
    right, slip = (
        XAttention(stride=1, threshold=threshold, official_quirk=quirk, chunk=8)
        for quirk in (False, True)
    )
    assert lists(right, q, k, block=1)[0][0][4] == paper
    assert lists(slip, q, k, block=1)[0][0][4] == official
    # After the first chunk the released code follows the paper.
    later = dataclasses.replace(slip, chunk=4)
    assert lists(later, q, k, block=1)[0][0][4] == paper


def test_the_slip_counts_the_sink_as_one_of_the_others() -> None:
    # The sink is the heaviest: it takes the free first place, and the next one enters too.
    q, k = weighted(8, 4, 2, 1, 1)
    slip = XAttention(stride=1, threshold=0.5, official_quirk=True, chunk=8)
    assert lists(slip, q, k, block=1)[0][0][4] == [0, 1, 4]
    assert lists(dataclasses.replace(slip, official_quirk=False), q, k, block=1)[0][0][4] == [0, 4]


@given(seed=st.integers(0, 2**16), keys=st.integers(1, 300))
def test_later_chunks_follow_the_paper(seed: int, keys: int) -> None:
    q, k = draw(seed, 2, 1, keys, keys, torch.float32)
    right = lists(XAttention(threshold=0.7), q, k, block=32)[0]
    slip = lists(XAttention(threshold=0.7, official_quirk=True, chunk=128), q, k, block=32)[0]
    for ours, official in zip(right, slip, strict=True):
        assert official[4:] == ours[4:]
        assert all(set(a) <= set(b) for a, b in zip(ours[:4], official[:4], strict=True))


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stride": 0}, ValueError, "stride must be a power of two"),
        ({"stride": 12}, ValueError, "stride must be a power of two"),
        ({"stride": 16.0}, TypeError, "stride must be an int"),
        ({"stride": True}, TypeError, "stride must be an int"),
        ({"chunk": 1000}, ValueError, "chunk must be a power of two"),
        ({"chunk": None}, TypeError, "chunk must be an int"),
        ({"threshold": 0}, ValueError, r"threshold must be in \(0, 1\]"),
        ({"threshold": 1.5}, ValueError, r"threshold must be in \(0, 1\]"),
        ({"threshold": float("nan")}, ValueError, r"threshold must be in \(0, 1\]"),
        ({"threshold": "0.9"}, TypeError, "threshold must be a float"),
        ({"threshold": True}, TypeError, "threshold must be a float"),
        ({"official_quirk": 1}, TypeError, "official_quirk must be a bool"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        XAttention(**arguments)


def test_the_stride_must_divide_the_block() -> None:
    XAttention(stride=32).check(64)
    with pytest.raises(ValueError, match="stride=32 must divide block_size=16"):
        XAttention(stride=32).check(16)
