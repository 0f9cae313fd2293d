"""The decode kernel: few queries, many keys, split in parts whose results are merged."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from elasticore import HeadMode, HeadPlan, SequenceLayout, Streaming, testing
from elasticore.testing import Problem, ScatteredBlocks
from tests.plans import Mixed

decode = pytest.importorskip("elasticore.backends.triton.decode", reason="needs triton")

FULL, STREAMING, SELECTED = (int(mode) for mode in HeadMode)
MIXED = [[FULL, STREAMING], [STREAMING, SELECTED], [SELECTED, FULL]]
EACH = [[FULL], [STREAMING], [SELECTED]]
LAYOUTS = ("dense", "left", "right", "static", "packed")


def draw(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make_problem(
    layout: str = "dense",
    *,
    device: str,
    queries: int = 1,
    group: int = 2,
    dim: int = 32,
    keys: int = 70,
    dtype: torch.dtype = torch.float32,
    modes: list[list[int]] = MIXED,
    streaming: Streaming | None = None,
) -> Problem:
    """Three sequences, of different lengths where they are padded or packed, in blocks of 16.

    Whatever no sequence owns is NaN. A packed batch has a sequence without queries besides.
    """
    lengths = [keys, keys - 37, keys - 2] if layout != "dense" else [keys] * 3
    counts = [min(queries, length) for length in lengths]
    width, start = keys, [0] * 3
    if layout == "left":
        start = [keys - length for length in lengths]
    elif layout == "static":
        start, width = [3, 0, 1], keys + 20
    rows, heads = 3, len(modes[0]) * group
    axis = (rows, queries, width)
    placed = SequenceLayout.dense()
    if layout == "packed":
        lengths.insert(1, 13)
        counts.insert(1, 0)
        modes = [modes[0], modes[0], *modes[1:]]
        sizes = [
            torch.tensor([0, *itertools.accumulate(x)], device=device) for x in (counts, lengths)
        ]
        placed = SequenceLayout.packed(*sizes)
        axis = (1, sum(counts) + 2, sum(lengths) + 5)
    elif layout != "dense":
        first = torch.tensor(start, device=device)
        last = first + torch.tensor(lengths, device=device) - 1
        # A right-padded row's queries end at its last token, as in a static cache.
        offset = None if layout == "left" else (last + 1 - queries).clamp(min=0)
        placed = SequenceLayout.padded(first, last, offset)
    batch, total, width = axis
    q = draw(batch, heads, total, dim, seed=0, dtype=dtype).to(device)
    k, v = (draw(batch, len(modes[0]), width, dim, seed=s, dtype=dtype).to(device) for s in (1, 2))
    plan: Any = Mixed(
        torch.tensor(modes, dtype=torch.int8, device=device),
        streaming=streaming or Streaming(16, 32),
        selector=ScatteredBlocks(share=0.4),
        block_size=16,
    )
    problem = Problem(q, k, v, plan, placed, 1.25 * dim**-0.5)
    owned_q = torch.zeros(batch, total, dtype=torch.bool)
    owned_k = torch.zeros(batch, width, dtype=torch.bool)
    for row, q_start, q_length, k_start, k_length in torch.stack(problem.segments(), 1).tolist():
        owned_q[row, q_start : q_start + q_length] = True
        owned_k[row, k_start : k_start + k_length] = True
    for tensor, owned in ((q, owned_q), (k, owned_k), (v, owned_k)):
        tensor.masked_fill_(~owned[:, None, :, None].to(device), torch.nan)
    return problem


def run(problem: Problem, **settings: Any) -> tuple[Tensor, Tensor]:
    """The kernel's answer, by default in splits of 32 keys: two or three for every head."""
    plan, segments = problem.plan, problem.segments()
    lists = None
    # A kernel without lists is compiled apart, and may round otherwise.
    if settings.pop("listed", bool((plan.modes == SELECTED).any())):
        assert plan.selector is not None
        lists = plan.selector.select(
            problem.q, problem.k, segments, block_size=plan.block_size, scale=problem.scale
        )
    sink, local = plan.streaming.blocks(plan.block_size)
    return decode.attention(
        problem.q,
        problem.k,
        problem.v,
        plan.modes,
        None if problem.layout.kind == "dense" else segments,
        lists,
        **{
            "scale": problem.scale,
            "sink": sink,
            "local": local,
            "block_size": plan.block_size,
            "max_queries": int(segments.query_length.max()),
            "split": 32,
            **settings,
        },
    )


