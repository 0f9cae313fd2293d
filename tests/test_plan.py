"""Head plans: decisions over two patterns, the gate, and the two sparsity ratios."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elasticore import (
    BlockLists,
    Full,
    HeadMode,
    HeadPlan,
    MoBA,
    Pattern,
    SequenceLayout,
    Streaming,
    XAttention,
    hybrid_head_attention,
)
from elasticore.testing import Problem, ScatteredBlocks, attended
from tests.plans import pair_of

FULL, STREAMING, SELECTED = HeadMode
LANES = list(itertools.product(HeadMode, HeadMode))
CPU = torch.device("cpu")


def decisions(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


# --- Ω_MSR ---------------------------------------------------------------------------------------


def test_msr_counts_sparse_heads() -> None:
    plan = HeadPlan(decisions([0, 1, 0, 0], [1, 1, 1, 0]))
    assert plan.msr().item() == 0.5
    assert plan.msr().dtype == torch.float32


def test_msr_of_xa_ssa_counts_streaming_heads_only() -> None:
    # Both patterns are sparse attention; the ratio is still about the router's choice.
    plan = HeadPlan(decisions([0, 1, 1, 1]), XAttention(), Streaming())
    assert plan.msr().item() == 0.75
    assert plan.swapped().msr().item() == 0.25


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_msr_is_the_mean_gate_of_every_pair_of_patterns(choices: list[list[bool]]) -> None:
    gate = torch.tensor(choices).float()
    for lanes in LANES:
        assert HeadPlan.from_gate(gate, *pair_of(lanes)).msr() == gate.mean()


# --- Ω_ESR ---------------------------------------------------------------------------------------


def test_esr_by_hand() -> None:
    # Blocks of 16, no sink, a window of one block: in 32 tokens each query reads its own block.
    plan = HeadPlan(decisions([0, 1]), sparse=Streaming(0, 16), block_size=16)
    segments = SequenceLayout.dense().segments(1, 32, 32, CPU)
    pairs, kept = 32 * 33 / 2, 2 * (16 * 17 / 2)
    assert plan.esr(segments).tolist() == [[0.0, 1 - kept / pairs]]
    assert plan.esr(segments, "last_query").tolist() == [[0.0, 0.5]]


def test_esr_of_the_papers_figures() -> None:
    # Figures 8c and 12c: sink 128 + local 1,024 of 16,384 tokens, at the last query.
    plan = HeadPlan(decisions([1]), sparse=Streaming(128, 1024))
    segments = SequenceLayout.dense().segments(1, 16384, 16384, CPU)
    assert plan.esr(segments, "last_query").item() == 1 - (128 + 1024) / 16384


def test_esr_without_a_query_is_nan_for_that_sequence_only() -> None:
    plan = HeadPlan(decisions([1], [1]), sparse=Streaming(0, 16), block_size=16)
    layout = SequenceLayout.packed(torch.tensor([0, 0, 1]), torch.tensor([0, 9, 41]))
    segments = layout.segments(1, 1, 41, CPU)
    for definition in ("causal", "last_query"):
        empty, full = plan.esr(segments, definition)[:, 0].tolist()
        assert empty != empty
        assert full == 0.5


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to three short sequences in any layout, over any two patterns."""
    block = draw(st.sampled_from([16, 32]), label="block")
    streaming = Streaming(block * draw(st.integers(0, 2)), block * draw(st.integers(1, 3)))
    kind = draw(st.sampled_from(["dense", "left", "right", "packed"]), label="layout")
    lengths = draw(st.lists(st.integers(1, 120), min_size=1, max_size=3), label="lengths")
    longest = max(lengths)
    if kind == "packed":
        queries = [draw(st.integers(0, length)) for length in lengths]
        cumulative = [
            torch.tensor([0, *itertools.accumulate(sizes)]) for sizes in (queries, lengths)
        ]
        layout, batch = SequenceLayout.packed(*cumulative), 1
        total_queries, total_keys = max(1, sum(queries)), sum(lengths)
    else:
        batch, total_keys = len(lengths), longest
        total_queries = draw(st.integers(1, longest), label="chunk")
        offset = draw(st.none() | st.integers(0, longest - total_queries), label="offset")
        missing, last = longest - torch.tensor(lengths), torch.full((batch,), longest - 1)
        ends = (missing, last) if kind == "left" else (missing * 0, last - missing)
        where = None if offset is None else torch.full((batch,), offset)
        layout = SequenceLayout.dense() if kind == "dense" else SequenceLayout.padded(*ends, where)
    selector = ScatteredBlocks(draw(st.sampled_from([0.0, 0.4, 1.0]), label="share"))
    plan = HeadPlan(
        torch.randint(2, (layout.sequences(batch), 2), generator=generator(draw), dtype=torch.int8),
        *pair_of(draw(st.sampled_from(LANES), label="lanes"), streaming, selector),
        block_size=block,
    )
    # No value of q or k plays a part: two KV heads, two query heads each.
    q, k = torch.zeros(batch, 4, total_queries, 1), torch.zeros(batch, 2, total_keys, 1)
    return Problem(q, k, k, plan, layout, 1.0)


