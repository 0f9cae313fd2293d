"""The conformance suite covers its matrix, and no broken backend gets through."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from elasticore import (
    AttentionRequest,
    HeadMode,
    HeadPlan,
    HybridHeadAttention,
    SequenceLayout,
    UnsupportedRequest,
    Verdict,
    register_backend,
    straight_through,
    testing,
)
from elasticore.testing import Case, Problem, cases
from tests.plans import mixed

pytestmark = pytest.mark.usefixtures("clean_registry")

AXES = {
    "layout": cases.LAYOUTS,
    "group": cases.GROUPS,
    "head_dim": cases.HEAD_DIMS,
    "length": cases.LENGTHS,
    "queries": cases.QUERIES,
    "preset": tuple(cases.PRESETS),
}
TINY = (
    Case("dense", 1, 32, 129, "all", "128"),
    Case("left", 4, 32, 129, "some", "32"),
    Case("packed", 4, 32, 128, "all", "64"),
    Case("right", 4, 32, 127, "all", "32"),
)


# --- The matrix ----------------------------------------------------------------------------------


MATRIX = testing.matrix()


@pytest.mark.parametrize(("one", "other"), list(itertools.combinations(AXES, 2)))
def test_every_pair_of_values_is_covered(one: str, other: str) -> None:
    """And not by cases too small to show anything, unless the pair itself says so."""
    cases = MATRIX
    if "length" not in (one, other):
        cases = [case for case in cases if case.length > 1]
        if "queries" not in (one, other):
            cases = [case for case in cases if case.queries != "one"]
    met = {(getattr(case, one), getattr(case, other)) for case in cases}
    assert met == set(itertools.product(AXES[one], AXES[other]))


def test_the_cover_is_small_and_always_the_same() -> None:
    assert testing.matrix() == MATRIX
    assert len({str(case) for case in MATRIX}) == len(set(MATRIX)) == len(MATRIX) < 100


def test_the_full_matrix_has_every_combination() -> None:
    cases = testing.matrix(full=True)
    assert len(set(cases)) == len(cases) == math.prod(map(len, AXES.values()))
    assert set(MATRIX) <= set(cases)


@pytest.mark.parametrize("preset", list(cases.PRESETS))
@pytest.mark.parametrize("length", [129, 2177])
def test_one_token_more_than_whole_blocks_tells_the_lanes_apart(length: int, preset: str) -> None:
    problem = mixed(testing.make_problem(Case("dense", 4, 32, length, "some", preset)))
    full, streaming, selected = (testing.attended(problem, 0, mode) for mode in HeadMode)
    assert not torch.equal(full, streaming)
    assert not torch.equal(full, selected)
    assert not torch.equal(streaming, selected)


def test_without_naming_lanes_a_check_takes_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pair of two lanes, with both decisions in a batch."""
    met: list[Problem] = []

    def make(*args: Any, **settings: Any) -> Problem:
        met.append(testing.make_problem(*args, **settings))
        return met[-1]

    monkeypatch.setattr(testing.checks, "make_problem", make)
    for check in (testing.check_output, testing.check_same_alone, testing.check_repeatable):
        met.clear()
        check("serial", TINY[1])
        lanes = {frozenset(problem.plan.lanes) for problem in met}
        assert lanes == {frozenset(pair) for pair in itertools.combinations(HeadMode, 2)}
        assert all(problem.plan.decisions.unique().tolist() == [0, 1] for problem in met)


# --- The reference -------------------------------------------------------------------------------


def test_the_reference_is_causal_attention() -> None:
    q, k, v = (torch.randn(2, 2, 20, 8, dtype=torch.float64) for _ in range(3))
    plan = HeadPlan(torch.zeros(2, 2, dtype=torch.int8))
    ours = testing.dense_attention(Problem(q, k, v, plan, SequenceLayout.dense(), 0.3))
    torch.testing.assert_close(
        ours, scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.3)
    )


def test_the_reference_by_hand() -> None:
    # Scores log 1, log 2, log 5 and values 8, 4, 0: means 8, 16/3 and 2.
    k = torch.tensor([1.0, 2.0, 5.0]).double().log().reshape(1, 1, 3, 1)
    v = torch.tensor([8.0, 4.0, 0.0]).double().reshape(1, 1, 3, 1)
    plan = HeadPlan(torch.zeros(1, 1, dtype=torch.int8))
    problem = Problem(torch.ones_like(k), k, v, plan, SequenceLayout.dense(), 1.0)
    ours = testing.dense_attention(problem).flatten()
    torch.testing.assert_close(ours, torch.tensor([8.0, 16 / 3, 2.0], dtype=torch.float64))


# --- Backends, right and wrong -------------------------------------------------------------------


