"""The FlashInfer backend: its requests are the pattern, plans are kept, and refusals say why."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import itertools
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

import elasticore as ec
from elasticore import HeadMode, HeadPlan, SequenceLayout, Streaming, Verdict, testing
from elasticore.backends import flashinfer as backend
from elasticore.backends.flashinfer import FlashInferAttention
from elasticore.backends.registry import list_backends, register_backend
from elasticore.testing import Case
from elasticore.testing.cases import PAIRS
from tests.plans import pair_of


class Prefill:
    """What FlashInfer's wrappers promise, request by request, in plain PyTorch."""

    plans = 0

    def begin(
        self, query_starts: Tensor, heads: int, kv_heads: int, common: dict[str, Any]
    ) -> None:
        Prefill.plans += 1
        assert kv_heads == 1
        assert common["causal"]
        assert query_starts.dtype == torch.int32
        self.query_starts, self.heads = query_starts.tolist(), heads
        self.scale = common["sm_scale"]

    def attend(self, q: Tensor, keys: list[tuple[Tensor, Tensor]], out: Tensor) -> Tensor:
        assert q.shape[:2] == (self.query_starts[-1], self.heads)
        for n, (k, v) in enumerate(keys):
            rows = slice(self.query_starts[n], self.query_starts[n + 1])
            queries = rows.stop - rows.start
            assert queries <= k.shape[0]
            if not queries:
                continue
            causal = torch.ones(queries, k.shape[0]).tril(k.shape[0] - queries).bool()
            part = scaled_dot_product_attention(
                q[rows].transpose(0, 1)[None],
                k[None, None],
                v[None, None],
                attn_mask=causal,
                scale=self.scale,
                enable_gqa=True,
            )
            out[rows] = part[0].transpose(0, 1)
        return out


class PagedPrefill(Prefill):
    def plan(
        self,
        query_starts: Tensor,
        page_starts: Tensor,
        pages: Tensor,
        tails: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        page_size: int,
        *,
        max_token_per_sequence: int,
        **common: Any,
    ) -> None:
        self.begin(query_starts, heads, kv_heads, common)
        assert {x.dtype for x in (page_starts, pages, tails)} == {torch.int32}
        assert int(query_starts.diff().max()) == max_token_per_sequence
        assert bool((tails > 0).all() and (tails <= page_size).all())
        self.page_starts, self.pages = page_starts.tolist(), pages.tolist()
        self.tails, self.page_size = tails.tolist(), page_size

    def run(self, q: Tensor, cache: tuple[Tensor, Tensor], *, out: Tensor) -> Tensor:
        keys = []
        for n, tail in enumerate(self.tails):
            pages = self.pages[self.page_starts[n] : self.page_starts[n + 1]]
            lengths = [self.page_size] * (len(pages) - 1) + [tail]
            one = list(zip(pages, lengths, strict=True))
            k, v = (torch.cat([self.tokens(x, *page) for page in one]) for x in cache)
            keys.append((k, v))
        return self.attend(q, keys, out)

    @staticmethod
    def tokens(cache: Tensor, page: int, length: int) -> Tensor:
        """A page's first tokens; the last page may end beyond the bounds that PyTorch knows."""
        unit, token = cache.stride()[:2]
        start = cache.storage_offset() + page * unit
        return cache.as_strided((length, cache.shape[3]), (token, 1), start)