def generator(draw: st.DrawFn) -> torch.Generator:
    return torch.Generator().manual_seed(draw(st.integers(0, 2**16)))


@given(problem=problems(), definition=st.sampled_from(["causal", "last_query"]))
def test_esr_is_what_the_token_masks_say(problem: Problem, definition: Any) -> None:
    plan, segments = problem.plan, problem.segments()
    selection = None
    if plan.selector is not None:
        selection = plan.selector.select(
            problem.q, problem.k, segments, block_size=plan.block_size, scale=1.0
        )
    ratio = plan.esr(segments, definition, selection)
    assert ratio.dtype == torch.float64
    for sequence, row in enumerate(plan.modes.tolist()):
        if not segments.query_length[sequence]:
            assert ratio[sequence].isnan().all()
            continue
        for head, mode in enumerate(row):
            read = attended(problem, sequence, HeadMode(mode))[2 * head : 2 * head + 2]
            causal = attended(problem, sequence, FULL)[:2]
            if definition == "last_query":
                read, causal = read[:, -1:], causal[:, -1:]
            exact = 1 - read.sum().item() / causal.sum().item()
            # Sums of integers below 2**53 are exact; one division and one mean are not.
            assert abs(ratio[sequence, head].item() - exact) < 4 * torch.finfo(torch.float64).eps


