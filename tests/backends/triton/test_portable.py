"""The plain Triton prefill kernel: every tiling against float64, and what must hold bit for bit."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from elasticore import HeadMode, SequenceLayout, Streaming, testing
from elasticore.patterns import BlockLists
from elasticore.testing import Case, Problem, ScatteredBlocks
from tests.plans import Mixed, mixed

triton = pytest.importorskip("triton", reason="needs triton")
portable = pytest.importorskip("elasticore.backends.triton.portable", reason="needs triton")

FULL, STREAMING, SELECTED = HeadMode
BLOCK = 16
# Triton's interpreter computes bfloat16 wrongly.
HALVES = [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)]
DTYPES = [*HALVES, torch.float32]
# float32 is always loaded by pointers.
LOADED = [
    (torch.float16, "descriptors"),
    (torch.float16, "pointers"),
    pytest.param(torch.bfloat16, "descriptors", marks=pytest.mark.gpu),
    pytest.param(torch.bfloat16, "pointers", marks=pytest.mark.gpu),
    (torch.float32, "pointers"),
]


def draw(*shape: int, dtype: torch.dtype, device: str, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def run(problem: Problem, **other: Any) -> tuple[Tensor, Tensor]:
    """Output and LSE of the kernel; ``other`` replaces its arguments."""
    q, k, v, plan, layout, scale = problem
    segments = None if layout.kind == "dense" else problem.segments()
    sink, local = plan.streaming.blocks(plan.block_size)
    arguments = {"scale": scale, "sink": sink, "local": local, "block_size": plan.block_size}
    if "lists" not in other:
        assert plan.selector is not None
        arguments["lists"] = plan.selector.select(
            q, k, problem.segments(), block_size=plan.block_size, scale=scale
        )
    return portable.attention(q, k, v, plan.modes, segments, **{**arguments, **other})


def make_problem(
    device: str,
    *,
    dtype: torch.dtype = torch.float16,
    modes: list[list[int]] | None = None,
    kv_heads: int = 3,
    group: int = 2,
    keys: int = 75,
    queries: int | None = None,
    dim: int = 32,
    block_size: int = BLOCK,
    streaming: Streaming | None = None,
    layout: SequenceLayout | None = None,
) -> Problem:
    """One row, or one per entry of ``modes``, whose heads run one mode each by default."""
    if modes is None:
        modes = [[head % 3 for head in range(kv_heads)]]
    layout = SequenceLayout.dense() if layout is None else layout
    rows = 1 if layout.kind == "packed" else len(modes)
    heads = len(modes[0])
    q = draw(rows, heads * group, queries or keys, dim, dtype=dtype, device=device)
    k, v = (draw(rows, heads, keys, dim, dtype=dtype, device=device, seed=s) for s in (1, 2))
    plan: Any = Mixed(
        torch.tensor(modes, dtype=torch.int8, device=device),
        streaming=streaming or Streaming(block_size, 2 * block_size),
        selector=ScatteredBlocks(share=0.4),
        block_size=block_size,
    )
    return Problem(q, k, v, plan, layout, 1.25 * dim**-0.5)


def uniform(problem: Problem, mode: int, **settings: Any) -> Problem:
    """The problem with all heads in one mode."""
    plan = dataclasses.replace(problem.plan, **settings)
    return problem._replace(plan=plan.with_modes(torch.full_like(plan.modes, int(mode))))


def unaligned(x: Tensor) -> Tensor:
    """``x`` with strides that rule out tensor descriptors."""
    wide = x.new_full((*x.shape[:3], x.shape[3] + 1), math.nan)
    wide[..., :-1] = x
    return wide[..., :-1]


def loaded_by(problem: Problem, load: str) -> Problem:
    if load == "pointers":
        problem = problem._replace(k=unaligned(problem.k), v=unaligned(problem.v))
    if portable.capability(problem.k.device) == 9:  # elsewhere there are only pointers
        assert portable._has_descriptors(problem.k) == (load == "descriptors")
    return problem


def check(problem: Problem, result: tuple[Tensor, Tensor] | None = None) -> None:
    """Compare output and LSE (by default the kernel's) with dense masks in float64.

    The bound: the weights (in the dtype of v, summing to 1) and the output are rounded to half an
    ulp each. The scores are sums of D products and their exponentials sums of up to Tk in float32:
    off by D and Tk roundings of what is added up, absolutely in the exponent, twice as the largest
    is subtracted.
    """
    out, lse = run(problem) if result is None else result
    reference = testing.dense_attention(problem)
    mask = reference.new_full((*lse.shape, problem.k.shape[2]), -math.inf)
    largest = 0.0
    group = problem.q.shape[1] // problem.k.shape[1]
    owned = torch.zeros_like(lse, dtype=torch.bool)
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(problem.segments(), 1).tolist()
    ):
        queries, keys = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        q, k = problem.q[row, :, queries].double(), problem.k[row, :, keys].double()
        k = k.repeat_interleave(group, 0)
        scores = q @ k.mT * problem.scale
        if scores.numel():
            largest = max(largest, float((q.abs() @ k.abs().mT).max()) * abs(problem.scale))
        masks = {mode: testing.attended(problem, index, mode) for mode in problem.plan.lanes}
        for head, mode in enumerate(problem.plan.modes[index].tolist()):
            heads = slice(head * group, (head + 1) * group)
            visible = masks[HeadMode(mode)][heads]
            mask[row, heads, queries, keys] = scores[heads].masked_fill(~visible, -math.inf)
        owned[row, :, queries] = True
    exact = mask.logsumexp(-1)

    eps, single = (torch.finfo(dtype).eps for dtype in (out.dtype, torch.float32))
    slack = single * (2 * problem.q.shape[3] * largest + problem.k.shape[2])
    values = problem.v[problem.v.isfinite()].abs().max() if problem.v.isfinite().any() else 0.0
    assert out.dtype == problem.q.dtype and lse.dtype == torch.float32
    assert bool(out.isfinite().all())
    assert float((out.double() - reference).abs().max()) <= (eps + slack) * float(values)
    assert bool((lse[~owned] == -math.inf).all()) and bool((out[~owned] == 0).all())
    if bool(owned.any()):
        error = (lse.double() - exact)[owned].abs().max()
        assert float(error) <= slack + 4 * single * float(exact[owned].abs().max())


# --- Right in every tiling -----------------------------------------------------------------------

TILINGS = [
    pytest.param(
        capability,
        block_size,
        dim,
        dtype,
        id=f"sm{capability}0-{str(dtype)[6:]}-b{block_size}-d{dim}",
        marks=pytest.mark.gpu if dtype is torch.bfloat16 else (),
    )
    for (capability, size), blocks in portable.TILINGS.items()
    for block_size in blocks
    for dim in portable.HEAD_DIMS
    for dtype in (torch.float16, torch.bfloat16, torch.float32)
    if dtype.itemsize == size
]


@pytest.mark.parametrize(("capability", "block_size", "dim", "dtype"), TILINGS)
def test_every_tiling(
    capability: int,
    block_size: int,
    dim: int,
    dtype: torch.dtype,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if capability == 9 and portable.capability(torch.device(device)) not in portable.LARGE:
        pytest.skip("needs a GPU with the shared memory of a Hopper one")
    monkeypatch.setattr(portable, "capability", lambda _: capability)
    blocks = 20 if device == "cuda" else 2
    keys = blocks * block_size + block_size // 2 + 3
    problem = make_problem(
        device,
        dtype=dtype,
        group=4 if device == "cuda" else 1,
        keys=keys,
        queries=keys - block_size // 2 - 5,
        dim=dim,
        block_size=block_size,
        streaming=Streaming(block_size, block_size),
    )
    check(problem)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [48, 80, 96, 112, 192, 240])
def test_head_dims_that_are_padded(dim: int, dtype: torch.dtype, device: str) -> None:
    check(make_problem(device, dtype=dtype, dim=dim, group=1, keys=40))


@pytest.mark.parametrize(("dtype", "load"), LOADED)
@pytest.mark.parametrize(
    "case",
    [
        Case("dense", 7, 32, 50, "some", "32"),
        Case("left", 4, 32, 66, "all", "64"),
        Case("right", 1, 64, 129, "some", "128"),
        Case("packed", 8, 32, 20, "all", "32"),
        Case("packed", 2, 32, 66, "some", "32"),
        Case("left", 2, 32, 33, "one", "32"),
        Case("packed", 4, 32, 1, "all", "32"),
    ],
    ids=str,
)
def test_every_layout(case: Case, dtype: torch.dtype, load: str, device: str) -> None:
    """Three sequences, routed differently, with NaN wherever no sequence owns a place."""
    problem = mixed(testing.make_problem(case, dtype=dtype, device=device))
    owned_q, owned_k = (
        torch.zeros(x.shape[0], x.shape[2], dtype=torch.bool, device=device) for x in problem[:2]
    )
    for row, q_start, q_length, k_start, k_length in torch.stack(problem.segments(), 1).tolist():
        owned_q[row, q_start : q_start + q_length] = True
        owned_k[row, k_start : k_start + k_length] = True
    for x, owned in zip(problem[:3], (owned_q, owned_k, owned_k), strict=True):
        x.masked_fill_(~owned[:, None, :, None], math.nan)
    result = run(loaded_by(problem, load))
    q, k, v = (x.nan_to_num() for x in problem[:3])
    check(problem._replace(q=q, k=k, v=v), result)


@pytest.mark.parametrize("dtype", DTYPES)
def test_lengths_around_a_block(dtype: torch.dtype, device: str) -> None:
    """Packed: sequences of no key, of keys without a query, and of every length near a block's."""
    keys = [1, BLOCK - 1, 0, BLOCK, BLOCK + 1, 5, 2 * BLOCK]
    queries = [1, BLOCK - 1, 0, BLOCK - 1, BLOCK + 1, 0, 1]
    ends = [torch.tensor([0, *itertools.accumulate(x)], device=device) for x in (queries, keys)]
    modes = [[index % 3, (index + 1) % 3] for index in range(len(keys))]
    layout = SequenceLayout.packed(*ends)
    check(
        make_problem(
            device, dtype=dtype, modes=modes, layout=layout, keys=sum(keys) + 3, queries=61
        )
    )


def test_a_scale_that_is_not_positive(device: str) -> None:
    """The largest product of a row is not its largest score then."""
    problem = make_problem(device, dtype=torch.float32, group=1, keys=40)
    check(problem._replace(scale=-problem.scale))
    check(problem._replace(scale=0.0))


def test_offsets_beyond_32_bits(device: str) -> None:
    """Rows, heads and tokens further apart than 2³¹ elements (untouched memory costs nothing)."""
    problem = make_problem(device, modes=[[FULL, STREAMING]] * 2, keys=20, group=1)
    far = 2**31 + 64
    storage = torch.empty(far + 4096, dtype=torch.float16, device=device)
    check(problem)
    expected = run(problem)
    for strides in ((far, 1024, 32, 1), (1024, far, 32, 1)):
        k = storage.as_strided(problem.k.shape, strides)
        assert all(map(torch.equal, run(problem._replace(k=k.copy_(problem.k))), expected))
        v = storage.as_strided(problem.v.shape, strides)
        assert all(map(torch.equal, run(problem._replace(v=v.copy_(problem.v))), expected))
        q = storage.as_strided(problem.q.shape, strides)
        assert all(map(torch.equal, run(problem._replace(q=q.copy_(problem.q))), expected))
    few = make_problem(device, kv_heads=1, keys=2, group=1, dim=32)
    k = storage.as_strided(few.k.shape, (1, 1, far, 1)).copy_(few.k)
    assert all(map(torch.equal, run(few._replace(k=k)), run(few)))


# --- The same bits -------------------------------------------------------------------------------


def test_descriptors_are_for_what_the_copy_engine_reads(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """16-byte addresses and strides above zero; the others would be an error of the driver."""
    monkeypatch.setattr(portable, "capability", lambda _: 9)
    storage = torch.zeros(2**16, dtype=torch.float16, device=device)
    shape, strides = (2, 3, 5, 32), (1024, 512, 64, 1)
    assert portable._has_descriptors(storage.as_strided(shape, strides))
    assert not portable._has_descriptors(storage.as_strided(shape, strides, 4))
    assert not portable._has_descriptors(storage.float().as_strided(shape, strides))
    for axis, other in itertools.product(range(3), (0, 1, 68)):
        changed = [*strides[:axis], other, *strides[axis + 1 :]]
        assert not portable._has_descriptors(storage.as_strided(shape, changed))
    monkeypatch.setattr(portable, "capability", lambda _: 8)
    assert not portable._has_descriptors(storage.as_strided(shape, strides))


@pytest.mark.parametrize("dtype", HALVES)
def test_descriptors_and_pointers_read_the_same(dtype: torch.dtype, device: str) -> None:
    problem = make_problem(device, dtype=dtype, dim=64, queries=60)
    assert all(map(torch.equal, run(loaded_by(problem, "pointers")), run(problem)))


@pytest.mark.parametrize(("dtype", "load"), LOADED)
def test_what_reads_everything_equals_full(dtype: torch.dtype, load: str, device: str) -> None:
    problem = make_problem(device, dtype=dtype, kv_heads=1, group=1, queries=70)
    problem = uniform(loaded_by(problem, load), FULL)
    full = run(problem)
    for streaming in (Streaming(0, 80), Streaming(16, 64), Streaming(64, 16), Streaming(160, 16)):
        assert all(map(torch.equal, run(uniform(problem, STREAMING, streaming=streaming)), full))
    selected = uniform(problem, SELECTED, selector=ScatteredBlocks(share=1.0))
    assert all(map(torch.equal, run(selected), full))
    # One block less, and the last rows miss it.
    short, _ = run(uniform(problem, STREAMING, streaming=Streaming(0, 64)))
    first = 64 - (75 - 70)
    assert torch.equal(short[:, :, :first], full[0][:, :, :first])
    assert not bool((short[:, :, first:] == full[0][:, :, first:]).all(-1).any())


@pytest.mark.parametrize("width", [torch.int16, torch.int32])
def test_lists_of_16_and_32_bits_with_other_strides(width: torch.dtype, device: str) -> None:
    problem = uniform(make_problem(device), SELECTED)
    assert problem.plan.selector is not None
    lists = problem.plan.selector.select(
        problem.q, problem.k, problem.segments(), block_size=BLOCK, scale=problem.scale
    )
    strided = BlockLists(
        lists.indices.to(width).mT.contiguous().mT, lists.counts.mT.contiguous().mT
    )
    assert all(map(torch.equal, run(problem, lists=strided), run(problem)))


def test_without_lists(device: str) -> None:
    problem = make_problem(device, modes=[[FULL, STREAMING]])
    assert all(map(torch.equal, run(problem, lists=None), run(problem)))


@pytest.mark.parametrize("dtype", HALVES)
def test_a_head_does_not_depend_on_the_modes_of_others(dtype: torch.dtype, device: str) -> None:
    problem = make_problem(device, dtype=dtype, keys=60)
    alone = [run(uniform(problem, mode)) for mode in HeadMode]
    for modes in ([0, 1, 2], [1, 2, 0], [2, 2, 1]):
        routed = torch.tensor([modes], dtype=torch.int8, device=device)
        mixed = run(problem._replace(plan=problem.plan.with_modes(routed)))
        for head, mode in enumerate(modes):
            heads = slice(2 * head, 2 * head + 2)
            for ours, expected in zip(mixed, alone[mode], strict=True):
                assert torch.equal(ours[:, heads], expected[:, heads])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["dense", "left", "right", "packed"])
def test_a_sequence_gives_what_it_gives_alone(layout: str, dtype: torch.dtype, device: str) -> None:
    case = Case(layout, 2, 32, 90, "some", "32")
    problem = mixed(testing.make_problem(case, dtype=dtype, device=device))
    together = run(problem)
    assert all(map(torch.equal, run(problem), together)), "two runs differ"
    for index, (row, q_start, q_length, k_start, k_length) in enumerate(
        torch.stack(problem.segments(), 1).tolist()
    ):
        queries, keys = slice(q_start, q_start + q_length), slice(k_start, k_start + k_length)
        one = problem._replace(
            q=problem.q[row : row + 1, :, queries],
            k=problem.k[row : row + 1, :, keys],
            v=problem.v[row : row + 1, :, keys],
            plan=problem.plan.with_modes(problem.plan.modes[index : index + 1]),
            layout=SequenceLayout.dense(),
        )
        for ours, alone in zip(together, run(one), strict=True):
            assert torch.equal(ours[row : row + 1, :, queries], alone)


@pytest.mark.parametrize("chunk", [BLOCK, 21])
def test_prefill_in_chunks_equals_one_go(chunk: int, device: str) -> None:
    problem = make_problem(device)
    keys = problem.k.shape[2]
    parts = [
        run(
            problem._replace(
                q=problem.q[:, :, i : i + chunk],
                k=problem.k[:, :, : i + chunk],
                v=problem.v[:, :, : i + chunk],
            )
        )
        for i in range(0, keys, chunk)
    ]
    for pieces, whole in zip(zip(*parts, strict=True), run(problem), strict=True):
        assert torch.equal(torch.cat(pieces, 2), whole)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", [STREAMING, SELECTED], ids=["streaming", "selected"])
def test_nan_in_blocks_that_are_not_read(mode: HeadMode, dtype: torch.dtype, device: str) -> None:
    # The queries of one row block, so that one head's lists say what is read at all.
    problem = make_problem(device, dtype=dtype, kv_heads=1, group=1, keys=200, queries=200 % BLOCK)
    problem = uniform(problem, mode)
    read = testing.attended(problem, 0, mode).any(1)[0]
    assert bool((~read).any())
    expected = run(problem)
    for x in (problem.k, problem.v):
        x.masked_fill_(~read[:, None], math.nan)
    assert all(map(torch.equal, run(problem), expected))


# --- On the GPU only -----------------------------------------------------------------------------


@pytest.mark.gpu
def test_lengths_do_not_compile_anew(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(make_problem(device, keys=160))
    compiled = []
    hook = lambda *args, **kwargs: compiled.append(kwargs.get("repr"))  # noqa: E731
    monkeypatch.setattr(triton.knobs.runtime, "jit_post_compile_hook", hook)
    for keys in (1, 15, 16, 17, 97, 256, 1000, 4099):
        for queries in {1, keys // 2 + 1, keys}:
            run(make_problem(device, keys=keys, queries=queries))
    assert compiled == []


@pytest.mark.gpu
def test_a_captured_graph_follows_the_modes(device: str) -> None:
    """Nothing about the modes or the lists is fixed on the host."""
    problem = make_problem(device, keys=1000, block_size=64)
    assert problem.plan.selector is not None
    lists = problem.plan.selector.select(
        problem.q, problem.k, problem.segments(), block_size=64, scale=problem.scale
    )
    run(problem, lists=lists)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(problem, lists=lists)
    for modes in ([2, 1, 0], [0, 0, 0], [1, 2, 2]):
        problem.plan.modes.copy_(torch.tensor([modes], dtype=torch.int8))
        graph.replay()
        assert all(map(torch.equal, captured, run(problem, lists=lists)))
