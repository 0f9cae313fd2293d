"""What every selector of the library promises, whatever it chooses by."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elasticore import (
    AllSparse,
    BlockSelector,
    Elastic,
    HeadPlan,
    SequenceLayout,
    pattern_from_dict,
    pattern_to_dict,
    testing,
)
from elasticore.patterns import InfLLMV2, MoBA, NSASelected, TriangleMix, XAttention
from tests.patterns.calls import draw, lists, packed, padded

BLOCK = 16
SELECTORS: dict[str, BlockSelector] = {
    "infllm-v2": InfLLMV2(32, 3, kernel=8, stride=4, sink=32, local=64, dense=100),
    "moba": MoBA(32, 3),
    "nsa-selected": NSASelected(32, 4, kernel=8, stride=4, sink=32, local=64),
    "trianglemix": TriangleMix(16, 32, 20),
    "xattention": XAttention(threshold=0.6),
}
CAUSAL = [name for name in SELECTORS if name != "trianglemix"]

every = pytest.mark.parametrize("name", SELECTORS)


@every
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), keys=st.integers(1, 260), past=st.integers(0, 260))
def test_lists_ascend_to_the_diagonal(name: str, seed: int, keys: int, past: int) -> None:
    past = min(past, keys - 1)
    q, k = draw(seed, 4, 2, keys - past, keys, torch.float32)
    (heads,) = lists(SELECTORS[name], q, k, block=BLOCK)
    for rows in heads:
        assert len(rows) == -(-keys // BLOCK) - past // BLOCK
        for row, chosen in enumerate(rows, past // BLOCK):
            assert chosen == sorted(set(chosen))
            assert chosen[-1] == row


@pytest.mark.parametrize("name", CAUSAL)
@settings(max_examples=20)
@given(seed=st.integers(0, 2**16), keys=st.integers(1, 300), cut=st.integers(1, 18))
def test_chunks_from_block_boundaries_choose_the_same_blocks(
    name: str, seed: int, keys: int, cut: int
) -> None:
    q, k = draw(seed, 4, 2, keys, keys, torch.float32)
    (whole,) = lists(SELECTORS[name], q, k, block=BLOCK)
    cut = min(cut * BLOCK, keys)
    parts = [lists(SELECTORS[name], q[:, :, :cut], k[:, :, :cut], block=BLOCK)[0]]
    if cut < keys:
        parts += lists(SELECTORS[name], q[:, :, cut:], k, block=BLOCK)
    assert [[row for part in heads for row in part] for heads in zip(*parts, strict=True)] == whole


@every
@settings(max_examples=20)
@given(
    seed=st.integers(0, 2**16),
    lengths=st.lists(st.integers(1, 150), min_size=1, max_size=4),
    left=st.booleans(),
)
def test_padded_packed_and_alone_choose_the_same_blocks(
    name: str, seed: int, lengths: list[int], left: bool
) -> None:
    pairs = [
        draw(seed + i, 4, 2, length, length, torch.float32) for i, length in enumerate(lengths)
    ]
    alone = [lists(SELECTORS[name], q, k, block=BLOCK)[0] for q, k in pairs]
    assert lists(SELECTORS[name], *packed(pairs), block=BLOCK) == alone
    assert lists(SELECTORS[name], *padded(pairs, left), block=BLOCK) == alone


@every
def test_equal_keys_tie_the_same_way_alone_and_in_a_batch(name: str) -> None:
    pairs = [(torch.ones(1, 2, n, 8) / 3, torch.ones(1, 1, n, 8) / 7) for n in (250, 77, 131)]
    alone = [lists(SELECTORS[name], q, k, block=BLOCK)[0] for q, k in pairs]
    assert lists(SELECTORS[name], *packed(pairs), block=BLOCK) == alone
    assert lists(SELECTORS[name], *padded(pairs, left=True), block=BLOCK) == alone


@every
def test_packed_sequences_with_a_past_and_without_queries(name: str) -> None:
    pairs = [
        draw(seed, 4, 2, *sizes, torch.float32) for seed, sizes in enumerate([(3, 90), (40, 41)])
    ]
    alone = [lists(SELECTORS[name], q, k, block=BLOCK)[0] for q, k in pairs]
    q, k, _ = packed(pairs)
    layout = SequenceLayout.packed(torch.tensor([0, 3, 3, 43]), torch.tensor([0, 90, 90, 131]))
    one, empty, two = lists(SELECTORS[name], q, k, layout, block=BLOCK)
    assert empty == [[]] * 4
    assert [one, two] == alone


@every
def test_a_preallocated_cache_is_not_read_beyond_its_end(name: str) -> None:
    q, k = draw(5, 4, 2, 40, 200, torch.float32)
    (alone,) = lists(SELECTORS[name], q, k, block=BLOCK)
    longer = torch.nn.functional.pad(k, (0, 0, 0, 60), value=torch.nan)
    zero = torch.tensor([0])
    layout = SequenceLayout.padded(zero, zero + 259, query_offset=zero + 160)
    assert lists(SELECTORS[name], q, longer, layout, block=BLOCK) == [alone]


@every
def test_half_precision_chooses_as_its_values_in_float32_do(name: str) -> None:
    q, k = draw(3, 4, 2, 300, 300, torch.bfloat16)
    half = lists(SELECTORS[name], q, k, block=BLOCK)
    assert half == lists(SELECTORS[name], q.float(), k.float(), block=BLOCK)


@every
def test_attention_over_the_lists_is_that_of_the_dense_reference(name: str) -> None:
    problem = testing.make_problem(testing.Case("left", 4, 32, 129, "some", "32"))
    plan = HeadPlan(problem.plan.decisions, sparse=SELECTORS[name], block_size=BLOCK)
    problem = problem._replace(plan=plan)
    expected = testing.dense_attention(problem)
    assert torch.allclose(problem.run("serial").double(), expected, atol=1e-5)


@every
def test_a_configuration_file_holds_it_by_its_name(name: str) -> None:
    data = json.loads(json.dumps(pattern_to_dict(SELECTORS[name])))
    assert data["name"] == name
    assert pattern_from_dict(data) == SELECTORS[name]
    way = Elastic(AllSparse(), sparse=SELECTORS[name], block_size=BLOCK)
    assert Elastic.from_dict(json.loads(json.dumps(way.to_dict()))) == way


def test_the_defaults_are_those_of_the_papers_table_6() -> None:
    assert MoBA() == MoBA(block=1024, top_k=8)
    compression = {"block": 64, "kernel": 32, "stride": 16, "sink": 64}
    assert InfLLMV2() == InfLLMV2(**compression, top_k=64, local=2048, dense=8192)
    assert NSASelected() == NSASelected(**compression, top_k=128, local=128)


SILENT = ["infllm-v2", "moba", "nsa-selected", "trianglemix"]


@pytest.mark.parametrize("name", SILENT)
def test_nothing_of_the_device_is_read(name: str) -> None:
    q, k = draw(3, 4, 2, 100, 120, torch.float32)
    segments = SequenceLayout.dense().segments(1, 100, 120, q.device)
    meta = [x.to("meta") for x in (q, k)]
    on_meta = type(segments)(*(x.to("meta") for x in segments))  # reading a value fails there
    chosen = SELECTORS[name].select(*meta, on_meta, block_size=BLOCK, scale=1.0)
    expected = SELECTORS[name].select(q, k, segments, block_size=BLOCK, scale=1.0)
    assert chosen.counts.shape == expected.counts.shape


@pytest.mark.gpu
@pytest.mark.parametrize("name", SILENT)
def test_a_gpu_chooses_the_same_without_a_wait(name: str) -> None:
    q, k = draw(3, 4, 2, 300, 333, torch.bfloat16)
    expected = lists(SELECTORS[name], q, k, block=BLOCK)
    q, k = q.cuda(), k.cuda()
    segments = SequenceLayout.dense().segments(1, 300, 333, q.device)
    SELECTORS[name].select(q, k, segments, block_size=BLOCK, scale=1.0)  # loads what it needs
    torch.cuda.set_sync_debug_mode("error")
    try:
        SELECTORS[name].select(q, k, segments, block_size=BLOCK, scale=1.0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert lists(SELECTORS[name], q, k, block=BLOCK) == expected
