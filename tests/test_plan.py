"""Head plans: modes, the gate, and the two sparsity ratios."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from elasticore import (
    BlockLists,
    HeadMode,
    HeadPlan,
    SequenceLayout,
    Streaming,
    XAttention,
    hybrid_head_attention,
)
from elasticore.testing import Problem, ScatteredBlocks, attended

FULL, STREAMING, SELECTED = HeadMode
CPU = torch.device("cpu")


def modes(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int8)


# --- Ω_MSR ---------------------------------------------------------------------------------------


def test_msr_counts_heads_that_left_the_retrieval_mode() -> None:
    plan = HeadPlan(modes([0, 1, 0, 0], [1, 1, 1, 0]))
    assert plan.msr().item() == 0.5
    assert plan.msr().dtype == torch.float32


def test_msr_of_xa_ssa_counts_streaming_heads_only() -> None:
    # Both modes are sparse attention; the ratio is still about the router's choice.
    plan = HeadPlan(
        modes([2, 1, 1, 1]), retrieval=SELECTED, sparse=STREAMING, selector=XAttention()
    )
    assert plan.msr().item() == 0.75
    assert plan.swapped().msr().item() == 0.25


@given(st.lists(st.lists(st.booleans(), min_size=3, max_size=3), min_size=1, max_size=4))
def test_msr_is_the_mean_gate_in_every_pair_of_modes(choices: list[list[bool]]) -> None:
    gate = torch.tensor(choices).float()
    for retrieval, sparse in ((FULL, STREAMING), (FULL, SELECTED), (SELECTED, STREAMING)):
        plan = HeadPlan.from_gate(
            gate, retrieval=retrieval, sparse=sparse, selector=ScatteredBlocks()
        )
        assert plan.msr() == gate.mean()


# --- Ω_ESR ---------------------------------------------------------------------------------------


def test_esr_by_hand() -> None:
    # Blocks of 16, no sink, a window of one block: in 32 tokens each query reads its own block.
    plan = HeadPlan(modes([0, 1]), streaming=Streaming(0, 16), block_size=16)
    segments = SequenceLayout.dense().segments(1, 32, 32, CPU)
    pairs, kept = 32 * 33 / 2, 2 * (16 * 17 / 2)
    assert plan.esr(segments).tolist() == [[0.0, 1 - kept / pairs]]
    assert plan.esr(segments, "last_query").tolist() == [[0.0, 0.5]]


def test_esr_of_the_papers_figures() -> None:
    # Figures 8c and 12c: sink 128 + local 1,024 of 16,384 tokens, at the last query.
    plan = HeadPlan(modes([1]), streaming=Streaming(128, 1024))
    segments = SequenceLayout.dense().segments(1, 16384, 16384, CPU)
    assert plan.esr(segments, "last_query").item() == 1 - (128 + 1024) / 16384


def test_esr_without_a_query_is_nan_for_that_sequence_only() -> None:
    plan = HeadPlan(modes([1], [1]), streaming=Streaming(0, 16), block_size=16)
    layout = SequenceLayout.packed(torch.tensor([0, 0, 1]), torch.tensor([0, 9, 41]))
    segments = layout.segments(1, 1, 41, CPU)
    for definition in ("causal", "last_query"):
        empty, full = plan.esr(segments, definition)[:, 0].tolist()
        assert empty != empty
        assert full == 0.5


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Up to three short sequences in any layout, with any mix of the three lanes."""
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
    plan = HeadPlan(
        torch.randint(3, (layout.sequences(batch), 2), generator=generator(draw), dtype=torch.int8),
        streaming=streaming,
        selector=ScatteredBlocks(draw(st.sampled_from([0.0, 0.4, 1.0]), label="share")),
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
    assert plan.selector is not None
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
    plan = HeadPlan(modes([0, 1]), selector=ScatteredBlocks(), block_size=16)
    assert plan.esr(segments).tolist() == [[0.0, 0.0]]
    with pytest.raises(ValueError, match=r"selection is missing.*selector\.select"):
        plan.with_modes(modes([0, 2])).esr(segments)


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
    plan = HeadPlan(modes([0, 1]), streaming=Streaming(0, 16), block_size=16)
    call = {"segments": SequenceLayout.dense().segments(1, 64, 64, CPU), **arguments}
    with pytest.raises(error, match=message):
        plan.esr(**call)


# --- The gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retrieval", "sparse", "expected"),
    [
        (FULL, STREAMING, [[0, 1], [1, 0]]),
        (FULL, SELECTED, [[0, 2], [2, 0]]),
        (SELECTED, STREAMING, [[2, 1], [1, 2]]),
    ],
)
def test_from_gate_derives_the_modes(
    retrieval: HeadMode, sparse: HeadMode, expected: list[list[int]]
) -> None:
    gate = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.bfloat16)
    plan = HeadPlan.from_gate(gate, retrieval=retrieval, sparse=sparse, selector=XAttention())
    assert plan.modes.tolist() == expected
    assert plan.modes.dtype == torch.int8
    assert plan.gate is gate
    # Not gated, the same modes make the same plan.
    assert HeadPlan(plan.modes, retrieval, sparse, gate, selector=XAttention()).gate is gate


def test_the_gates_gradient_reaches_the_router_that_made_it() -> None:
    logits = torch.tensor([[-1.0, 2.0]], requires_grad=True)
    soft = logits.sigmoid()
    gate = (soft > 0.5).float() + soft - soft.detach()
    plan = HeadPlan.from_gate(gate, streaming=Streaming(0, 16), block_size=16)
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


