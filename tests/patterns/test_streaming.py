"""What a STREAMING head reads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore import HeadMode, HeadPlan, SequenceLayout, Streaming
from elasticore.testing import Problem, attended


def test_the_papers_sizes() -> None:
    # Sink 128 and local 2,048 in blocks of 128: row block i reads min(i + 1, 17) blocks.
    assert Streaming() == Streaming(sink=128, local=2048)
    assert Streaming().blocks(128) == (1, 16)
    rows = torch.tensor([0, 1, 15, 16, 17, 1000])
    assert Streaming().blocks_read(rows, 128).tolist() == [1, 2, 16, 17, 17, 17]


@pytest.mark.parametrize(
    ("streaming", "block", "expected"),
    [
        (Streaming(0, 32), 32, (0, 1)),
        (Streaming(64, 32), 32, (2, 1)),
        (Streaming(128, 2048), 16, (8, 128)),
    ],
)
def test_sizes_in_blocks(streaming: Streaming, block: int, expected: tuple[int, int]) -> None:
    assert streaming.blocks(block) == expected


@given(
    sink=st.integers(0, 3),
    local=st.integers(1, 4),
    keys=st.integers(1, 150),
    data=st.data(),
)
def test_blocks_read_counts_the_blocks_of_the_definition(
    sink: int, local: int, keys: int, data: st.DataObject
) -> None:
    """Row block i reads key blocks {0..s-1} and {i-w+1..i}: count them in the token mask."""
    block, queries = 16, data.draw(st.integers(1, keys), label="queries")
    streaming = Streaming(sink * block, local * block)
    plan = HeadPlan(torch.ones(1, 1, dtype=torch.int8), sparse=streaming, block_size=block)
    q, k = torch.zeros(1, 1, queries, 1), torch.zeros(1, 1, keys, 1)
    problem = Problem(q, k, k, plan, SequenceLayout.dense(), 1.0)
    for query, mask in enumerate(attended(problem, 0, HeadMode.STREAMING)[0]):
        row_block = (keys - queries + query) // block
        read = {position // block for position in mask.nonzero().flatten().tolist()}
        window = set(range(max(0, row_block - local + 1), row_block + 1))
        assert read == window | set(range(min(sink, row_block + 1)))
        assert streaming.blocks_read(torch.tensor(row_block), block) == len(read)
        blocks = torch.arange(-(-keys // block))
        reads = streaming.reads(torch.tensor(row_block), blocks, block)
        assert set(blocks[reads].tolist()) == read


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sink": -1}, ValueError, "sink must be at least 0 tokens, got -1"),
        ({"local": 0}, ValueError, "local must be at least 1 tokens, got 0"),
        ({"sink": 128.0}, TypeError, "sink must be an int"),
        ({"sink": True}, TypeError, "sink must be an int"),
        ({"local": None}, TypeError, "local must be an int"),
    ],
)
def test_bad_sizes(arguments: dict[str, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Streaming(**arguments)


def test_a_size_that_is_no_multiple_of_the_block_names_its_neighbours() -> None:
    with pytest.raises(ValueError, match=r"local=100 is no multiple of block_size=64; use 128 or"):
        Streaming(64, 100).blocks(64)
    with pytest.raises(ValueError, match=r"sink=10 is no multiple of block_size=64; use 64, or"):
        Streaming(10, 128).blocks(64)