def dense_lse(problem: Problem) -> Tensor:
    """The natural logarithm of the softmax's denominator in float64, ``[B, Hq, Tq]``."""
    q, k, plan = problem.q.double(), problem.k.double(), problem.plan
    group = q.shape[1] // k.shape[1]
    lse = torch.full(q.shape[:3], -math.inf, dtype=torch.float64, device=q.device)
    for s, (row, q_start, count, k_start, length) in enumerate(
        torch.stack(problem.segments(), 1).tolist()
    ):
        masks = {mode: testing.attended(problem, s, mode) for mode in HeadMode}
        for h in range(q.shape[1]):
            mask = masks[HeadMode(int(plan.modes[s, h // group]))][h]
            scores = q[row, h, q_start : q_start + count] @ k[row, h // group, k_start:][:length].T
            scores = (scores * problem.scale).masked_fill(~mask, -math.inf)
            lse[row, h, q_start : q_start + count] = scores.logsumexp(-1)
    return lse


def check(problem: Problem, **settings: Any) -> None:
    """Output and LSE are as near to the float64 ones as rounding allows."""
    out, lse = run(problem, **settings)
    dtype, dim, keys = problem.q.dtype, problem.q.shape[3], problem.k.shape[2]
    exact = testing.dense_attention(problem)
    plain = testing.dense_attention(problem, dtype)
    assert out.dtype == dtype and out.shape == problem.q.shape
    # Twice the error of the same formula in the dtype; a sum of D terms in case that has none.
    bound = 2 * (plain.double() - exact).abs().max() + dim * torch.finfo(dtype).eps
    assert (out.double() - exact).abs().max() <= bound * max(1, float(exact.abs().max()))

    expected = dense_lse(problem)
    assert lse.dtype == torch.float32 and lse.shape == out.shape[:3]
    there = expected.isfinite()
    assert bool((lse[~there] == -math.inf).all())
    # A score is a float32 sum of D products, the denominator one of at most `keys` terms.
    sizes = (x.nan_to_num().double().norm(dim=-1).max() for x in (problem.q, problem.k))
    score = dim * math.prod(float(size) for size in sizes) * problem.scale
    eps = torch.finfo(torch.float32).eps
    assert (lse[there].double() - expected[there]).abs().max() <= eps * (score + keys)


# --- Right ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("queries", [1, 3])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_modes_in_every_layout(layout: str, queries: int, device: str) -> None:
    check(make_problem(layout, queries=queries, device=device))


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_groups_of_every_size_share_one_pass_over_the_keys(group: int, device: str) -> None:
    check(make_problem("left", group=group, device=device))


@pytest.mark.parametrize("queries", [2, 16])
@pytest.mark.parametrize("keys", [80, 87])
def test_queries_on_both_sides_of_a_block_boundary_have_their_own_windows(
    keys: int, queries: int, device: str
) -> None:
    check(make_problem(keys=keys, queries=queries, group=1, modes=EACH, device=device))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("dim", [48, 64, 80])
def test_head_dims_that_are_no_powers_of_two(dim: int, dtype: torch.dtype, device: str) -> None:
    check(make_problem("right", dim=dim, dtype=dtype, device=device))


def test_more_rows_than_a_tile_holds(device: str) -> None:
    problem = make_problem(queries=7, group=3, modes=EACH, device=device)
    check(problem, tile=decode.Tile(rows=16, keys=16, warps=4, stages=2))


def test_a_head_that_reads_less_than_there_is(device: str) -> None:
    """Shorter than the sink, than the window, than both together; no sink at all."""
    for streaming in (Streaming(80, 16), Streaming(16, 80), Streaming(48, 32), Streaming(0, 16)):
        modes = [[STREAMING] * 2] * 3
        check(
            make_problem(
                "left", modes=modes, streaming=streaming, group=1, queries=2, device=device
            )
        )


def test_strides_do_not_matter(device: str) -> None:
    problem = make_problem("static", queries=2, device=device)
    expected, _ = run(problem)
    strided = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in problem[:3]]
    kv = torch.stack(strided[1:], 3)  # the two interleaved, as a fused projection leaves them
    modes = problem.plan.modes.T.contiguous().T
    moved = problem._replace(
        q=strided[0], k=kv[..., 0, :], v=kv[..., 1, :], plan=problem.plan.with_modes(modes)
    )
    out, _ = run(moved)
    assert torch.equal(out, expected)


def test_offsets_beyond_32_bits(device: str) -> None:
    """Three keys 2³⁰ elements apart; nothing between them is touched."""
    storage = torch.empty(2**31 + 32, dtype=torch.float16, device=device)
    k = storage.as_strided((1, 1, 3, 32), (1, 1, 2**30, 1))
    k.copy_(draw(1, 1, 3, 32, seed=1))
    q = draw(1, 1, 1, 32, seed=0, dtype=torch.float16).to(device)
    plan = HeadPlan(torch.zeros(1, 1, dtype=torch.int8, device=device), block_size=16)
    near = Problem(q, k.contiguous(), k.contiguous(), plan, SequenceLayout.dense(), 0.25)
    assert torch.equal(run(near._replace(k=k, v=k))[0], run(near)[0])


# --- The same, bit for bit -----------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_a_window_over_everything_is_full_attention(layout: str, device: str) -> None:
    full = run(make_problem(layout, modes=[[FULL] * 2] * 3, queries=2, device=device))
    for streaming in (Streaming(0, 80), Streaming(80, 16)):
        problem = make_problem(
            layout, modes=[[STREAMING] * 2] * 3, streaming=streaming, queries=2, device=device
        )
        for ours, expected in zip(run(problem), full, strict=True):
            assert torch.equal(ours, expected)


def test_a_heads_bits_do_not_depend_on_its_neighbours_modes(device: str) -> None:
    problem = make_problem("packed", queries=2, group=1, device=device)
    alone = {}
    for mode in (FULL, STREAMING, SELECTED):
        modes = torch.full_like(problem.plan.modes, mode)
        alone[mode] = run(problem._replace(plan=problem.plan.with_modes(modes)), listed=True)
    rotated = torch.roll(problem.plan.modes, 1, 1)
    for modes in (problem.plan.modes, rotated):
        mixed = run(problem._replace(plan=problem.plan.with_modes(modes)), listed=True)
        for s, (row, start, count, *_) in enumerate(torch.stack(problem.segments(), 1).tolist()):
            for h, mode in enumerate(modes[s].tolist()):
                here = (row, h, slice(start, start + count))
                for ours, expected in zip(mixed, alone[mode], strict=True):
                    assert torch.equal(ours[here], expected[here])


def test_two_runs_give_the_same_bits(device: str) -> None:
    problem = make_problem("packed", queries=2, device=device)
    for first, second in zip(run(problem), run(problem), strict=True):
        assert torch.equal(first, second)


def test_one_split_is_many_splits(device: str) -> None:
    """The same terms added in another order: each result within the roundings of its sums."""
    problem = make_problem("right", queries=2, device=device)
    out, lse = run(problem, split=128)
    bound = problem.k.shape[2] * torch.finfo(torch.float32).eps
    largest = float(problem.v.nan_to_num().abs().max())
    for split in (16, 48):
        others = run(problem, split=split)
        torch.testing.assert_close(others[0], out, rtol=0, atol=4 * bound * largest)
        torch.testing.assert_close(others[1], lse, rtol=0, atol=4 * bound)


def test_a_sequence_of_one_split_is_the_same_in_a_batch_of_longer_ones(device: str) -> None:
    """Merging a single part changes no bit: it is what the kernel writes when it merges nothing."""
    problem = make_problem("right", device=device)
    together = run(problem, split=48)  # the second sequence has 33 keys
    alone = problem._replace(
        q=problem.q[1:2],
        k=problem.k[1:2, :, :33],
        v=problem.v[1:2, :, :33],
        plan=problem.plan.with_modes(problem.plan.modes[1:2]),
        layout=SequenceLayout.dense(),
    )
    for ours, expected in zip(run(alone, split=48), together, strict=True):
        assert torch.equal(ours[0], expected[1])


# --- What is not there ---------------------------------------------------------------------------


def test_queries_of_no_sequence_are_zero_and_their_lse_is_minus_infinity(device: str) -> None:
    problem = make_problem("packed", queries=2, device=device)
    out, lse = run(problem)
    nobody = problem.q[..., 0].isnan()
    assert bool(nobody.any())
    assert bool((out[nobody] == 0).all()) and bool((lse[nobody] == -math.inf).all())
    assert bool(out.isfinite().all()) and bool(lse[~nobody].isfinite().all())


@pytest.mark.parametrize("mode", [STREAMING, SELECTED])
def test_nan_in_keys_that_a_head_leaves_out_reaches_nothing(mode: int, device: str) -> None:
    problem = make_problem(modes=[[mode]] * 3, queries=2, keys=100, device=device)
    expected = run(problem)
    for s in range(3):
        mask = testing.attended(problem, s, HeadMode(mode))
        unread = ~mask.flatten(0, 1).any(0)
        assert bool(unread.any())
        problem.k[s, :, unread] = torch.nan
        problem.v[s, :, unread] = torch.nan
    for ours, before in zip(run(problem), expected, strict=True):
        assert torch.equal(ours, before)


# --- Work and memory -----------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 4, 32, 128])
def test_splits_are_few_enough_for_their_results_to_be_small(rows: int) -> None:
    for keys in (1, 1000, 2**20, 2**30):
        split = decode._keys_per_split(keys, rows, processors=132)
        assert split % 128 == 0, "whole tiles"
        # A split's output and LSE take 4 (D + 1) bytes per row; its 16-bit K and V, 4 D per key.
        assert rows * 8 <= split


@pytest.mark.gpu
def test_nothing_waits_for_the_device_and_a_graph_can_hold_it(device: str) -> None:
    problem = make_problem("packed", queries=2, modes=[[FULL, STREAMING]] * 3, device=device)
    arguments = (problem.q, problem.k, problem.v, problem.plan.modes, problem.segments(), None)
    settings = {"scale": 0.2, "sink": 1, "local": 2, "block_size": 16}
    settings |= {"max_queries": 2, "split": 32}
    expected = decode.attention(*arguments, **settings)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        decode.attention(*arguments, **settings)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = decode.attention(*arguments, **settings)
    graph.replay()
    for ours, other in zip(captured, expected, strict=True):
        assert torch.equal(ours, other)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("group", "queries"), [(4, 1), (8, 4), (4, 16), (7, 16)])
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_tile_that_the_host_chooses(
    dim: int, group: int, queries: int, dtype: torch.dtype, device: str
) -> None:
    sizes = {"keys": 700, "queries": queries, "group": group, "dim": dim}
    check(make_problem("left", dtype=dtype, device=device, **sizes), split=128)
