"""Mixing keeps shares of tokens, and order within a source."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from elasticore.data import TokenSequence
from elasticore.data.mixing import interleave


def stream(source: str, lengths: list[int]):
    for length in lengths:
        ids = np.zeros(length, np.int32)
        yield TokenSequence(ids, ids, "code", source)


def mix(lengths: dict[str, list[int]], **settings) -> list[tuple[str, int]]:
    streams = {name: stream(name, one) for name, one in lengths.items()}
    return [(one.source, len(one)) for one in interleave(streams, **settings)]


sources = st.fixed_dictionaries({name: st.lists(st.integers(1, 9)) for name in "abc"})


@given(lengths=sources)
def test_without_weights_everything_is_given_in_the_order_of_each_source(lengths):
    given_ = mix(lengths)
    for name, own in lengths.items():
        assert [length for source, length in given_ if source == name] == own


@given(a=st.integers(1, 5), b=st.integers(1, 5))
def test_weights_are_shares_of_tokens(a, b):
    given_ = mix({"a": [3] * 400, "b": [7] * 400}, weights={"a": a, "b": b})
    tokens = {name: sum(n for source, n in given_ if source == name) for name in "ab"}
    assert tokens["a"] / tokens["b"] == pytest.approx(a / b, rel=0.05)


def test_a_mixture_ends_with_its_first_source():
    given_ = mix({"a": [2] * 3, "b": [2] * 50}, weights={"a": 1, "b": 2})
    assert given_.count(("a", 2)) == 3
    assert 5 <= given_.count(("b", 2)) <= 7


@given(lengths=sources, tokens=st.integers(1, 60))
def test_the_limit_of_tokens_is_kept_and_only_cuts_the_end(lengths, tokens):
    given_ = mix(lengths, tokens=tokens)
    assert sum(length for _, length in given_) <= tokens
    assert given_ == mix(lengths)[: len(given_)]
