"""The work order: every tile once, the costliest first."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticore.backends.triton.columns import columns
from elasticore.backends.triton.schedule import schedule
from elasticore.layout import Segments

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@st.composite
def batches(draw: st.DrawFn) -> dict[str, object]:
    sequences, kv_heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    modes = st.lists(st.integers(0, 2), min_size=kv_heads, max_size=kv_heads)
    dense = draw(st.booleans())
    lengths = st.integers(1 if dense else 0, 900)
    keys = [draw(lengths)] * sequences if dense else [draw(lengths) for _ in range(sequences)]
    queries = [draw(st.integers(min(dense, n), n)) for n in keys]
    if dense:
        queries = queries[:1] * sequences
    tile = draw(st.sampled_from([16, 64, 128]))
    return {
        "modes": [draw(modes) for _ in range(sequences)],
        "dense": dense,
        "keys": keys,
        "queries": queries,
        "tile": tile,
        "block_size": draw(st.sampled_from([size for size in (16, 64, 128) if size >= tile])),
        "sink": draw(st.integers(0, 2)),
        "local": draw(st.integers(1, 4)),
    }


def segments(case: dict[str, object]) -> Segments | None:
    """Sequences side by side, unless the batch is dense."""
    if case["dense"]:
        return None
    keys: list[int] = case["keys"]  # type: ignore[assignment]
    zeros = torch.zeros(len(keys), dtype=torch.int64, device=DEVICE)
    length = torch.tensor(case["queries"], device=DEVICE), torch.tensor(keys, device=DEVICE)
    return Segments(zeros, zeros, length[0], zeros, length[1])


@settings(max_examples=60, deadline=None)
@given(batches())
def test_every_tile_once_by_falling_powers_of_two(case: dict[str, object]) -> None:
    modes, keys, queries, tile, block_size = (
        case[name] for name in ("modes", "keys", "queries", "tile", "block_size")
    )
    work = schedule(
        torch.tensor(modes, dtype=torch.int8, device=DEVICE),
        segments(case),
        batch=len(keys) if case["dense"] else 1,  # type: ignore[arg-type]
        queries=queries[0] if case["dense"] else max(1, sum(queries)),  # type: ignore[index,arg-type]
        keys=keys[0] if case["dense"] else max(1, sum(keys)),  # type: ignore[index,arg-type]
        **{name: case[name] for name in ("tile", "block_size", "sink", "local")},
    )
    expected = []
    for sequence, row in enumerate(modes):  # type: ignore[arg-type,var-annotated]
        last, length = keys[sequence] - 1, queries[sequence]  # type: ignore[index]
        for head, mode in enumerate(row):
            first = (last + 1 - length) // tile  # type: ignore[operator]
            for index in range(first, last // tile + 1 if length else first):
                blocks = index * tile // block_size + 1  # type: ignore[operator]
                if mode == 1:
                    blocks = min(blocks, case["sink"] + case["local"])  # type: ignore[operator]
                place = -int(math.log2(blocks)), sequence * len(row) + head, -index
                expected.append(place)
    total, count = work.total.tolist()
    assert count == 0
    found = work.tiles[:total].tolist()
    assert found == [[pair, -index] for _, pair, index in sorted(expected)]


@settings(max_examples=60, deadline=None)
@given(batches())
def test_every_key_block_once_by_falling_powers_of_two(case: dict[str, object]) -> None:
    modes, keys, queries, size, sink, local = (
        case[name] for name in ("modes", "keys", "queries", "block_size", "sink", "local")
    )
    work = columns(
        torch.tensor(modes, dtype=torch.int8, device=DEVICE),
        segments(case),
        batch=len(keys) if case["dense"] else 1,  # type: ignore[arg-type]
        queries=queries[0] if case["dense"] else max(1, sum(queries)),  # type: ignore[index,arg-type]
        keys=keys[0] if case["dense"] else max(1, sum(keys)),  # type: ignore[index,arg-type]
        block_size=size,  # type: ignore[arg-type]
        sink=sink,  # type: ignore[arg-type]
        local=local,  # type: ignore[arg-type]
    )
    expected = []
    for sequence, row in enumerate(modes):  # type: ignore[arg-type,var-annotated]
        length, count = keys[sequence], queries[sequence]  # type: ignore[index]
        blocks = -(-length // size) if count else 0  # type: ignore[operator]
        first = (length - count) // size  # type: ignore[operator]
        for head, mode in enumerate(row):
            for block in range(blocks):
                readers = blocks - max(block, first)
                if mode == 1 and block >= sink:  # type: ignore[operator]
                    readers = min(readers, local)  # type: ignore[type-var]
                level = -int(math.log2(readers))  # type: ignore[arg-type]
                expected.append((level, sequence * len(row) + head, block))
    total, taken = work.total.tolist()
    assert taken == 0
    found = work.tiles[:total].tolist()
    assert found == [[pair, block] for _, pair, block in sorted(expected)]