class Right(HybridHeadAttention):
    """Every head of every sequence by itself, under a mask: slow, short and correct.

    The wrong backends below each change one of its methods.
    """

    name = "toy"

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        return Verdict(True)

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        plan: HeadPlan,
        *,
        layout: SequenceLayout,
        scale: float,
    ) -> Tensor:
        layout, scale = self.layout(layout), self.scale(scale, q.shape[3])
        out = self.heads(q, k, v, plan, layout, scale)
        if plan.gate is None:
            return out
        other = self.heads(q, k, v, plan.swapped(), layout, scale).detach()
        return straight_through(self.gate(plan.gate), out, other, layout, k.shape[2])

    def heads(
        self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, layout: SequenceLayout, scale: float
    ) -> Tensor:
        segments = layout.segments(q.shape[0], q.shape[2], k.shape[2], q.device)
        lists = None
        if bool((plan.modes == HeadMode.SELECTED).any()):
            assert plan.selector is not None
            lists = plan.selector.select(q, k, segments, block_size=plan.block_size, scale=scale)
        out = self.empty(q)
        for index, (row, q_start, q_length, k_start, k_length) in enumerate(
            torch.stack(segments, 1).tolist()
        ):
            for h in range(q.shape[1] if q_length else 0):
                kv_head = self.kv_head(h, q.shape[1], k.shape[1])
                mode = self.mode(plan, index, kv_head)
                place = (row, h, slice(q_start, q_start + q_length))
                keys = (row, kv_head, slice(k_start, k_start + k_length))
                positions = torch.arange(k_length)
                rows = self.rows(q_length, k_length)[:, None]
                block, row_block = positions // plan.block_size, rows // plan.block_size
                if mode == HeadMode.STREAMING:
                    sink, local = plan.streaming.blocks(plan.block_size)
                    visible = self.window(block, row_block, sink, local)
                elif mode == HeadMode.SELECTED:
                    assert lists is not None
                    mask = lists.to_mask(-(-k.shape[2] // plan.block_size))
                    first = (k_length - q_length) // plan.block_size
                    chosen = mask[self.listed(index), self.listed(h)]
                    visible = chosen[row_block[:, 0] - first][:, block]
                else:
                    visible = block <= row_block
                scores = (q[place] @ k[keys].T * scale).masked_fill(
                    ~(visible & self.causal(positions, rows)), -torch.inf
                )
                out[place] = scores.softmax(-1) @ self.values(v[keys], h)
        return out

    def layout(self, layout: SequenceLayout) -> SequenceLayout:
        return layout

    def scale(self, scale: float, dim: int) -> float:
        return scale

    def gate(self, gate: Tensor) -> Tensor:
        return gate

    def empty(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def kv_head(self, head: int, heads: int, kv_heads: int) -> int:
        return head // (heads // kv_heads)

    def mode(self, plan: HeadPlan, sequence: int, kv_head: int) -> int:
        return int(plan.modes[sequence, kv_head])

    def rows(self, queries: int, keys: int) -> Tensor:
        return torch.arange(keys - queries, keys)

    def window(self, block: Tensor, row_block: Tensor, sink: int, local: int) -> Tensor:
        return (block < sink) | (block > row_block - local)

    def listed(self, index: int) -> int:
        return index

    def causal(self, positions: Tensor, rows: Tensor) -> Tensor:
        return positions <= rows

    def values(self, v: Tensor, head: int) -> Tensor:
        return v


class WindowOneBlockShort(Right):
    def window(self, block: Tensor, row_block: Tensor, sink: int, local: int) -> Tensor:
        return (block < sink) | (block >= row_block - local + 2) | (block == row_block)


class WindowOneBlockLong(Right):
    def window(self, block: Tensor, row_block: Tensor, sink: int, local: int) -> Tensor:
        return (block < sink) | (block >= row_block - local)


class NoSink(Right):
    def window(self, block: Tensor, row_block: Tensor, sink: int, local: int) -> Tensor:
        return block > row_block - local


class SeesTheFutureInTheDiagonalBlock(Right):
    def causal(self, positions: Tensor, rows: Tensor) -> Tensor:
        return positions // 16 <= rows // 16


class QueriesAtTheFront(Right):
    def rows(self, queries: int, keys: int) -> Tensor:
        return torch.arange(queries)


class OneRoutingForTheBatch(Right):
    def mode(self, plan: HeadPlan, sequence: int, kv_head: int) -> int:
        return int(plan.modes[0, kv_head])


class OneListForAllHeads(Right):
    def listed(self, index: int) -> int:
        return 0


class ReadsPadding(Right):
    def layout(self, layout: SequenceLayout) -> SequenceLayout:
        return SequenceLayout.dense() if layout.kind == "padded" else layout


class WritesToPadding(Right):
    def empty(self, q: Tensor) -> Tensor:
        return torch.ones_like(q)


class InterleavedGroups(Right):
    def kv_head(self, head: int, heads: int, kv_heads: int) -> int:
        return head % kv_heads


class ItsOwnScale(Right):
    def scale(self, scale: float, dim: int) -> float:
        return dim**-0.5


class HalfPrecisionInside(Right):
    def values(self, v: Tensor, head: int) -> Tensor:
        return v.bfloat16().to(v.dtype)


class OtherDtype(Right):
    def empty(self, q: Tensor) -> Tensor:
        return torch.zeros_like(q, dtype=torch.float64)


class NotRepeatable(Right):
    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, **rest: Any) -> Tensor:
        out = super().attend(q, k, v, plan, **rest)
        return torch.nextafter(out, torch.rand_like(out) - 0.5)  # one rounding, up or down


class GateOfTheWrongSign(Right):
    def gate(self, gate: Tensor) -> Tensor:
        return 2 * gate.detach() - gate


class GateOfTheFirstSequence(Right):
    def gate(self, gate: Tensor) -> Tensor:
        return torch.cat([gate[:1], gate[1:].detach()])


class GateAFifthOff(Right):
    def gate(self, gate: Tensor) -> Tensor:
        return gate + 0.2 * (gate - gate.detach())


class ValueGradientOfOneQueryHead(Right):
    def values(self, v: Tensor, head: int) -> Tensor:
        return v if head % 2 else v.detach()


def output(case: Case) -> None:
    testing.check_output("toy", case)


def output_in_float32(case: Case) -> None:
    testing.check_output("toy", case, dtype=torch.float32)


def gradients(case: Case) -> None:
    for lanes in itertools.permutations(HeadMode, 2):
        testing.check_gradients("toy", case, lanes=lanes)


def gradients_in_float16(case: Case) -> None:
    testing.check_gradients("toy", case, dtype=torch.float16)


def same_alone(case: Case) -> None:
    testing.check_same_alone("toy", case)


def repeatable(case: Case) -> None:
    testing.check_repeatable("toy", case)


CHECKS = (
    output,
    output_in_float32,
    gradients,
    gradients_in_float16,
    same_alone,
    repeatable,
)
BROKEN = [
    (WindowOneBlockShort, output),
    (WindowOneBlockLong, output),
    (WindowOneBlockLong, gradients),
    (NoSink, output),
    (SeesTheFutureInTheDiagonalBlock, output),
    (SeesTheFutureInTheDiagonalBlock, gradients),
    (QueriesAtTheFront, output),
    (OneRoutingForTheBatch, output),
    (OneRoutingForTheBatch, same_alone),
    (OneListForAllHeads, output),
    (ReadsPadding, output),
    (WritesToPadding, output),
    (InterleavedGroups, output),
    (ItsOwnScale, output),
    (HalfPrecisionInside, output),
    (HalfPrecisionInside, output_in_float32),
    (OtherDtype, output_in_float32),
    (NotRepeatable, repeatable),
    (GateOfTheWrongSign, gradients),
    (GateOfTheFirstSequence, gradients),
    (GateAFifthOff, gradients_in_float16),
    (ValueGradientOfOneQueryHead, gradients),
]


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("case", TINY, ids=str)
def test_a_right_backend_passes(case: Case, check: Callable[[Case], None]) -> None:
    register_backend("toy", Right)
    check(case)


@pytest.mark.parametrize(("backend", "check"), BROKEN)
def test_a_broken_backend_is_rejected(
    backend: type[HybridHeadAttention], check: Callable[[Case], None]
) -> None:
    register_backend("toy", backend)

    def caught(case: Case) -> bool:
        try:
            check(case)
        except AssertionError as error:
            return str(case) in str(error)  # the message says where
        return False

    assert any(caught(case) for case in TINY)


# --- check_backend -------------------------------------------------------------------------------


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    """check_backend on the tiny cases only."""
    monkeypatch.setattr(testing.checks, "matrix", lambda full=False: list(TINY))


@pytest.mark.usefixtures("short")
def test_check_backend_counts_what_passed() -> None:
    seen = []

    def progress(cases: Any) -> Iterator[Case]:
        for case in cases:
            seen.append(case)
            yield case

    register_backend("toy", Right)
    counts = testing.check_backend("toy", dtypes=[torch.float64], progress=progress)
    assert counts == {
        "output": 4,
        "gradients": 4,
        "same alone": 4,
        "repeatable": 4,
        "pages": 0,
        "unsupported": 2,  # it reads no pages
    }
    assert seen == list(TINY)


class ForwardOnly(Right):
    def supports(self, request: AttentionRequest) -> Verdict:
        return Verdict(not request.gradients and request.dtype is torch.float32, "inference only.")


@pytest.mark.usefixtures("short")
def test_check_backend_counts_what_is_not_supported() -> None:
    register_backend("toy", ForwardOnly)
    counts = testing.check_backend("toy")
    assert counts == {
        "output": 4,
        "gradients": 0,
        "same alone": 4,
        "repeatable": 4,
        "pages": 0,
        "unsupported": 16 + 4 + 4,
    }
    with pytest.raises(UnsupportedRequest, match="inference only"):
        testing.check_gradients("toy", TINY[0])


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("backend", sorted({b for b, _ in BROKEN}, key=lambda b: b.__name__))
def test_check_backend_stops_at_the_first_failure(backend: type[HybridHeadAttention]) -> None:
    register_backend("toy", backend)
    with pytest.raises(AssertionError):
        testing.check_backend("toy")
