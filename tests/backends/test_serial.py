"""The serial backend: conformance, memory, decoding, padding and the gate."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from elasticore import (
    HeadMode,
    HeadPlan,
    SequenceLayout,
    Streaming,
    UnsupportedRequest,
    XAttention,
    hybrid_head_attention,
    testing,
)
from elasticore.testing import Case, Problem, ScatteredBlocks
from elasticore.testing.cases import LAYOUTS, PAIRS
from tests.plans import pair_of, plan_of

FULL, STREAMING, SELECTED = HeadMode
MODES = [pytest.param(mode, id=mode.name.lower()) for mode in HeadMode]
EPS = torch.finfo(torch.float64).eps


def run(
    q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, layout: SequenceLayout | None = None
) -> Tensor:
    return hybrid_head_attention(q, k, v, plan, layout=layout, backend="serial")


def draw(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def one_mode(mode: HeadMode, kv_heads: int, **settings: Any) -> HeadPlan:
    """A plan of one sequence whose heads all run ``mode``, in blocks of 16 by default."""
    return plan_of(
        [[int(mode)] * kv_heads], **{"streaming": Streaming(16, 32), "block_size": 16, **settings}
    )


def same(ours: Tensor, other: Tensor) -> None:
    """Equal up to the roundings of two sums of the same terms in float64."""
    torch.testing.assert_close(ours, other, rtol=64 * EPS, atol=64 * EPS)


# --- Conformance ---------------------------------------------------------------------------------


def costly(case: Case) -> bool:
    return case.length > 1000 and case.queries == "all"


CASES = [
    pytest.param(case, pair, id=str(case), marks=pytest.mark.slow if costly(case) else ())
    for case, pair in zip(testing.matrix(), itertools.cycle(PAIRS), strict=False)
]
FEW = [
    Case("left", 4, 64, 129, "all", "32"),
    Case("right", 7, 32, 128, "some", "64"),
    Case("packed", 8, 128, 127, "all", "128"),
    Case("dense", 1, 64, 2177, "one", "128"),
]


@pytest.mark.parametrize(("case", "pair"), CASES)
def test_output(case: Case, pair: tuple[HeadMode, HeadMode]) -> None:
    testing.check_output("serial", case)


@pytest.mark.parametrize(("case", "pair"), CASES)
def test_gradients(case: Case, pair: tuple[HeadMode, HeadMode]) -> None:
    testing.check_gradients("serial", case, lanes=pair)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_output_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    testing.check_output("serial", case, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_gradients_in_lower_precision(case: Case, dtype: torch.dtype) -> None:
    for pair in PAIRS:
        testing.check_gradients("serial", case, dtype=dtype, lanes=pair)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("case", FEW, ids=str)
def test_each_sequence_gives_what_it_gives_alone(case: Case, dtype: torch.dtype) -> None:
    testing.check_same_alone("serial", case, dtype=dtype)


@pytest.mark.parametrize("case", FEW, ids=str)
def test_two_runs_give_the_same_bits(case: Case) -> None:
    testing.check_repeatable("serial", case)


# --- Memory --------------------------------------------------------------------------------------


class Allocations(TorchDispatchMode):
    """Records what operations allocate: the largest tensor and what is still alive.

    It sees what PyTorch's dispatcher sees; scratch memory inside one kernel is invisible. With
    ``dim``, ``vectors`` is the largest one that holds head vectors: ``[..., n, dim]`` or its
    transpose.
    """

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self.largest = self.vectors = 0
        self._dim = dim
        self._alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> object:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                elements = storage.nbytes() // tensor.element_size()
                self._alive[StorageWeakRef(storage)] = elements
                self.largest = max(self.largest, elements)
                if self._dim in tensor.shape[-2:]:
                    self.vectors = max(self.vectors, elements)
        return out

    def alive(self) -> int:
        """Elements of the tensors that somebody still holds."""
        return sum(n for storage, n in self._alive.items() if not storage.expired())


LANES = [
    pytest.param(FULL, 4096, id="full"),
    pytest.param(FULL, 1536, id="full-chunk"),
    pytest.param(STREAMING, 4096, id="streaming"),
    pytest.param(SELECTED, 4096, id="selected"),
]


@pytest.mark.parametrize(("mode", "queries"), LANES)
def test_nothing_as_large_as_the_scores_is_held(mode: HeadMode, queries: int) -> None:
    """Neither one tensor, nor all that waits for the backward, is of the size Tq × Tk per head."""
    kv_heads, group, keys, dim = 1, 2, 4096, 16
    q = draw(1, kv_heads * group, queries, dim, dtype=torch.float32).requires_grad_()
    k, v = (
        draw(1, kv_heads, keys, dim, dtype=torch.float32, seed=s).requires_grad_() for s in (1, 2)
    )
    plan = one_mode(mode, kv_heads, streaming=Streaming(128, 256), block_size=128)
    scores = queries * keys * kv_heads * group
    with Allocations() as forward:
        out = run(q, k, v, plan)
        held = forward.alive()
    with Allocations() as backward:
        out.square().sum().backward()
    assert forward.largest * 4 < scores
    assert backward.largest * 4 < scores
    assert held * 4 < scores


def test_what_waits_for_the_backward_grows_with_the_length_not_its_square() -> None:
    def held(mode: HeadMode, keys: int) -> int:
        q, k, v = (
            draw(1, 1, n, 4, dtype=torch.float32).requires_grad_() for n in (keys // 2, keys, keys)
        )
        plan = one_mode(mode, 1, streaming=Streaming(128, 256), block_size=128)
        with Allocations() as allocations:
            out = run(q, k, v, plan)
            assert out.requires_grad
            return allocations.alive()

    for mode in HeadMode:
        assert held(mode, 8192) < 3 * held(mode, 4096)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("queries", [1, 200])
def test_keys_and_values_are_never_repeated(
    mode: HeadMode, dtype: torch.dtype, queries: int
) -> None:
    """No allocation of head vectors is as large as K of every query head (in the forward)."""
    kv_heads, group, keys, dim = 2, 4, 2048, 24
    q = draw(1, kv_heads * group, queries, dim, dtype=dtype)
    k, v = (draw(1, kv_heads, keys, dim, dtype=dtype, seed=s) for s in (1, 2))
    with torch.no_grad(), Allocations(dim) as allocations:
        run(q, k, v, one_mode(mode, kv_heads, streaming=Streaming(128, 1920), block_size=128))
    assert 0 < allocations.vectors < kv_heads * group * keys * dim


# --- The same result, however it is asked for ----------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_decoding_step_by_step_equals_prefill(mode: HeadMode) -> None:
    q, k, v = draw(1, 4, 70, 8), draw(1, 2, 70, 8, seed=1), draw(1, 2, 70, 8, seed=2)
    plan = one_mode(mode, 2)
    whole = run(q, k, v, plan)
    for step in range(70):
        one = run(q[:, :, step : step + 1], k[:, :, : step + 1], v[:, :, : step + 1], plan)
        same(one, whole[:, :, step : step + 1])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("chunk", [16, 37, 64])
def test_prefill_in_chunks_equals_one_go(mode: HeadMode, chunk: int) -> None:
    q, k, v = draw(1, 4, 150, 8), draw(1, 2, 150, 8, seed=1), draw(1, 2, 150, 8, seed=2)
    plan = one_mode(mode, 2)
    parts = [
        run(q[:, :, i : i + chunk], k[:, :, : i + chunk], v[:, :, : i + chunk], plan)
        for i in range(0, 150, chunk)
    ]
    same(torch.cat(parts, 2), run(q, k, v, plan))


@pytest.mark.parametrize("mode", MODES)
def test_a_static_cache_reads_only_what_is_filled(mode: HeadMode) -> None:
    q, k, v = draw(1, 4, 5, 8), draw(1, 2, 60, 8, seed=1), draw(1, 2, 60, 8, seed=2)
    expected = run(q, k, v, one_mode(mode, 2))
    spare = torch.full((1, 2, 40, 8), torch.nan, dtype=torch.float64)
    layout = SequenceLayout.padded(
        torch.tensor([0]), torch.tensor([99]), query_offset=torch.tensor([55])
    )
    cache = [torch.cat([x, spare], 2) for x in (k, v)]
    same(run(q, *cache, one_mode(mode, 2), layout), expected)


def test_a_window_over_everything_is_full_attention() -> None:
    q, k, v = draw(1, 4, 100, 8), draw(1, 2, 100, 8, seed=1), draw(1, 2, 100, 8, seed=2)
    full = run(q, k, v, one_mode(FULL, 2))
    for streaming in (Streaming(0, 112), Streaming(16, 96), Streaming(96, 16)):
        assert streaming.sink + streaming.local >= 100
        same(run(q, k, v, one_mode(STREAMING, 2, streaming=streaming)), full)
    # One block less and the last rows miss something.
    short = run(q, k, v, one_mode(STREAMING, 2, streaming=Streaming(0, 96)))
    assert not torch.allclose(short[:, :, 96:], full[:, :, 96:])
    same(short[:, :, :96], full[:, :, :96])


def test_selecting_every_block_is_full_attention() -> None:
    q, k, v = draw(1, 4, 100, 8), draw(1, 2, 100, 8, seed=1), draw(1, 2, 100, 8, seed=2)
    every = one_mode(SELECTED, 2, selector=ScatteredBlocks(share=1.0))
    same(run(q, k, v, every), run(q, k, v, one_mode(FULL, 2)))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("queries", ["all", "some"])
def test_xattention_reads_the_blocks_that_it_selects(layout: str, queries: str) -> None:
    problem = testing.make_problem(Case(layout, 2, 32, 129, queries, "32"), dtype=torch.float64)
    plan = dataclasses.replace(problem.plan, sparse=XAttention(threshold=0.5), check=True)
    ones = torch.ones_like(plan.decisions)
    problem = problem._replace(plan=plan.with_decisions(ones))
    full = problem._replace(plan=plan.with_decisions(1 - ones))
    same(problem.run("serial"), testing.dense_attention(problem))
    assert not torch.allclose(problem.run("serial"), full.run("serial"))


def test_strides_do_not_matter() -> None:
    q, k, v = draw(1, 4, 50, 8), draw(1, 2, 50, 8, seed=1), draw(1, 2, 50, 8, seed=2)
    plan = plan_of([[1, 2]], Streaming(16, 32), block_size=16)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    same(run(*strided, plan), run(q, k, v, plan))


def test_autocast_changes_neither_the_dtype_nor_the_result() -> None:
    q, k, v = (draw(1, 2, 40, 8, dtype=torch.float32, seed=s) for s in range(3))
    for mode in HeadMode:
        expected = run(q, k, v, one_mode(mode, 2))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(run(q, k, v, one_mode(mode, 2)), expected)


def test_what_it_cannot_compute_is_refused_with_the_reason() -> None:
    q = draw(1, 2, 4, 16).to(torch.float8_e4m3fn)
    with pytest.raises(UnsupportedRequest, match=r"dtype torch\.float8_e4m3fn is none of"):
        run(q, q, q, one_mode(FULL, 2))
    q, modes = (x.to("meta") for x in (draw(1, 2, 4, 16), torch.zeros(1, 2, dtype=torch.int8)))
    with pytest.raises(UnsupportedRequest, match="meta device"):
        run(q, q, q, HeadPlan(modes, check=False))


# --- Padding -------------------------------------------------------------------------------------


def padded_problem(side: str) -> Problem:
    """Two rows of 40 places; the second has 15 tokens, and NaN wherever there is padding."""
    problem = testing.make_problem(
        Case(side, 2, 32, 40, "all", "32"), dtype=torch.float64, gated=True
    )
    q, k, v = (x.detach().clone() for x in problem[:3])
    padding = torch.ones(3, 40, dtype=torch.bool)
    for row, _, _, start, length in torch.stack(problem.segments(), 1).tolist():
        padding[row, start : start + length] = False
    assert bool(padding.any())
    for x in (q, k, v):
        x.masked_fill_(padding[:, None, :, None], torch.nan)
        x.requires_grad_()
    return problem._replace(q=q, k=k, v=v)


@pytest.mark.parametrize("side", ["left", "right"])
def test_nan_in_padding_reaches_nothing(side: str) -> None:
    problem = padded_problem(side)
    assert problem.plan.gate is not None
    out = problem.run("serial")
    padding = problem.q.isnan()
    assert bool((out[padding] == 0).all()), "padding gives exactly zero"
    assert bool(out.isfinite().all())
    # What follows may also send NaN back from padding: the loss is masked there, 0 * NaN is not 0.
    upstream = torch.ones_like(out).masked_fill(padding, torch.nan)
    grads = torch.autograd.grad(out, (problem.q, problem.k, problem.v, problem.plan.gate), upstream)
    assert all(bool(grad.isfinite().all()) for grad in grads)
    for grad, x in zip(grads, problem[:3], strict=False):
        assert bool((grad[x.isnan()] == 0).all()), "padding gets exactly zero gradient"


@pytest.mark.parametrize("mode", MODES)
def test_rows_without_queries_and_packed_tails_are_zero(mode: HeadMode) -> None:
    q, k, v = draw(1, 2, 8, 8), draw(1, 2, 12, 8, seed=1), draw(1, 2, 12, 8, seed=2)
    layout = SequenceLayout.packed(torch.tensor([0, 3, 3, 7]), torch.tensor([0, 3, 6, 11]))
    plan = one_mode(mode, 2).with_decisions(torch.zeros(3, 2, dtype=torch.int8))
    out = run(q, k, v, plan, layout)
    assert bool((out[:, :, 7:] == 0).all())
    assert bool((out[:, :, :7] != 0).all())
    # A batch whose second row is all padding.
    layout = SequenceLayout.from_attention_mask(torch.tensor([[1] * 12, [0] * 12]))
    q, k, v = (torch.cat([x, x]) for x in (k, k, v))
    both = plan.with_decisions(torch.zeros(2, 2, dtype=torch.int8))
    out = run(q, k, v, both, layout)
    assert bool((out[1] == 0).all())
    same(out[:1], run(q[:1], k[:1], v[:1], one_mode(mode, 2)))


# --- The gate ------------------------------------------------------------------------------------


def gated(pair: tuple[HeadMode, HeadMode], gate: Tensor) -> HeadPlan:
    return HeadPlan.from_gate(gate, *pair_of(pair, Streaming(16, 16)), block_size=16)


@pytest.mark.parametrize("pair", PAIRS)
def test_the_gates_gradient_is_what_the_other_mode_would_have_changed(
    pair: tuple[HeadMode, HeadMode],
) -> None:
    """Σ dO·(O_sparse − O_retrieval), over the head's query group and the sequence's queries."""
    q, k, v = draw(2, 6, 80, 8), draw(2, 3, 80, 8, seed=1), draw(2, 3, 80, 8, seed=2)
    gate = torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 0.0]], requires_grad=True)
    upstream = draw(2, 6, 80, 8, seed=3)
    out = run(q, k, v, gated(pair, gate))
    (grad,) = torch.autograd.grad(out, gate, upstream)

    retrieval, sparse = (run(q, k, v, gated(pair, torch.full((2, 3), on))) for on in (0.0, 1.0))
    expected = (upstream * (sparse - retrieval)).unflatten(1, (3, 2)).sum((2, 3, 4))
    assert grad.dtype == gate.dtype
    # The sums are in float64; only the result is rounded to the gate's float32.
    torch.testing.assert_close(grad.double(), expected, rtol=1e-6, atol=1e-12)
    assert bool((expected.abs() > 1e-3).all())


@pytest.mark.parametrize("pair", PAIRS)
def test_gradients_of_q_k_v_flow_through_the_chosen_branch_only(
    pair: tuple[HeadMode, HeadMode],
) -> None:
    tensors = [draw(1, heads, 80, 8, seed=s).requires_grad_() for s, heads in enumerate((4, 2, 2))]
    gate = torch.tensor([[0.0, 1.0]], requires_grad=True)
    plan = gated(pair, gate)
    upstream = draw(1, 4, 80, 8, seed=3)
    out = run(*tensors, plan)
    plain = run(*tensors, dataclasses.replace(plan, gate=None, check=True))
    assert torch.equal(out, plain), "the gate does not change the output"
    for ours, expected in zip(
        torch.autograd.grad(out, tensors, upstream),
        torch.autograd.grad(plain, tensors, upstream),
        strict=True,
    ):
        assert torch.equal(ours, expected)


def test_a_gate_that_wants_no_gradient_costs_no_second_branch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    swapped = []
    monkeypatch.setattr(HeadPlan, "swapped", lambda self: swapped.append(1))
    q = draw(1, 2, 20, 8)
    run(q, q, q, gated((FULL, STREAMING), torch.tensor([[0.0, 1.0]])))
    with torch.no_grad():
        run(q, q, q, gated((FULL, STREAMING), torch.tensor([[0.0, 1.0]], requires_grad=True)))
    assert swapped == []


def test_the_gates_gradient_counts_no_neighbours_tokens() -> None:
    """Packed sequences, one empty, and a tail that nobody owns: each has its own gradient."""
    lengths = [40, 0, 17]
    q, k, v = draw(1, 2, 60, 8), draw(1, 1, 60, 8, seed=1), draw(1, 1, 60, 8, seed=2)
    layout = SequenceLayout.packed(torch.tensor([0, *itertools.accumulate(lengths)]))
    gate = torch.tensor([[1.0], [1.0], [0.0]], dtype=torch.float64, requires_grad=True)
    upstream = draw(1, 2, 60, 8, seed=3)
    (together,) = torch.autograd.grad(
        run(q, k, v, gated((FULL, STREAMING), gate), layout), gate, upstream
    )
    for index, (start, stop) in enumerate(((0, 40), (40, 40), (40, 57))):
        if start == stop:
            assert together[index].item() == 0
            continue
        one = gate[index : index + 1].detach().requires_grad_()
        parts = [x[:, :, start:stop] for x in (q, k, v, upstream)]
        (alone,) = torch.autograd.grad(
            run(*parts[:3], gated((FULL, STREAMING), one)), one, parts[3]
        )
        same(together[index : index + 1], alone)
        # Two blocks are sink and window: there is nothing to leave out, but for rounding.
        assert (alone.abs() > 1e-6).item() == (stop - start > 32)
