"""Attention over pages: wherever they lie, whoever shares them, whatever else is in the pool."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import elasticore as ec
from elasticore import testing
from elasticore.testing import Case, Problem

triton = pytest.importorskip("triton", reason="needs triton: pip install 'elasticore[triton]'")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("serial", "triton")


def problem(
    queries: list[int],
    lengths: list[int],
    modes: list[list[int]],
    *,
    group: int = 4,
    dim: int = 32,
    packed: bool = True,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    """Sequences in blocks of 16, which stream over a sink of 16 and a window of 32."""
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, tokens: int, rows: int = 1) -> Any:
        x = torch.randn(rows, heads, tokens, dim, generator=generator)
        return x.to(DEVICE, dtype)

    heads = len(modes[0])
    decisions = torch.tensor(modes, dtype=torch.int8, device=DEVICE)
    plan = ec.HeadPlan(decisions, ec.Full(), ec.Streaming(16, 32), block_size=16)
    if packed:
        cumulative = [torch.tensor([0, *itertools.accumulate(x)], device=DEVICE)
                      for x in (queries, lengths)]  # fmt: skip
        layout = ec.SequenceLayout.packed(*cumulative)
        q, k, v = (draw(n, sum(x)) for n, x in
                   ((heads * group, queries), (heads, lengths), (heads, lengths)))  # fmt: skip
    else:
        layout, rows = ec.SequenceLayout.dense(), len(lengths)
        q, k, v = (draw(n, x[0], rows) for n, x in
                   ((heads * group, queries), (heads, lengths), (heads, lengths)))  # fmt: skip
    return Problem(q, k, v, plan, layout, 0.2)


def close(ours: torch.Tensor, reference: torch.Tensor) -> None:
    """Within float32's rounding of sums over some hundred keys."""
    torch.testing.assert_close(ours.double(), reference, rtol=0, atol=2e-5)


@st.composite
def calls(draw: Any) -> tuple[Problem, int, int, bool]:
    packed = draw(st.booleans())
    sequences = draw(st.integers(1, 3))
    page = draw(st.sampled_from([16, 32]))
    edges = st.integers(0, 4).flatmap(
        lambda n: st.integers(-1, 1).map(lambda d: max(1, n * page + d))
    )
    lengths = [draw(edges) for _ in range(sequences if packed else 1)]
    queries = [min(n, draw(st.integers(1, 8) | st.integers(1, 80))) for n in lengths]
    if not packed:
        lengths, queries = lengths * sequences, queries * sequences
    modes = [[draw(st.integers(0, 1)) for _ in range(2)] for _ in range(sequences)]
    one = problem(queries, lengths, modes, group=draw(st.sampled_from([1, 4, 7])), packed=packed)
    return one, page, draw(st.integers(0, 99)), draw(st.booleans())


@pytest.mark.parametrize("backend", BACKENDS)
def test_pages_anywhere(backend: str) -> None:
    """Lengths at the edges of pages, tables out of order, NaN in what no table names."""

    @settings(max_examples=25 if backend == "triton" and DEVICE == "cpu" else 100, deadline=None)
    @given(calls())
    def check(call: tuple[Problem, int, int, bool]) -> None:
        one, page, seed, by_head = call
        pages = testing.paged(one, page, seed=seed, by_head=by_head)
        close(testing.run_paged(one, pages, backend), testing.dense_attention(one))

    check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 16])