class RaggedPrefill(Prefill):
    def plan(
        self,
        query_starts: Tensor,
        key_starts: Tensor,
        heads: int,
        kv_heads: int,
        head_dim: int,
        **common: Any,
    ) -> None:
        self.begin(query_starts, heads, kv_heads, common)
        assert key_starts.dtype == torch.int32
        self.key_starts = key_starts.tolist()

    def run(self, q: Tensor, k: Tensor, v: Tensor, *, out: Tensor) -> Tensor:
        assert k.shape == v.shape == (self.key_starts[-1], 1, q.shape[2])
        spans = [slice(*span) for span in itertools.pairwise(self.key_starts)]
        for span in spans:  # whole tiles are fetched, and what lies in one may not be NaN
            tile = slice(span.start, -(-span.stop // 128) * 128)
            assert bool(torch.isfinite(k[tile]).all() and torch.isfinite(v[tile]).all())
        return self.attend(q, [(k[span, 0], v[span, 0]) for span in spans], out)


class OnCpu(FlashInferAttention):
    devices = ("cpu",)

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)

    def _wrapper(self, *args: Any, ragged: bool) -> Prefill:
        return RaggedPrefill() if ragged else PagedPrefill()


@pytest.fixture(params=[False, True], ids=["paged", "ragged"])
def engine(
    request: pytest.FixtureRequest, clean_registry: None, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The backend, whose requests are run by the classes above, in any dtype and head_dim.

    FULL heads read pages, or rows as on Hopper.
    """
    monkeypatch.setattr(backend, "DTYPES", (torch.float64, torch.float32))
    monkeypatch.setattr(backend, "HEAD_DIMS", range(1, 257))
    monkeypatch.setattr(backend, "_by_tma", lambda q: request.param)
    monkeypatch.setattr(Prefill, "plans", 0)
    register_backend("flashinfer", OnCpu, replace=True)
    return "flashinfer"


# --- Requests are the pattern --------------------------------------------------------------------

SMALL = [
    case
    for case in testing.matrix()
    if case.length < 300 or (case.queries == "one" and case.group == 1)
]


@pytest.mark.parametrize("case", SMALL, ids=str)
def test_requests_read_what_the_pattern_says(case: Case, engine: str) -> None:
    testing.check_output(engine, case)
    testing.check_same_alone(engine, case)


@settings(max_examples=30)
@given(data=st.data())
def test_any_layout_and_routing(data: st.DataObject, engine: str) -> None:
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
        torch.randn(1, max(1, sum(n) + spare), heads, 32, generator=generator).double()
        for n, heads in ((queries, 4), (lengths, 2), (lengths, 2))
    )
    if draw(st.booleans(), label="heads first"):
        q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    streaming = Streaming(draw(st.sampled_from([0, 16])), draw(st.sampled_from([16, 32])))
    pair = pair_of(draw(st.sampled_from(PAIRS)), streaming)
    plan = HeadPlan(torch.tensor(decisions, dtype=torch.int8), *pair, block_size=size)
    args = *(x.transpose(1, 2) for x in (q, k, v)), plan
    ours = ec.hybrid_head_attention(*args, layout=layout, backend=engine)
    reference = ec.hybrid_head_attention(*args, layout=layout, backend="serial")
    torch.testing.assert_close(ours, reference)


def test_keys_and_values_are_read_where_they_lie(engine: str) -> None:
    # A slice of a static cache, and heads in either place: no layout of a model takes a copy.
    for x in (torch.zeros(2, 4, 300, 64)[:, :, :257], torch.zeros(2, 257, 4, 64).transpose(1, 2)):
        k, v, _ = backend._pageable(x, x, 128)
        assert k.data_ptr() == v.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_a_scale_may_be_negative_or_zero(scale: float, engine: str) -> None:
    for lanes in PAIRS:
        problem = testing.make_problem(Case("left", 4, 32, 129, "some", "32"), lanes=lanes)
        problem = problem._replace(scale=scale)
        torch.testing.assert_close(problem.run(engine), problem.run("serial"))


# --- Plans ---------------------------------------------------------------------------------------


def problem_without_lists() -> testing.Problem:
    problem = testing.make_problem(Case("packed", 4, 32, 129, "all", "32"))
    decisions = torch.tensor([[0, 1], [1, 1], [1, 0]], dtype=torch.int8)
    return problem._replace(plan=problem.plan.with_decisions(decisions))


def test_a_routing_is_planned_once(engine: str) -> None:
    problem = problem_without_lists()
    first = problem.run(engine)
    again = problem._replace(plan=problem.plan.with_decisions(problem.plan.decisions.clone()))
    assert torch.equal(problem.run(engine), first)
    assert torch.equal(again.run(engine), first)
    assert Prefill.plans == 2  # FULL heads, and the others


def test_decisions_that_are_overwritten_are_planned_again(engine: str) -> None:
    problem = problem_without_lists()
    problem.run(engine)
    problem.plan.decisions.fill_(1)
    torch.testing.assert_close(problem.run(engine), problem.run("serial"))
    assert Prefill.plans == 3  # now there are no FULL heads


def test_lists_are_planned_in_every_call(engine: str) -> None:
    lanes = HeadMode.FULL, HeadMode.SELECTED
    problem = testing.make_problem(Case("dense", 4, 32, 129, "all", "32"), lanes=lanes)
    for q in (problem.q, problem.q.flip(2)):
        one = problem._replace(q=q)
        torch.testing.assert_close(one.run(engine), one.run("serial"))
    assert Prefill.plans == 4


def test_old_plans_are_given_back(engine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "PLANS", 2)
    ours = OnCpu()
    plan = HeadPlan(torch.tensor([[0, 1]], dtype=torch.int8), block_size=128)
    for length in (128, 200, 300, 128):
        x = torch.randn(1, 2, length, 32)
        ours.attend(x, x, x, plan, layout=SequenceLayout.dense(), scale=0.25)
    assert len(ours._plans) == 2
    assert Prefill.plans == 2 * 4
    del plan
    assert not ours._routings._memos


# --- Refusals ------------------------------------------------------------------------------------


def request(**changes: Any) -> ec.AttentionRequest:
    problem = testing.make_problem(Case("dense", 4, 128, 129, "all", "128"), dtype=torch.bfloat16)
    one = ec.AttentionRequest.of(problem.q, problem.k, problem.v, problem.plan, problem.layout)
    return dataclasses.replace(one, **{"device": torch.device("cuda"), **changes})


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": torch.float32}, "float32 is none of"),
        ({"head_dim": 32}, "head_dim 32 is none of 64, 128, 256"),
        ({"gradients": True}, "no backward pass; use the triton or flex"),
        ({"device": torch.device("cpu")}, "runs on NVIDIA GPUs"),
    ],
)
def test_what_it_cannot_do_is_refused(changes: dict[str, Any], reason: str) -> None:
    assert FlashInferAttention().supports(request())
    verdict = FlashInferAttention().supports(request(**changes))
    assert not verdict
    assert reason in verdict.reason


@pytest.mark.parametrize(
    ("missing", "reason"),
    [
        ({"flashinfer", "tvm_ffi"}, "pip install 'elasticore[flashinfer]'"),
        ({"tvm_ffi"}, "installed without apache-tvm-ffi; pip install apache-tvm-ffi"),
        (set(), "no NVIDIA GPU"),
    ],
)
def test_why_it_is_not_available(
    missing: set[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lambda name: None if name in missing else object()  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in FlashInferAttention.available().reason


@pytest.mark.parametrize(
    ("version", "ok"), [("0.6.7", False), ("0.6.8", True), ("0.7.2.post1", True), ("0.10.0", True)]
)
def test_how_old_it_may_be(version: str, ok: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda package: version)
    verdict = backend._version.__wrapped__()
    assert verdict.ok is ok
    assert ok or "upgrade" in verdict.reason


def test_a_package_that_fails_to_load_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)  # makes the import fail
    with pytest.raises(ec.UnsupportedRequest, match=r"fails to load.*--force-reinstall"):
        backend._import()


# --- On a GPU ------------------------------------------------------------------------------------

GPU_CASES = [
    Case("dense", 4, 128, 2177, "all", "128"),
    Case("left", 7, 64, 2049, "some", "128"),
    Case("right", 1, 128, 2048, "all", "64"),
    Case("packed", 8, 128, 2175, "some", "128"),
    Case("packed", 4, 64, 127, "all", "32"),
    Case("left", 8, 128, 2176, "one", "128"),
    Case("dense", 4, 64, 2047, "one", "64"),
]


def needs_flashinfer() -> None:
    row = next(row for row in list_backends() if row.name == "flashinfer")
    if not row.available:
        pytest.skip(row.reason)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", GPU_CASES, ids=str)
def test_conformance(case: Case, dtype: torch.dtype) -> None:
    needs_flashinfer()
    for check in (testing.check_output, testing.check_same_alone, testing.check_repeatable):
        check("flashinfer", case, dtype=dtype, device="cuda")