def test_gate_and_modes_must_agree() -> None:
    with pytest.raises(ValueError, match="agree with modes"):
        HeadPlan(modes([0, 1]), gate=torch.tensor([[1.0, 0.0]]))


# --- Other plans from a plan ---------------------------------------------------------------------


@pytest.mark.parametrize("pair", [(FULL, STREAMING), (FULL, SELECTED), (SELECTED, STREAMING)])
def test_swapped_gives_every_head_its_other_mode(pair: tuple[HeadMode, HeadMode]) -> None:
    gate = torch.tensor([[0.0, 1.0, 1.0]])
    plan = HeadPlan.from_gate(gate, retrieval=pair[0], sparse=pair[1], selector=ScatteredBlocks())
    other = plan.swapped()
    assert other.modes.tolist() == [[pair[1], pair[0], pair[0]]]
    assert other.modes.dtype == torch.int8
    assert other.gate is None
    assert torch.equal(other.swapped().modes, plan.modes)
    kept = ("retrieval", "sparse", "streaming", "selector", "block_size")
    assert all(getattr(other, name) == getattr(plan, name) for name in kept)


def test_with_modes_keeps_everything_but_modes_and_gate() -> None:
    plan = HeadPlan.from_gate(
        torch.ones(1, 2), streaming=Streaming(32, 64), selector=XAttention(), block_size=32
    )
    other = plan.with_modes(modes([2, 0], [0, 1]))
    assert other.modes.tolist() == [[2, 0], [0, 1]]
    assert other.gate is None
    assert (other.streaming, other.selector, other.block_size) == (
        Streaming(32, 64),
        XAttention(),
        32,
    )
    assert plan.modes.tolist() == [[1, 1]]


def test_lanes_are_known_without_reading_the_modes() -> None:
    plan = HeadPlan(modes([0]).to("meta"), check=False)
    assert plan.lanes == {FULL, STREAMING}
    assert HeadPlan(modes([0]), selector=XAttention()).lanes == {FULL, STREAMING, SELECTED}


def test_modes_may_be_given_as_plain_integers() -> None:
    plan = HeadPlan(modes([2]), retrieval=2, sparse=1, selector=XAttention())  # type: ignore[arg-type]
    assert plan.retrieval is SELECTED
    assert plan.sparse is STREAMING


# --- Refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"modes": [[0, 1]]}, ValueError, "modes must be a tensor"),
        ({"modes": modes([0, 1])[0]}, ValueError, "modes must be a tensor"),
        ({"modes": modes([0, 1]).long()}, TypeError, r"modes must be int8.*modes\.to"),
        ({"modes": modes([0, 3])}, ValueError, "modes must be HeadMode values.*0 to 3"),
        ({"modes": modes([-1, 1])}, ValueError, "modes must be HeadMode values.*-1 to 1"),
        ({"modes": modes([0, 2])}, ValueError, "selector is missing: modes holds SELECTED"),
        ({"retrieval": 3}, ValueError, "retrieval must be a HeadMode.*got 3"),
        ({"retrieval": True}, ValueError, "retrieval must be a HeadMode.*got True"),
        ({"sparse": "ssa"}, ValueError, "sparse must be a HeadMode.*got 'ssa'"),
        ({"sparse": 1.0}, ValueError, "sparse must be a HeadMode"),
        ({"sparse": None}, ValueError, "sparse must be a HeadMode"),
        ({"sparse": SELECTED}, ValueError, r"selector is missing.*selector=XAttention\(\)"),
        ({"streaming": (128, 2048)}, TypeError, "streaming must be a Streaming"),
        ({"streaming": Streaming(128, 64)}, ValueError, "local=64 is no multiple of block_size"),
        ({"streaming": Streaming(64, 128)}, ValueError, "sink=64 is no multiple of block_size"),
        ({"selector": XAttention}, TypeError, "selector must be a BlockSelector"),
        (
            {"selector": XAttention(32), "block_size": 16},
            ValueError,
            "stride=32 must divide block_size=16",
        ),
        ({"block_size": 48}, ValueError, "block_size must be 16, 32, 64 or 128"),
        ({"block_size": 8}, ValueError, "block_size must be 16, 32, 64 or 128"),
        ({"block_size": 256}, ValueError, "block_size must be 16, 32, 64 or 128"),
        ({"block_size": True}, TypeError, "block_size must be an int"),
        ({"block_size": 64.0}, TypeError, "block_size must be an int"),
        ({"gate": [[0.0, 1.0]]}, TypeError, "gate must be a float tensor"),
        ({"gate": modes([0, 1])}, TypeError, "gate must be a float tensor"),
        ({"gate": torch.zeros(1, 3)}, ValueError, "gate must have the shape and device of modes"),
        ({"gate": torch.zeros(1, 2).to("meta")}, ValueError, "gate must have the shape and device"),
    ],
)
def test_plan_refuses(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        HeadPlan(**{"modes": modes([0, 1]), **fields})


@pytest.mark.parametrize("gate", [None, [[0.0]], torch.zeros(2), torch.zeros(1, 2).int()])
def test_from_gate_refuses(gate: Any) -> None:
    with pytest.raises(ValueError, match="gate must be a float tensor"):
        HeadPlan.from_gate(gate)