def test_sequences_and_heads_share_pages(backend: str, queries: int) -> None:
    """A prefix that all have is there once."""
    one = problem([queries] * 2, [75] * 2, [[0, 0], [1, 0]], packed=False)
    one.k[:, :, :64], one.v[:, :, :64] = one.k[:1, :1, :64].clone(), one.v[:1, :1, :64].clone()
    pages = testing.paged(one, 16)
    table = pages.table.clone()
    table[:, :, :4] = table[0, 0, :4]
    shared = dataclasses.replace(pages, table=table)
    close(testing.run_paged(one, shared, backend), testing.dense_attention(one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_queries_without_keys_are_padding(backend: str) -> None:
    """A row that is empty, one that is shorter than the pass, and one that is not."""
    one = problem([3] * 3, [60] * 3, [[0, 1]] * 3, packed=False)
    pages = testing.paged(one, 16)
    lengths = torch.tensor([0, 2, 60], device=DEVICE)
    out = testing.run_paged(one, dataclasses.replace(pages, lengths=lengths), backend)
    assert not out[0].any() and not out[1, :, 0].any()
    close(out[2], testing.dense_attention(one)[2])
    short = one._replace(q=one.q[1:2, :, 1:], k=one.k[1:2, :, :2], v=one.v[1:2, :, :2])
    short = short._replace(plan=one.plan.with_decisions(one.plan.decisions[1:2]))
    close(out[1:2, :, 1:], testing.dense_attention(short))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_pages_of_vllm(backend: str) -> None:
    """Keys and values apart, tokens before heads, one table row for all heads."""
    one = problem([1, 1], [50, 50], [[0, 1], [1, 0]], packed=False)
    cache = torch.full((2, 12, 16, 2, 32), torch.nan, device=DEVICE)  # [K|V, pages, 16, heads, D]
    table = torch.tensor([[7, 3, 9, 0], [1, 8, 4, 2]], dtype=torch.int32, device=DEVICE)
    for row, block in itertools.product(range(2), range(4)):
        span = slice(16 * block, min(16 * block + 16, 50))
        for which, x in enumerate((one.k, one.v)):
            cache[which, table[row, block], : span.stop - span.start] = x[row, :, span].transpose(
                0, 1
            )
    keys, values = (cache[which].transpose(1, 2) for which in range(2))
    lengths = torch.tensor([50, 50], device=DEVICE)
    pages = ec.Pages(keys, values, table[:, None].expand(-1, 2, -1), lengths)
    close(testing.run_paged(one, pages, backend), testing.dense_attention(one))


@pytest.mark.parametrize("group", [1, 4, 7, 8])
@pytest.mark.parametrize("dim", [64, 128])
def test_queries_of_wide_heads(group: int, dim: int) -> None:
    # Interpreted, 150 rows take a minute over all: one of each on a CPU.
    many = DEVICE == "cuda" or (group, dim) in {(7, 64), (4, 128)}
    for queries in (1, 2, 16, 150) if many else (1, 2, 16):
        one = problem(
            [queries] * 2, [300] * 2, [[0, 1], [1, 0]], group=group, dim=dim, packed=False
        )
        pages = testing.paged(one, 32)
        close(testing.run_paged(one, pages, "triton"), testing.dense_attention(one))


def test_a_backend_that_reads_no_pages_is_refused_and_auto_takes_another() -> None:
    one = problem([40], [80], [[0, 1]], packed=False)
    pages = testing.paged(one, 16)
    with pytest.raises(ec.UnsupportedRequest, match=r"it reads no pages|is not available"):
        testing.run_paged(one, pages, "flex")
    close(testing.run_paged(one, pages, "auto"), testing.dense_attention(one))


def test_blocks_that_are_selected_are_not_in_pages() -> None:
    one = testing.make_problem(Case("dense", 4, 32, 64, "one", "32"), lanes=testing.cases.PAIRS[1])
    plain = testing.make_problem(Case("dense", 4, 32, 64, "one", "32"))
    with pytest.raises(ec.UnsupportedRequest, match="heads that select blocks read no pages"):
        testing.run_paged(one, testing.paged(plain, 16), "serial")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"table": torch.zeros(1, 2, 3, dtype=torch.int64)}, "table must be an int32 tensor"),
        ({"table": torch.zeros(1, 3, 3, dtype=torch.int32)}, "1 sequences .* and 2 KV heads"),
        ({"lengths": torch.ones(1, dtype=torch.int32)}, "lengths must be an int64 tensor"),
        ({"lengths": torch.ones(2, dtype=torch.int64)}, "table must have 2 sequences"),
        ({"values": torch.zeros(4, 2, 16, 8)}, "values must be like keys"),
        ({"keys": torch.zeros(4, 2, 12, 32)}, "values must be like keys|power of two"),
        ({"keys": torch.zeros(4, 2, 32, 16).mT}, "contiguous along head_dim"),
        ({"keys": torch.zeros(2, 16, 32)}, "keys must be a tensor"),
    ],
)
def test_pages_that_do_not_fit_together(changes: dict[str, Any], message: str) -> None:
    fields = {
        "keys": torch.zeros(4, 2, 16, 32),
        "values": torch.zeros(4, 2, 16, 32),
        "table": torch.zeros(1, 2, 3, dtype=torch.int32),
        "lengths": torch.tensor([20]),
    }
    with pytest.raises((TypeError, ValueError), match=message):
        ec.Pages(**(fields | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.zeros(1, 4, 32)}, "q must be a float tensor"),
        ({"q": torch.zeros(1, 4, 1, 16)}, "q must have head_dim 32"),
        ({"q": torch.zeros(1, 3, 1, 32)}, "a multiple of 2 heads"),
        ({"q": torch.zeros(1, 4, 1, 32, dtype=torch.float64)}, "pages hold torch.float32"),
        ({"q": torch.zeros(2, 4, 1, 32)}, "the 1 sequences of pages"),
        ({"plan": ec.HeadPlan(torch.zeros(1, 3, dtype=torch.int8))}, r"plan\.decisions must be"),
        ({"plan": "full"}, "plan must be HeadPlan"),
        ({"pages": torch.zeros(1)}, "pages must be Pages"),
        ({"scale": float("nan")}, "scale must be finite"),
        ({"layout": "dense"}, "layout must be a SequenceLayout"),
    ],
)
def test_calls_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    table = torch.zeros(1, 2, 3, dtype=torch.int32)
    keys = torch.zeros(4, 2, 16, 32)
    arguments: dict[str, Any] = {
        "q": torch.zeros(1, 4, 1, 32),
        "pages": ec.Pages(keys, keys, table, torch.tensor([20])),
        "plan": ec.HeadPlan(torch.zeros(1, 2, dtype=torch.int8)),
    } | changes
    with pytest.raises((TypeError, ValueError), match=message):
        ec.paged_attention(**arguments, backend="serial")


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("queries", [1, 100])
def test_a_cuda_graph_follows_the_table_and_the_lengths(queries: int) -> None:
    one = problem([queries] * 2, [300] * 2, [[0, 1], [1, 0]], dim=64, packed=False)
    first, second = (testing.paged(one, 32, seed=seed, by_head=False) for seed in (0, 1))
    pages = dataclasses.replace(first, table=first.table.clone(), lengths=first.lengths.clone())

    def call() -> torch.Tensor:
        return ec.paged_attention(one.q, pages, one.plan, scale=one.scale, backend="triton")

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    graph.replay()
    close(out, testing.dense_attention(one))
    pages.keys.copy_(second.keys)
    pages.values.copy_(second.values)
    pages.table.copy_(second.table)
    graph.replay()
    close(out, testing.dense_attention(one))
    pages.lengths.fill_(250)
    graph.replay()
    shorter = one._replace(k=one.k[:, :, :250], v=one.v[:, :, :250])
    expected = testing.dense_attention(shorter)
    for row, heads in ((0, slice(0, 4)), (1, slice(4, 8))):  # full ones: they have all pages
        close(out[row, heads], expected[row, heads])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_compiled_call_is_one_graph(backend: str) -> None:
    one = problem([1, 2], [40, 70], [[0, 1], [1, 0]])
    pages = testing.paged(one, 16)
    queries = ec.SequenceLayout.packed(one.layout.cu_queries)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def call(q: torch.Tensor, lengths: torch.Tensor, decisions: torch.Tensor) -> torch.Tensor:
        plan = ec.HeadPlan(decisions, ec.Full(), ec.Streaming(16, 32), block_size=16, check=False)
        here = ec.Pages(pages.keys, pages.values, pages.table, lengths)
        return 1 * ec.paged_attention(q, here, plan, layout=queries, scale=0.2, backend=backend)

    close(call(one.q, pages.lengths, one.plan.decisions), testing.dense_attention(one))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_as_pytorch_checks_it(backend: str) -> None:
    from elasticore import operator

    one = problem([1, 1], [40, 40], [[0, 1], [1, 0]], packed=False)
    pages = testing.paged(one, 16)
    where = pages.keys, pages.values, pages.table, pages.lengths
    sizes = 0, 1, 16, 32, 16, "dense", None, None, 0.2, backend
    torch.library.opcheck(operator._paged_attention, (one.q, *where, one.plan.decisions, *sizes))
