"""The triton backend as users meet it: the conformance suite, routing, layouts, capture, errors."""

from __future__ import annotations

import dataclasses
import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

import elasticore as ec
from elasticore import testing
from elasticore.backends import triton as backend
from elasticore.backends.triton import kernels
from elasticore.testing.cases import PAIRS, Case
from tests.plans import pair_of, plan_of

GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float16, torch.float32]


def cases() -> list[tuple[Case, torch.dtype]]:
    """Every case in every dtype on a GPU; in the interpreter the cheapest, in turns."""
    every = testing.matrix()
    if GPU:
        return list(itertools.product(every, DTYPES))

    def price(case: Case) -> int:
        queries = {"all": case.length, "some": case.length // 3, "one": 1}[case.queries]
        return queries * case.length * case.group * case.head_dim

    short = sorted((case for case in every if case.length <= 129), key=price)
    return list(zip(short[:16], itertools.cycle(DTYPES), strict=False))


@pytest.mark.parametrize(("case", "dtype"), cases(), ids=str)
def test_conformance(case: Case, dtype: torch.dtype, device: str) -> None:
    testing.check_output("triton", case, dtype=dtype, device=device)
    testing.check_same_alone("triton", case, dtype=dtype, device=device)
    testing.check_repeatable("triton", case, dtype=dtype, device=device)


@pytest.fixture(params=["hopper", "portable"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every prefill runs on one kernel: on a Hopper GPU each is tried, elsewhere the portable."""
    name: str = request.param
    if name == "hopper" and not (GPU and torch.cuda.get_device_capability() == (9, 0)):
        pytest.skip("needs a Hopper GPU (compute capability 9.0)")
    monkeypatch.setattr(kernels, "choose", lambda *_, **__: name)
    monkeypatch.setattr(backend, "_reads_everything", lambda *_: False)
    return name


@dataclasses.dataclass(frozen=True)
class Listed(ec.BlockSelector):
    """Reads the blocks of a mask ``[row blocks, key blocks]``, the same for every head."""

    mask: Tensor

    def select(
        self,
        q: Tensor,
        k: Tensor,
        segments: ec.Segments,
        *,
        block_size: int,
        scale: float,
    ) -> ec.BlockLists:
        return ec.BlockLists.from_mask(self.mask.expand(len(segments.row), q.shape[1], -1, -1))


SIZE = 128 if GPU else 16
ROWS = 24 if GPU else 5


def inputs(
    device: str, batch: int = 1, length: int | None = None, group: int = 2, dim: int = 64
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    length = SIZE * ROWS - 3 if length is None else length
    heads = (4 * group, 4, 4)
    draw = [torch.randn(batch, length, h, dim, generator=generator) for h in heads]
    return [x.to(device, torch.float16).transpose(1, 2) for x in draw]


def run(x: list[Tensor], modes: list[list[int]], **settings: object) -> Tensor:
    settings = {"streaming": ec.Streaming(SIZE, 2 * SIZE), "block_size": SIZE, **settings}
    layout = settings.pop("layout", None)
    plan = plan_of(torch.tensor(modes, device=x[0].device), **settings)  # type: ignore[arg-type]
    return ec.hybrid_head_attention(*x, plan, layout=layout, backend="triton")  # type: ignore[arg-type]


def test_a_window_that_holds_everything_is_full_attention(kernel: str, device: str) -> None:
    x = inputs(device)
    wide = ec.Streaming(SIZE, SIZE * ROWS)
    assert torch.equal(run(x, [[1] * 4], streaming=wide), run(x, [[0] * 4]))


def test_lists_of_all_blocks_are_full_attention(kernel: str, device: str) -> None:
    x = inputs(device)
    every = torch.ones(ROWS, ROWS, dtype=torch.bool, device=device).tril()
    assert torch.equal(run(x, [[2] * 4], selector=Listed(every)), run(x, [[0] * 4]))


def test_a_head_does_not_feel_the_routing_of_the_others(kernel: str, device: str) -> None:
    x = inputs(device)
    first, second = run(x, [[0, 1, 0, 1]]), run(x, [[0, 0, 1, 1]])
    same = [0, 1, 6, 7]  # query heads of KV heads 0 and 3
    assert torch.equal(first[:, same], second[:, same])
    assert not torch.equal(first, second)


def test_a_sequence_has_the_same_bits_alone_padded_and_packed(kernel: str, device: str) -> None:
    x = inputs(device)
    length, modes = x[0].shape[2], [[0, 1, 1, 0]]
    alone = run(x, modes)
    pad = 7
    padded = [torch.nn.functional.pad(t, (0, 0, pad, 2), value=torch.nan) for t in x]
    edges = torch.tensor([pad]), torch.tensor([pad + length - 1])
    layout = ec.SequenceLayout.padded(*(edge.to(device) for edge in edges))
    inside = run(padded, modes, layout=layout)
    assert torch.equal(inside[:, :, pad : pad + length], alone)
    assert not inside[:, :, :pad].any()
    assert not inside[:, :, pad + length :].any()
    nan = [torch.full_like(t[:, :, :5], torch.nan) for t in x]
    packed = [torch.cat([n, t, n], 2) for n, t in zip(nan, x, strict=True)]
    cumulative = torch.tensor([0, 5, 5 + length, 10 + length], device=device)
    layout = ec.SequenceLayout.packed(cumulative)
    inside = run(packed, [[1] * 4, *modes, [0] * 4], layout=layout)
    assert torch.equal(inside[:, :, 5 : 5 + length], alone)


def test_what_no_head_reads_may_hold_anything(kernel: str, device: str) -> None:
    x = inputs(device)
    streaming = run(x, [[1] * 4])
    chosen = torch.zeros(ROWS, ROWS, dtype=torch.bool, device=device)
    chosen[torch.arange(ROWS), torch.arange(ROWS)] = True
    chosen[:, 0] = True
    selected = run(x, [[2] * 4], selector=Listed(chosen))
    for tensor in x[1:]:  # blocks 1 and 2 are out of every later row's reach
        tensor[:, :, SIZE : 3 * SIZE] = torch.nan
    rows = slice(4 * SIZE, None)
    assert torch.equal(run(x, [[1] * 4])[:, :, rows], streaming[:, :, rows])
    again = run(x, [[2] * 4], selector=Listed(chosen))
    assert torch.equal(again[:, :, rows], selected[:, :, rows])


def test_prefill_in_chunks_has_the_bits_of_one_go(kernel: str, device: str) -> None:
    x, modes = inputs(device), [[0, 1, 0, 1]]
    whole, cut = run(x, modes), 2 * SIZE + 5
    head = run([t[:, :, :cut] for t in x], modes)
    tail = run([x[0][:, :, cut:], *x[1:]], modes)
    assert torch.equal(torch.cat([head, tail], 2), whole)


@pytest.mark.parametrize("group", [1, 4, 7, 8])
def test_any_group(kernel: str, device: str, group: int) -> None:
    check_against_serial(inputs(device, group=group))


def test_maxima_that_jump_from_block_to_block(kernel: str, device: str) -> None:
    q, k, v = inputs(device)
    generator = torch.Generator().manual_seed(1)
    # Some rows meet weights 2^100 times those before, some of the same warp never do.
    loud = torch.where(torch.rand(q.shape[2], generator=generator) < 0.1, 8.0, 0.25)
    blocks = 2.0 ** torch.randint(-3, 4, (ROWS,), generator=generator)
    q = q * loud.to(device, q.dtype)[:, None]
    k = k * blocks.repeat_interleave(SIZE)[: k.shape[2]].to(device, k.dtype)[:, None]
    check_against_serial([q, k, v])


def check_against_serial(x: list[Tensor]) -> None:
    modes = [[0, 1, 1, 0]]
    exact = ec.hybrid_head_attention(
        *(t.double().cpu() for t in x),
        plan_of(modes, ec.Streaming(SIZE, 2 * SIZE), block_size=SIZE),
        backend="serial",
    )
    # Weights and output are rounded to float16, 2^-11 each, and values reach about 4.
    assert (run(x, modes).double().cpu() - exact).abs().max() < 3 * 4 * 2**-11


def test_strides_of_any_kind(kernel: str, device: str) -> None:
    x, modes = inputs(device), [[0, 1, 1, 0]]
    expected = run(x, modes)
    odd = [torch.nn.functional.pad(t, (0, 3))[..., :64] for t in x]  # rows of 67 numbers
    assert kernel == "hopper" or torch.equal(run(odd, modes), expected)
    assert torch.equal(run([t.contiguous() for t in x], modes), expected)


def test_rows_of_odd_addresses_run_on_the_portable_kernel(device: str) -> None:
    x = inputs(device)
    odd = [torch.nn.functional.pad(t, (0, 3))[..., :64] for t in x]
    assert kernels.choose(*odd, scale=1.0, block_size=128, sequences=1) == "portable"


@pytest.mark.gpu
@pytest.mark.parametrize("length", [1, 100, 384, 385])
def test_prompts_inside_the_window(length: int) -> None:
    x = inputs("cuda", length=length)
    wide = run(x, [[0, 1, 1, 0]])
    exact = ec.hybrid_head_attention(
        *(t.double().cpu() for t in x),
        plan_of([[0, 1, 1, 0]], ec.Streaming(128, 256)),
        backend="serial",
    )
    # Weights and output are rounded to float16, 2^-11 each, and values reach about 4.
    assert (wide.double().cpu() - exact).abs().max() < 3 * 4 * 2**-11


def test_kernel_choice(device: str) -> None:
    q, k, v = inputs(device)
    choose = kernels.choose
    settings = {"scale": 1.0, "block_size": 128, "sequences": 1}
    assert choose(q[:, :, -16:], k, v, **settings) == "decode"  # type: ignore[arg-type]
    prefill = "hopper" if GPU and torch.cuda.get_device_capability() == (9, 0) else "portable"
    assert choose(q, k, v, **settings) == prefill  # type: ignore[arg-type]
    for change in ({"block_size": 64}, {"scale": -1.0}):
        assert choose(q, k, v, **(settings | change)) == "portable"  # type: ignore[arg-type]
    # Three packed sequences may hold their 16 queries in any way.
    assert choose(q[:, :, -16:], k, v, **(settings | {"sequences": 3})) == prefill  # type: ignore[arg-type]


def test_compiles_into_one_graph(device: str) -> None:
    x = inputs(device, length=2 * SIZE + 3)
    every = torch.ones(3, 3, dtype=torch.bool, device=device).tril()

    def layer(*x: Tensor, decisions: Tensor, pair: tuple[ec.Pattern, ec.Pattern]) -> Tensor:
        plan = ec.HeadPlan(decisions, *pair, block_size=SIZE, check=False)
        return 2 * ec.hybrid_head_attention(*x, plan, backend="triton")

    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    decisions = torch.tensor([[0, 1, 1, 0]], dtype=torch.int8, device=device)
    for pair in (
        (ec.Full(), ec.XAttention()),
        (Listed(every), ec.Streaming(SIZE, 2 * SIZE)),
        (ec.Full(), ec.Streaming(SIZE, SIZE)),
    ):
        expected = layer(*x, decisions=decisions, pair=pair)
        assert torch.equal(compiled(*x, decisions=decisions, pair=pair), expected)


def test_an_operator_as_pytorch_checks_it(device: str) -> None:
    from elasticore import operator

    x = inputs(device, length=SIZE)
    decisions = torch.zeros(1, 4, dtype=torch.int8, device=device)
    none = [None] * 5
    call = (
        *x, decisions, 0, 1, SIZE, SIZE, SIZE, None, None, 0, 0.0, False, 0, "dense", *none, 0.1,
        "triton",
    )  # fmt: skip
    torch.library.opcheck(operator._hybrid_head_attention, call)


def test_refuses_what_it_cannot_do(device: str) -> None:
    x = inputs(device, length=SIZE)
    with pytest.raises(ec.UnsupportedRequest, match="float64"):
        run([t.double() for t in x], [[0] * 4])
    with pytest.raises(ec.UnsupportedRequest, match="head_dim 24"):
        run([t[..., :24].contiguous() for t in x], [[0] * 4])


def test_auto_does_not_interpret(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise AssertionError("the triton backend ran on the CPU without being named")

    monkeypatch.setattr(backend.TritonAttention, "attend", fail)
    q = torch.randn(1, 2, 8, 32)
    plan = ec.HeadPlan(torch.zeros(1, 2, dtype=torch.int8))
    assert ec.hybrid_head_attention(q, q, q, plan).shape == q.shape


@pytest.mark.gpu
@pytest.mark.parametrize("lanes", PAIRS)
def test_captures_into_a_cuda_graph_and_never_waits(
    kernel: str, lanes: tuple[ec.HeadMode, ec.HeadMode]
) -> None:
    x = inputs("cuda")
    decisions = torch.tensor([[0, 1, 1, 0]], dtype=torch.int8, device="cuda")
    plan = ec.HeadPlan(decisions, *pair_of(lanes, selector=ec.XAttention()))

    def call() -> Tensor:
        return ec.hybrid_head_attention(*x, plan, backend="triton")

    call()
    torch.cuda.set_sync_debug_mode("error")
    try:
        expected = call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for row in ([0, 1, 1, 0], [1, 1, 0, 1]):
        decisions.copy_(torch.tensor([row]))
        expected = call()
        graph.replay()
        assert torch.equal(out, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("order", ["heads first", "tokens first"])
def test_more_than_two_billion_elements(kernel: str, order: str) -> None:
    length, heads = 131072 + 5, 129
    shape = (1, heads, length, 128)
    if order == "tokens first":
        x = torch.empty(1, length, heads, 128, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    else:
        x = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    generator = torch.Generator("cuda").manual_seed(0)
    last = torch.randn(1, 1, length, 128, generator=generator, device="cuda", dtype=torch.bfloat16)
    x.zero_()
    x[:, -1:] = last
    plan = ec.HeadPlan(torch.ones(1, heads, dtype=torch.int8, device="cuda"))
    out = ec.hybrid_head_attention(x, x, x, plan, backend="triton")
    alone = ec.hybrid_head_attention(
        last, last, last, ec.HeadPlan(plan.decisions[:, :1].contiguous()), backend="triton"
    )
    assert torch.equal(out[:, -1:], alone)


def test_a_triton_whose_gluon_moved_still_runs_the_rest() -> None:
    code = """
import sys, types
import triton.experimental.gluon.language.nvidia as nvidia
sys.modules["triton.experimental.gluon.language.nvidia.hopper"] = types.ModuleType("hopper")
from elasticore.backends.triton import kernels
assert "hopper" not in kernels.KERNELS | kernels.TRAINING
assert "ImportError" in kernels.HOPPER_MISSING
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
