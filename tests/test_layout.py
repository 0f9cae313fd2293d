"""Layouts by hand: which queries and keys each sequence owns."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore import SequenceLayout

CPU = torch.device("cpu")


def ints(*values: int) -> torch.Tensor:
    return torch.tensor(values)


def lowered(
    layout: SequenceLayout, batch: int, queries: int, keys: int
) -> list[tuple[int, int, int, int, int]]:
    """(row, query_start, query_length, key_start, key_length) of each sequence."""
    segments = layout.segments(batch, queries, keys, CPU)
    assert all(field.dtype == torch.int64 for field in segments)
    return [tuple(values) for values in torch.stack(segments, 1).tolist()]


def test_dense_rows_own_everything() -> None:
    layout = SequenceLayout.dense()
    assert layout.device is None
    assert layout.sequences(3) == 3
    assert lowered(layout, 2, 5, 5) == [(0, 0, 5, 0, 5), (1, 0, 5, 0, 5)]


def test_dense_queries_are_the_last_positions() -> None:
    # 3 queries of 8 keys sit at positions 5, 6, 7: key_length - query_length + i.
    assert lowered(SequenceLayout.dense(), 1, 3, 8) == [(0, 0, 3, 0, 8)]


def test_left_padding() -> None:
    # Row 1 has padding at 0, 1, 2.
    layout = SequenceLayout.padded(ints(0, 3), ints(7, 7))
    assert layout.sequences(2) == 2
    assert lowered(layout, 2, 8, 8) == [(0, 0, 8, 0, 8), (1, 3, 5, 3, 5)]


def test_right_padding() -> None:
    layout = SequenceLayout.padded(ints(0, 0), ints(7, 4))
    assert lowered(layout, 2, 8, 8) == [(0, 0, 8, 0, 8), (1, 0, 5, 0, 5)]


def test_padding_on_both_sides() -> None:
    assert lowered(SequenceLayout.padded(ints(2), ints(5)), 1, 8, 8) == [(0, 2, 4, 2, 4)]


def test_left_padded_decoding() -> None:
    # The one query is the last key of each row.
    layout = SequenceLayout.padded(ints(0, 6), ints(9, 9))
    assert lowered(layout, 2, 1, 10) == [(0, 0, 1, 0, 10), (1, 0, 1, 6, 4)]


def test_left_padding_that_reaches_into_the_chunk() -> None:
    # Queries sit at 6..9; row 1 begins at 8, so its first two queries are padding.
    layout = SequenceLayout.padded(ints(0, 8), ints(9, 9))
    assert lowered(layout, 2, 4, 10) == [(0, 0, 4, 0, 10), (1, 2, 2, 8, 2)]


def test_right_padded_chunk_leaves_short_rows_without_queries() -> None:
    # Queries sit at 6..9; row 1 ends at 6, row 2 ended at 3, before the chunk.
    layout = SequenceLayout.padded(ints(0, 0, 0), ints(9, 6, 3))
    assert lowered(layout, 3, 4, 10) == [(0, 0, 4, 0, 10), (1, 0, 1, 0, 7), (2, 0, 0, 0, 4)]


def test_row_that_begins_after_the_chunk_has_nothing() -> None:
    # A left-padded first chunk: queries sit at 0..3, row 1 begins at 5.
    layout = SequenceLayout.padded(ints(0, 5), ints(7, 7), query_offset=ints(0, 0))
    assert lowered(layout, 2, 4, 8) == [(0, 0, 4, 0, 4), (1, 4, 0, 5, 0)]


def test_static_cache_keys_beyond_the_queries_are_left_out() -> None:
    # 16 places, filled up to 6 and 9; the two queries sit at 5, 6 and 8, 9.
    layout = SequenceLayout.padded(ints(0, 2), ints(15, 9), query_offset=ints(5, 8))
    assert lowered(layout, 2, 2, 16) == [(0, 0, 2, 0, 7), (1, 0, 2, 2, 8)]


def test_empty_row_has_no_query_and_no_key() -> None:
    layout = SequenceLayout.padded(ints(0, 4), ints(3, 2))
    assert lowered(layout, 2, 4, 4) == [(0, 0, 4, 0, 4), (1, 4, 0, 4, 0)]


def test_attention_mask_left_right_and_empty_rows() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]])
    for same in (mask, mask.bool(), mask.float(), mask.to(torch.int8)):
        layout = SequenceLayout.from_attention_mask(same)
        assert layout.kind == "padded"
        rows = lowered(layout, 4, 4, 4)
        assert rows[:3] == [(0, 2, 2, 2, 2), (1, 0, 3, 0, 3), (2, 0, 4, 0, 4)]
        assert (rows[3][2], rows[3][4]) == (0, 0)


def test_attention_mask_with_query_offset() -> None:
    mask = torch.tensor([[0, 1, 1, 0, 0, 0]])  # a static cache of 6 places, two of them filled
    layout = SequenceLayout.from_attention_mask(mask, query_offset=ints(2))
    assert lowered(layout, 1, 1, 6) == [(0, 0, 1, 1, 2)]


def test_attention_mask_with_a_hole_names_its_rows() -> None:
    mask = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1], [0, 1, 0, 1]])
    with pytest.raises(ValueError, match=r"mask has padding between valid tokens in rows \[1, 2\]"):
        SequenceLayout.from_attention_mask(mask)


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0.0, -1e9]]),  # additive: bool() of it would be the wrong way round
        torch.tensor([[1, 1, 2, 2]]),  # numbers of packed sequences
        torch.tensor([[1.0, float("nan")]]),
    ],
)
def test_attention_mask_of_another_kind_is_refused(mask: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="mask must be 1 "):
        SequenceLayout.from_attention_mask(mask)


def test_packed_with_sequences_of_zero_and_one_token() -> None:
    layout = SequenceLayout.packed(ints(0, 4, 4, 5, 8).to(torch.int32))
    assert layout.sequences(1) == 4
    assert layout.device == CPU
    assert lowered(layout, 1, 8, 8) == [
        (0, 0, 4, 0, 4),
        (0, 4, 0, 4, 0),
        (0, 4, 1, 4, 1),
        (0, 5, 3, 5, 3),
    ]


def test_packed_with_fewer_queries_than_keys() -> None:
    # One token is decoded for the first, none for the second, a chunk of 3 for the third.
    layout = SequenceLayout.packed(ints(0, 1, 1, 4), ints(0, 10, 15, 20))
    assert lowered(layout, 1, 4, 20) == [(0, 0, 1, 0, 10), (0, 1, 0, 10, 5), (0, 1, 3, 15, 5)]


def test_packed_tail_belongs_to_no_sequence() -> None:
    layout = SequenceLayout.packed(ints(0, 3), ints(0, 6))
    layout.check(1, 4, 8, CPU)
    assert lowered(layout, 1, 4, 8) == [(0, 0, 3, 0, 6)]


@given(data=st.data(), keys=st.integers(1, 12))
def test_padded_layout_against_counting(data: st.DataObject, keys: int) -> None:
    """Each token of a mask is walked one by one; the lowering must own exactly those."""
    first = data.draw(st.integers(0, keys), label="first")
    last = data.draw(st.integers(-1, keys - 1), label="last")
    queries = data.draw(st.integers(1, keys), label="queries")
    offset = data.draw(st.none() | st.integers(0, keys - queries), label="query_offset")
    layout = SequenceLayout.padded(
        ints(first), ints(last), None if offset is None else ints(offset)
    )
    layout.check(1, queries, keys, CPU)
    ((_, q_start, q_length, k_start, k_length),) = lowered(layout, 1, queries, keys)

    begin = keys - queries if offset is None else offset
    valid = [position for position in range(keys) if first <= position <= last]
    own_queries = [i for i in range(queries) if begin + i in valid]
    own_keys = [position for position in valid if position < begin + queries]
    assert list(range(q_start, q_start + q_length)) == own_queries
    if own_queries:
        assert list(range(k_start, k_start + k_length)) == own_keys
        # Query i sits at key_length - query_length + i of its own sequence.
        positions = [k_start + k_length - q_length + i for i in range(q_length)]
        assert positions == [begin + i for i in own_queries]
    assert 0 <= q_start <= queries
    assert k_length == len(own_keys)


@pytest.mark.parametrize(
    ("layout", "sizes", "message"),
    [
        (SequenceLayout.dense(), (1, 5, 4), "q has 5 positions and k has 4"),
        (SequenceLayout.padded(ints(0), ints(3)), (1, 5, 4), "q has 5 positions and k has 4"),
        (SequenceLayout.padded(ints(0), ints(3)), (2, 4, 4), "layout describes 1 rows"),
        (SequenceLayout.padded(ints(0), ints(4)), (1, 4, 4), r"last valid positions \[4\]"),
        (
            SequenceLayout.padded(ints(0), ints(3), ints(2)),
            (1, 3, 4),
            r"query_offset \[2\] puts the end of 3 queries beyond the 4 key",
        ),
        (SequenceLayout.packed(ints(0, 4)), (2, 4, 4), "a batch of 1 row, got 2"),
        (SequenceLayout.packed(ints(0, 4)), (1, 3, 4), "ends at query 4 and key 4"),
        (SequenceLayout.packed(ints(0, 2), ints(0, 5)), (1, 2, 4), "ends at query 2 and key 5"),
    ],
)
def test_layout_that_does_not_fit_the_batch(
    layout: SequenceLayout, sizes: tuple[int, int, int], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        layout.check(*sizes, CPU)


def test_layout_on_another_device() -> None:
    layout = SequenceLayout.padded(ints(0).to("meta"), ints(3).to("meta"))
    with pytest.raises(ValueError, match="layout is on meta but q, k and v are on cpu"):
        layout.check(1, 4, 4, CPU)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SequenceLayout.padded(ints(-1), ints(3)), r"first must be >= 0.*\[-1\]"),
        (lambda: SequenceLayout.padded(ints(0), ints(3, 3)), "last must have the shape"),
        (lambda: SequenceLayout.padded(ints(0).float(), ints(3)), "first must be an integer"),
        (lambda: SequenceLayout.padded(ints(0), ints(3).bool()), "last must be an integer"),
        (lambda: SequenceLayout.padded(ints(0), ints(3), ints(-2)), "query_offset must be >= 0"),
        (lambda: SequenceLayout.padded(ints(0), ints(3), ints(0, 1)), "query_offset must have"),
        (lambda: SequenceLayout.from_attention_mask(torch.ones(2, 1, 4, 4)), "mask must be a"),
        (lambda: SequenceLayout.from_attention_mask(torch.ones(2, 0)), "mask must be a"),
        (lambda: SequenceLayout.packed(ints(0)), "cu_queries must hold"),
        (lambda: SequenceLayout.packed(ints(1, 4)), "cu_queries must start at 0"),
        (lambda: SequenceLayout.packed(ints(0, 4, 3)), "cu_queries must start at 0 and never fall"),
        (lambda: SequenceLayout.packed(ints(0, 4), ints(0, 5, 6)), "cu_keys must have the shape"),
        (lambda: SequenceLayout.packed(ints(0, 4), ints(0, 3)), "cu_keys must give every sequence"),
        (lambda: SequenceLayout("ragged"), "kind='ragged' does not fit"),
        (lambda: SequenceLayout("packed", cu_queries=ints(0, 1)), "kind='packed' does not fit"),
    ],
)
def test_bad_constructors(make: Callable[[], SequenceLayout], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("dtype", [torch.int32, torch.float32])
def test_a_layout_made_by_hand_holds_64_bits(dtype: torch.dtype) -> None:
    ends = torch.tensor([0, 4, 9], dtype=dtype)
    with pytest.raises(ValueError, match=r"cu_queries must be an int64 tensor.*packed take any"):
        SequenceLayout("packed", cu_queries=ends, cu_keys=ends)
    if dtype is torch.int32:
        assert SequenceLayout.packed(ends).cu_keys.dtype is torch.int64  # type: ignore[union-attr]
