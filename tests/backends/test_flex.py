"""The FlexAttention backend: its block masks are the pattern, and one kernel serves all lengths."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter
from torch.nn.functional import scaled_dot_product_attention

import elasticore as ec
from elasticore import HeadMode, HeadPlan, SequenceLayout, Streaming, Verdict, testing
from elasticore.backends import flex as backend
from elasticore.backends.flex import FlexAttention
from elasticore.backends.flex.arrangement import arrange
from elasticore.backends.flex.blocks import Blocks, blocks_read
from elasticore.backends.registry import register_backend
from elasticore.patterns import BlockLists
from elasticore.testing import Case
from elasticore.testing.cases import PAIRS
from tests.plans import pair_of, plan_of


def block_masks(blocks: Blocks, others: int) -> tuple[Tensor, Tensor]:
    """The blocks that are read whole, and those masked inside: bool ``[rows, Hq, n, others]``."""
    assert bool((blocks.diagonals <= 1).all())
    # Older kernels find the rows of both with the strides of one, and PyTorch would copy what does
    # not start at 16 bytes.
    assert blocks.diagonal.stride() == blocks.whole.stride()
    assert blocks.diagonal.data_ptr() % 16 == blocks.whole.data_ptr() % 16 == 0
    for index in (blocks.diagonal, blocks.whole):  # a kernel may look up what it does not read
        assert index.stride(3) == 1 and bool(((index >= 0) & (index < others)).all())
    whole = BlockLists(blocks.whole, blocks.wholes).to_mask(others)
    diagonal = BlockLists(blocks.diagonal, blocks.diagonals).to_mask(others)
    assert not bool((whole & diagonal).any())
    return whole, diagonal


class ByTable(FlexAttention):
    """The backend, with FlexAttention replaced by what its block mask promises."""

    devices = ("cpu",)

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, turned: Blocks | None, scale: float
    ) -> Tensor:
        rows, size, keys = q.shape[2], q.shape[3], k.shape[2]
        whole, diagonal = block_masks(blocks, keys)
        if turned is not None:  # what a backward pass goes by is the same mask
            for one, other in zip(block_masks(turned, rows), (whole, diagonal), strict=True):
                assert torch.equal(one.transpose(2, 3), other)
        causal = torch.ones(size, size, dtype=torch.bool).tril()[:, None]
        mask = whole[..., None, :, None] | (diagonal[..., None, :, None] & causal)
        mask = mask.expand(*whole.shape[:3], size, keys, size).flatten(4).flatten(2, 3)
        unread = ~mask.any(-1, keepdim=True)
        q, k, v = (x.flatten(2, 3) for x in (q, k, v))
        assert all(bool(torch.isfinite(x).all()) for x in (q, k, v))
        out = scaled_dot_product_attention(
            q, k, v, attn_mask=mask | unread, scale=scale, enable_gqa=True
        )
        return out.masked_fill(unread, 0)


@pytest.fixture
def by_table(clean_registry: None, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(backend, "DTYPES", (torch.float64, torch.float32))
    register_backend("flex", ByTable, replace=True)
    return "flex"


# --- Block masks are the pattern -----------------------------------------------------------------

SMALL = [
    case
    for case in testing.matrix()
    if case.length < 300 or (case.queries == "one" and case.group == 1)
]


@pytest.mark.parametrize(
    ("case", "pair"), list(zip(SMALL, itertools.cycle(PAIRS), strict=False)), ids=str
)
def test_block_masks_are_the_pattern(
    case: Case, pair: tuple[HeadMode, HeadMode], by_table: str
) -> None:
    testing.check_output(by_table, case)
    testing.check_gradients(by_table, case, lanes=pair)
    testing.check_same_alone(by_table, case)


@settings(max_examples=30)
@given(data=st.data())
def test_any_layout_and_routing(data: st.DataObject, by_table: str) -> None:
    draw, size = data.draw, 16
    lengths = draw(st.lists(st.integers(0, 70), min_size=1, max_size=4), label="keys")
    queries = [draw(st.integers(0, length), label="queries") for length in lengths]
    decisions = [draw(st.lists(st.integers(0, 1), min_size=2, max_size=2)) for _ in lengths]
    spare = draw(st.integers(0, 3), label="spare")  # tokens that no sequence owns
    layout = SequenceLayout.packed(
        *(torch.tensor([0, *itertools.accumulate(x)]) for x in (queries, lengths))
    )
    generator = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(1, heads, max(1, sum(n) + spare), 16, generator=generator).double()
        for n, heads in ((queries, 4), (lengths, 2), (lengths, 2))
    )
    streaming = Streaming(draw(st.sampled_from([0, 16])), draw(st.sampled_from([16, 32])))
    pair = pair_of(draw(st.sampled_from(PAIRS)), streaming)
    plan = HeadPlan(torch.tensor(decisions, dtype=torch.int8), *pair, block_size=size)
    k[:, :, sum(lengths) :] = v[:, :, sum(lengths) :] = torch.nan
    ours = ec.hybrid_head_attention(q, k, v, plan, layout=layout, backend=by_table)
    reference = ec.hybrid_head_attention(q, k, v, plan, layout=layout, backend="serial")
    torch.testing.assert_close(ours, reference)


def test_whole_blocks_stay_where_they_are() -> None:
    cpu, dense = torch.device("cpu"), SequenceLayout.dense()
    x = torch.zeros(1, 2, 256, 16)
    places = arrange(dense, 1, 256, 256, 64, cpu)
    assert places.queries.put(x, 64).data_ptr() == places.keys.put(x, 64).data_ptr() == x.data_ptr()
    # Queries that start inside a block move, and the keys still do not.
    places = arrange(dense, 1, 100, 256, 64, cpu)
    assert places.keys.put(x, 64).data_ptr() == x.data_ptr()
    assert places.queries.put(x[:, :, :100], 64).shape == (1, 2, 2, 64, 16)


def test_a_row_block_reads_sink_and_window() -> None:
    plan = plan_of([[0, 1]], Streaming(16, 32), block_size=16)
    places = arrange(SequenceLayout.dense(), 1, 80, 80, 16, torch.device("cpu"))
    blocks = blocks_read(plan, places, None, 2)
    whole, diagonal = block_masks(blocks, 5)
    assert torch.equal(diagonal[0, 0], torch.eye(5, dtype=torch.bool))
    assert torch.equal(whole[0, 0], torch.ones(5, 5, dtype=torch.bool).tril(-1))
    assert [row.nonzero().flatten().tolist() for row in whole[0, 1]] == [
        [],
        [0],
        [0, 1],
        [0, 2],
        [0, 3],
    ]


# --- What is made once ---------------------------------------------------------------------------


def problem_without_lists() -> testing.Problem:
    problem = testing.make_problem(Case("packed", 4, 32, 129, "all", "32"))
    return problem._replace(
        plan=plan_of([[0, 1], [1, 1], [1, 0]], Streaming(32, 64), block_size=32)
    )


def test_a_plans_block_mask_is_made_once(by_table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def counted(*args: Any) -> Blocks:
        made.append(args)
        return blocks_read(*args)

    monkeypatch.setattr(backend, "blocks_read", counted)
    problem = problem_without_lists()
    assert torch.equal(problem.run(by_table), problem.run(by_table))
    assert len(made) == 1
    problem.plan.decisions.fill_(1)
    torch.testing.assert_close(problem.run(by_table), problem.run("serial"))
    assert len(made) == 2
    with torch.inference_mode():  # PyTorch does not count writes here: nothing may be kept
        decisions = problem.plan.decisions.clone()
        inferred = problem._replace(plan=problem.plan.with_decisions(decisions))
        inferred.run(by_table)
        decisions.zero_()
        torch.testing.assert_close(inferred.run(by_table), inferred.run("serial"))


def test_block_masks_go_with_their_plan(by_table: str) -> None:
    engine = ByTable()
    x = torch.randn(1, 2, 64, 16)
    plan = HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8))
    engine.attend(x, x, x, plan, layout=SequenceLayout.dense(), scale=0.25)
    assert len(engine._prepared._memos) == 1
    del plan
    assert len(engine._prepared._memos) == 0


def test_one_kernel_serves_all_lengths(
    clean_registry: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The graph is traced as on a GPU, and then run without a kernel: only the count is looked at.

    Two kernels, as whole blocks stay where the model's projection has put them, [B, T, H, D], and
    others are moved.
    """
    counter = CompileCounter()
    compiled = torch.compile(backend._flex, backend=counter, dynamic=False, fullgraph=True)
    monkeypatch.setattr(backend, "_compiled", lambda: compiled)

    class Traced(ByTable):
        _attend = FlexAttention._attend

    register_backend("flex", Traced, replace=True)

    def run(*lengths: int) -> int:
        for length in lengths:
            problem = testing.make_problem(Case("dense", 4, 64, length, "all", "32"))
            problem = problem._replace(
                **{x: getattr(problem, x).float() for x in ("q", "k", "v")},
            )
            problem.run("flex")
        return counter.frame_count

    assert run(128) == 1
    assert run(129) == 2
    assert run(64, 65, 96, 97, 160, 161, 192, 200, 256, 257, 300) == 2