def test_esr_wants_the_selection_of_selected_heads_only() -> None:
    segments = SequenceLayout.dense().segments(1, 64, 64, CPU)
    plan = HeadPlan(decisions([0, 0]), sparse=ScatteredBlocks(), block_size=16)
    assert plan.esr(segments).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match=r"selection is missing.*selector\.select"):
        plan.with_decisions(decisions([0, 1])).esr(segments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"definition": "mean"}, ValueError, "definition must be 'causal' or 'last_query'"),
        ({"segments": None}, TypeError, "segments must be Segments"),
        (
            {"segments": SequenceLayout.dense().segments(2, 64, 64, CPU)},
            ValueError,
            "segments describe 2 sequences but the plan has 1",
        ),
        ({"selection": [1, 2]}, TypeError, "selection must be BlockLists"),
        (
            {"selection": BlockLists.from_mask(torch.ones(1, 3, 4, 4, dtype=torch.bool))},
            ValueError,
            r"selection\.counts must be .*a multiple of 2 heads",
        ),
    ],
)
def test_esr_refuses(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    plan = HeadPlan(decisions([0, 1]), sparse=Streaming(0, 16), block_size=16)
    call = {"segments": SequenceLayout.dense().segments(1, 64, 64, CPU), **arguments}
    with pytest.raises(error, match=message):
        plan.esr(**call)


# --- The gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
def test_from_gate_derives_decisions_and_modes(lanes: tuple[HeadMode, HeadMode]) -> None:
    gate = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    pair = pair_of(lanes)
    plan = HeadPlan.from_gate(gate, *pair)
    assert plan.decisions.tolist() == [[0, 1], [1, 0]]
    assert plan.modes.tolist() == [[lanes[0], lanes[1]], [lanes[1], lanes[0]]]
    assert plan.decisions.dtype == plan.modes.dtype == torch.int8
    assert plan.gate is gate
    # Not gated, the same decisions make the same plan.
    assert HeadPlan(plan.decisions, *pair, gate=gate).gate is gate


def test_the_gates_gradient_reaches_the_router_that_made_it() -> None:
    logits = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    soft = logits.sigmoid()
    gate = (soft > 0.5).float() + soft - soft.detach()
    plan = HeadPlan.from_gate(gate, sparse=Streaming(0, 16), block_size=16)
    q, k, v = torch.randn(3, 1, 2, 48, 8, generator=torch.Generator().manual_seed(0))
    out = hybrid_head_attention(q, k, v, plan, backend="serial")
    out.square().sum().backward()
    assert logits.grad is not None
    assert bool((logits.grad != 0).all())


def test_a_soft_gate_is_refused_where_reading_it_is_free() -> None:
    for value in (0.5, -1.0, 2.0, float("nan")):
        with pytest.raises(ValueError, match="gate must be exactly 0"):
            HeadPlan.from_gate(torch.tensor([[0.0, value]]))
    assert HeadPlan.from_gate(torch.tensor([[0.5]], device="meta")).modes.is_meta


def test_gate_and_decisions_must_agree() -> None:
    with pytest.raises(ValueError, match="agree with decisions"):
        HeadPlan(decisions([0, 1]), gate=torch.tensor([[1.0, 0.0]]))


# --- Other plans from a plan ---------------------------------------------------------------------


@pytest.mark.parametrize("lanes", LANES)
def test_swapped_gives_every_head_its_other_pattern(lanes: tuple[HeadMode, HeadMode]) -> None:
    plan = HeadPlan.from_gate(torch.tensor([[0.0, 1.0, 1.0]]), *pair_of(lanes))
    other = plan.swapped()
    assert other.modes.tolist() == [[lanes[1], lanes[0], lanes[0]]]
    assert other.modes.dtype == torch.int8
    assert other.gate is None
    assert torch.equal(other.swapped().modes, plan.modes)
    kept = ("retrieval", "sparse", "streaming", "selector", "block_size")
    assert all(getattr(other, name) == getattr(plan, name) for name in kept)


def test_with_decisions_keeps_everything_but_decisions_and_gate() -> None:
    plan = HeadPlan.from_gate(torch.ones(1, 2), XAttention(), Streaming(32, 64), block_size=32)
    other = plan.with_decisions(decisions([0, 1], [1, 0]))
    assert other.modes.tolist() == [[2, 1], [1, 2]]
    assert other.gate is None
    assert (other.streaming, other.selector) == (Streaming(32, 64), XAttention())
    assert other.block_size == 32
    assert plan.modes.tolist() == [[1, 1]]


# --- What a backend reads ------------------------------------------------------------------------


def test_lanes_are_those_of_the_pair_without_reading_the_decisions() -> None:
    meta = decisions([0]).to("meta")
    for lanes in LANES:
        assert HeadPlan(meta, *pair_of(lanes), check=False).lanes == set(lanes)


def test_streaming_and_selector_are_those_of_the_pair() -> None:
    near, chosen = Streaming(0, 256), MoBA()
    assert HeadPlan(decisions([0]), near, chosen).streaming is near
    assert HeadPlan(decisions([0]), near, chosen).selector is chosen
    assert HeadPlan(decisions([0]), chosen, near).selector is chosen
    plain = HeadPlan(decisions([0]), Full(), Full(), block_size=16)
    assert plain.selector is None
    assert plain.streaming.blocks(16), "sizes may be read without asking"


@pytest.mark.parametrize("lanes", LANES)
def test_modes_follow_decisions_that_are_overwritten(lanes: tuple[HeadMode, HeadMode]) -> None:
    for inference in (False, True):  # where PyTorch counts no writes
        with torch.inference_mode(inference):
            plan = HeadPlan(decisions([0, 1]), *pair_of(lanes))
            assert plan.modes.tolist() == [[*lanes]]
            plan.decisions.copy_(decisions([1, 0]))
            assert plan.modes.tolist() == [[*lanes[::-1]]]


def test_modes_are_made_once() -> None:
    plan = HeadPlan(decisions([0, 1]), XAttention(), Streaming())
    assert plan.modes is plan.modes
    other = copy.deepcopy(plan)
    other.decisions.fill_(1)
    assert (plan.modes.tolist(), other.modes.tolist()) == ([[2, 1]], [[1, 1]])
    # Of the default pair they are the decisions.
    plan = HeadPlan(decisions([0, 1]))
    assert plan.modes is plan.decisions


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"decisions": [[0, 1]]}, ValueError, "decisions must be a tensor"),
        ({"decisions": decisions([0, 1])[0]}, ValueError, "decisions must be a tensor"),
        ({"decisions": decisions([0, 1]).long()}, TypeError, r"must be int8.*decisions\.to"),
        ({"decisions": decisions([0, 2])}, ValueError, "must be 0 .* or 1 .*, got values from 0"),
        ({"decisions": decisions([-1, 1])}, ValueError, "decisions must be .* from -1 to 1"),
        ({"retrieval": FULL}, TypeError, r"retrieval must be Full\(\), .*got <HeadMode"),
        ({"retrieval": None}, TypeError, "retrieval must be .*got None"),
        ({"sparse": "ssa"}, TypeError, r"sparse must be .*XAttention\(\), got 'ssa'"),
        ({"sparse": XAttention}, TypeError, "sparse must be .*got <class"),
        ({"sparse": type("Mine", (Pattern,), {})()}, TypeError, "sparse must be .*Mine"),
        ({"sparse": Streaming(128, 64)}, ValueError, "local=64 is no multiple of block_size"),
        ({"retrieval": Streaming(64, 128)}, ValueError, "sink=64 is no multiple of block_size"),
        (
            {"retrieval": Streaming(0, 128)},
            ValueError,
            "two different patterns of the lane STREAMING, got .*local=128.* and .*local=2048",
        ),
        (
            {"retrieval": XAttention(), "sparse": XAttention(threshold=0.8)},
            ValueError,
            "two different patterns of the lane SELECTED",
        ),
        (
            {"sparse": XAttention(32), "block_size": 16},
            ValueError,
            "stride=32 must divide block_size=16",
        ),
        ({"block_size": 48}, ValueError, "block_size must be 16, 32, 64 or 128"),
        ({"block_size": 8}, ValueError, "block_size must be 16, 32, 64 or 128"),
        ({"block_size": 256}, ValueError, "block_size must be 16, 32, 64 or 128"),
        ({"block_size": True}, TypeError, "block_size must be an int"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int"),
        ({"gate": [[0.0, 1.0]]}, TypeError, "gate must be a float tensor"),
        ({"gate": decisions([0, 1])}, TypeError, "gate must be a float tensor"),
        ({"gate": torch.zeros(1, 3)}, ValueError, "must have the shape and device of decisions"),
        ({"gate": torch.zeros(1, 2).to("meta")}, ValueError, "gate must have the shape and device"),
    ],
)
def test_plan_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HeadPlan(**{"decisions": decisions([0, 1]), **fields})


@pytest.mark.parametrize("gate", [None, [[0.0]], torch.zeros(2), torch.zeros(1, 2).int()])
def test_from_gate_refuses(gate: Any) -> None:
    with pytest.raises(ValueError, match="gate must be a float tensor"):
        HeadPlan.from_gate(gate)
