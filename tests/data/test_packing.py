"""Packing loses nothing, keeps to its limits and depends on the order of the items only."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticore.data import Packer

streams = st.lists(st.integers(1, 20), max_size=60)


def pack(lengths: list[int], capacity: int = 20, rows: int = 4) -> list[list[tuple[int, ...]]]:
    """Items are their own numbers, so that each can be told from all others."""
    packer: Packer[tuple[int, ...]] = Packer(capacity, rows)
    made = []
    for number, length in enumerate(lengths):
        made += packer.add((number,) * length)
    return [*made, *packer.flush()]


@given(lengths=streams, rows=st.integers(1, 6))
def test_every_item_is_in_one_row_and_whole(lengths, rows):
    items = [item for row in pack(lengths, rows=rows) for item in row]
    assert sorted(items) == [(number,) * length for number, length in enumerate(lengths)]


@given(lengths=streams, rows=st.integers(1, 6))
def test_no_row_is_empty_or_too_long(lengths, rows):
    sums = [sum(map(len, row)) for row in pack(lengths, rows=rows)]
    assert all(0 < total <= 20 for total in sums)


@given(lengths=streams)
def test_items_of_a_row_keep_their_order(lengths):
    assert all(row == sorted(row) for row in pack(lengths))


@given(lengths=streams)
def test_packing_is_deterministic(lengths):
    assert pack(lengths) == pack(lengths)


@given(lengths=streams)
def test_with_all_rows_open_two_of_them_never_fit_into_one(lengths):
    sums = sorted(sum(map(len, row)) for row in pack(lengths, rows=100))
    assert len(sums) < 2 or sums[0] + sums[1] > 20


@given(lengths=streams, rows=st.integers(1, 6))
def test_no_more_rows_are_open_than_allowed(lengths, rows):
    packer: Packer[str] = Packer(20, rows)
    for length in lengths:
        list(packer.add("x" * length))
        assert len(packer._open) <= rows


def test_an_item_that_is_too_long_is_an_error():
    with pytest.raises(ValueError, match="an item of 21 tokens does not fit a row of 20"):
        pack([21])
    with pytest.raises(ValueError, match="capacity"):
        Packer(0)
