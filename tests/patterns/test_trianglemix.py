"""TriangleMix against its definition."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elasticore import Elastic, HeadMode, HeadTable, elasticize, record
from elasticore.patterns import TriangleMix
from tests.patterns.calls import Lists, draw, lists


def slow_lists(selector: TriangleMix, past: int, keys: int, block: int) -> list[list[int]]:
    """Key block by key block: a row that holds one of the last tokens reads all."""
    rows = []
    for row in range(past // block, math.ceil(keys / block)):
        tokens = [t for t in range(row * block, (row + 1) * block) if t < keys]
        rows.append(
            [
                b
                for b in range(row + 1)
                if b * block < selector.sink
                or (row - b) * block < selector.local
                or any(t >= keys - selector.last for t in tokens)
            ]
        )
    return rows


@given(
    keys=st.integers(1, 500),
    past=st.integers(0, 499),
    sink=st.integers(0, 3),
    local=st.integers(1, 4),
    last=st.integers(1, 200),
)
def test_it_chooses_as_defined(keys: int, past: int, sink: int, local: int, last: int) -> None:
    past = min(past, keys - 1)
    selector = TriangleMix(16 * sink, 16 * local, last)
    q, k = draw(0, 4, 2, keys - past, keys, torch.float32, dim=2)
    expected: Lists = [slow_lists(selector, past, keys, 16)] * 4
    assert lists(selector, q, k, block=16) == [expected]


def test_the_last_rows_of_every_chunk_read_everything() -> None:
    """Where a prompt ends is known only at its end: chunks read more than the whole does."""
    q, k = draw(0, 1, 1, 160, 160, torch.float32)
    selector = TriangleMix(16, 16, 16)
    ((whole,),) = lists(selector, q, k, block=16)
    ((first,),) = lists(selector, q[:, :, :96], k[:, :, :96], block=16)
    assert first[:-1] == whole[:5]
    assert whole[5] == [0, 5]
    assert first[5] == [0, 1, 2, 3, 4, 5]


def test_deeper_layers_by_a_head_table() -> None:
    """The whole method: full layers first, triangles from ``start`` on."""
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    model = transformers.LlamaForCausalLM(settings)
    table = (torch.arange(4) >= 3)[:, None].expand(4, 2)
    elasticize(model, Elastic(HeadTable(table), sparse=TriangleMix(16, 16, 16), block_size=16))
    with torch.no_grad(), record() as trace:
        model(torch.randint(0, 128, (1, 96)))
    modes = trace.prefill.modes[:, 0]
    assert (modes[:3] == HeadMode.FULL).all()
    assert (modes[3] == HeadMode.SELECTED).all()
    # Rows 2 to 4 leave out 1, 2 and 3 blocks of 16 x 16 pairs; row 5 reads everything.
    assert float(trace.prefill.esr) == pytest.approx(6 * 256 / (96 * 97 / 2) / 4)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"sink": -16}, ValueError, "sink must be at least 0"),
        ({"local": 0}, ValueError, "local must be at least 1"),
        ({"local": 16.0}, TypeError, "local must be an int"),
        ({"last": 0}, ValueError, "last must be at least 1"),
        ({"last": True}, TypeError, "last must be an int"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TriangleMix(**arguments)


def test_sizes_must_be_whole_blocks() -> None:
    TriangleMix().check(128)
    with pytest.raises(ValueError, match="sink=8 is no multiple of block_size=128; use 128"):
        TriangleMix(sink=8).check(128)