def test_it_never_runs_uncompiled() -> None:
    class Compiled(ByTable):
        _attend = FlexAttention._attend

    x = torch.randn(1, 2, 64, 16)
    plan = HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8))
    backend._compiled.cache_clear()  # what torch.compile returns now must not be kept
    with (
        torch._dynamo.config.patch(disable=True),
        pytest.raises(ec.ElasticoreError, match="without being compiled"),
    ):
        Compiled().attend(x, x, x, plan, layout=SequenceLayout.dense(), scale=0.25)
    assert backend._compiled.cache_info().currsize == 0


# --- Refusals ------------------------------------------------------------------------------------


def request(**changes: Any) -> ec.AttentionRequest:
    problem = testing.make_problem(Case("packed", 7, 128, 129, "some", "128"))
    one = ec.AttentionRequest.of(problem.q, problem.k, problem.v, problem.plan, problem.layout)
    usual = {"device": torch.device("cuda"), "dtype": torch.bfloat16, "gradients": True}
    return dataclasses.replace(one, **{**usual, **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float64}, "float64 is none of"),
        ({"head_dim": 8}, "head_dim 8 is not from 16 to 256"),
        ({"device": torch.device("cpu")}, "runs on NVIDIA GPUs"),
        ({"block_size": 64}, "gradients in 16 bits need blocks of 128 or a multiple, not 64"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert FlexAttention().supports(request())
    verdict = FlexAttention().supports(request(**changes))
    assert not verdict
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("installed", "reason"),
    [(False, "pip install 'elasticore[triton]'"), (True, "no NVIDIA GPU")],
)
def test_why_it_is_not_available(
    installed: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in FlexAttention.available().reason


# --- On a GPU ------------------------------------------------------------------------------------

GPU_CASES = [
    Case("dense", 4, 128, 2176, "all", "128"),
    Case("dense", 1, 64, 2049, "some", "128"),
    Case("left", 7, 64, 2049, "some", "128"),
    Case("right", 1, 128, 2048, "all", "64"),
    Case("packed", 8, 128, 2175, "some", "128"),
    Case("packed", 4, 32, 127, "all", "32"),
    Case("left", 8, 128, 2176, "one", "128"),
]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_conformance(case: Case, dtype: torch.dtype) -> None:
    for check in (testing.check_output, testing.check_same_alone, testing.check_repeatable):
        check("flex", case, dtype=dtype, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", PAIRS)
@pytest.mark.parametrize("case", GPU_CASES[::2], ids=str)
def test_gradients(case: Case, lanes: tuple[HeadMode, HeadMode]) -> None:
    how: dict[str, Any] = {"lanes": lanes, "dtype": torch.bfloat16, "device": "cuda"}
    testing.check_gradients("flex", case, **how)
    testing.check_repeatable("flex", case, gradients=True, **how)


@pytest.mark.gpu
def test_a_graphs_replay_follows_the_decisions() -> None:
    decisions = torch.zeros(1, 2, dtype=torch.int8, device="cuda")
    plan = HeadPlan(decisions, sparse=Streaming(128, 128), check=False)
    x = torch.randn(1, 2, 1024, 64, device="cuda", dtype=torch.bfloat16)
    full = ec.hybrid_head_attention(x, x, x, plan, backend="flex")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ec.hybrid_head_attention(x, x, x, plan, backend="flex")
    graph.replay()
    assert torch.equal(out, full)
    decisions.fill_(1)
    graph.replay()
    assert torch.equal(out, ec.hybrid_head_attention(x, x, x, plan, backend="flex"))
    assert not torch.equal(out, full)
