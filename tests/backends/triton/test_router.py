"""The Attention Router's kernels: the modules' decision, from two launches."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor, nn

from elasticore.backends.triton import router as kernels
from elasticore.layout import Segments, SequenceLayout
from elasticore.router import AttentionRouter, Routing, pool_boundary
from elasticore.router import router as module

BOUNDARY = 4
LENGTHS = [0, 1, 7, 8, 9, 2, 40]  # around 2 * BOUNDARY, where the middle begins


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lets the interpreter stand in for the GPU, and counts what the kernels decided."""
    made: list[int] = []
    launch = kernels._launch

    def counted(*args: object) -> tuple[Tensor, Tensor]:
        made.append(1)
        return launch(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "_FUSED_ON", ("cuda", "cpu"))
    monkeypatch.setattr(kernels, "_launch", counted)
    return made


def make(
    device: str, dim: int = 32, multiplier: int = 2, boundary: int | None = BOUNDARY, seed: int = 0
) -> AttentionRouter:
    """A router in evaluation mode whose logits are far from 0 and change sign."""
    torch.manual_seed(seed)
    router = AttentionRouter(dim, multiplier, boundary)
    with torch.no_grad():
        for parameter in router.parameters():
            parameter.mul_(3)
    return router.eval().to(device)


def draw(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(device, dtype)


def dense(keys: Tensor) -> Segments:
    batch, tokens = keys.shape[:2]
    return SequenceLayout.dense().segments(batch, tokens, tokens, keys.device)


def packed(lengths: list[int], device: str) -> Segments:
    cu = torch.tensor([0, *lengths], device=device).cumsum(0)
    return SequenceLayout.packed(cu).segments(1, sum(lengths), sum(lengths), cu.device)


def padded(lengths: list[int], tokens: int, side: str, device: str) -> Segments:
    length = torch.tensor(lengths, device=device)
    first = tokens - length if side == "left" else torch.zeros_like(length)
    layout = SequenceLayout.padded(first, first + length - 1)
    return layout.segments(len(lengths), tokens, tokens, length.device)


def by_modules(router: AttentionRouter, keys: Tensor, segments: Segments) -> Routing:
    """What the router's own modules decide, the definition."""
    logits = router.logits(pool_boundary(keys, segments, router.boundary))
    return Routing((logits[..., 1] >= logits[..., 0]).to(torch.int8), logits)


def same(one: Routing, other: Routing) -> bool:
    return torch.equal(one.decisions, other.decisions) and torch.equal(one.logits, other.logits)


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


# --- Pooling -------------------------------------------------------------------------------------


@triton.jit
def _pool(keys, row, start, length, out, stride_b, stride_t, stride_h, stride_d, kv_heads,
          BOUNDARY: tl.constexpr, SLOTS: tl.constexpr, DIM: tl.constexpr):  # fmt: skip
    pair = tl.program_id(0)
    sequence = pair // kv_heads
    tokens = tl.load(length + sequence)
    keys += tl.load(row + sequence) * stride_b + tl.load(start + sequence) * stride_t
    keys += (pair % kv_heads) * stride_h
    ends = kernels._both_ends(keys, tokens, stride_t, stride_d, BOUNDARY, SLOTS, DIM)
    mean = kernels._mean(ends, tokens, BOUNDARY, SLOTS, DIM)
    tl.store(out + pair * DIM + tl.arange(0, DIM), mean)


def pool(keys: Tensor, segments: Segments, boundary: int) -> Tensor:
    sequences, kv_heads, dim = segments.row.numel(), keys.shape[2], keys.shape[3]
    out = keys.new_empty(sequences, kv_heads, dim, dtype=torch.float32)
    _pool[(sequences * kv_heads,)](
        keys, segments.row, segments.key_start, segments.key_length, out, *keys.stride(), kv_heads,
        boundary, kernels._slots(boundary), dim, num_warps=8,
    )  # fmt: skip
    return out


@pytest.mark.parametrize("boundary", [1, 2, 3, 7, 16, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_pooled_keys_have_the_bits_of_pool_boundary(
    device: str, boundary: int, dtype: torch.dtype
) -> None:
    lengths = [0, 1, 2 * boundary - 1, 2 * boundary, 2 * boundary + 1, 2, 5 * boundary]
    keys = draw(1, sum(lengths), 2, 32, device=device, dtype=dtype)
    segments = packed(lengths, device)
    expected = pool_boundary(keys, segments, boundary)
    assert torch.equal(bits(pool(keys, segments, boundary)), bits(expected))


@pytest.mark.gpu
@pytest.mark.parametrize("boundary", [1, 99, 100, 256])
@pytest.mark.parametrize("dtype", kernels.KEY_DTYPES)
def test_pooled_keys_have_the_same_bits_on_the_gpu(boundary: int, dtype: torch.dtype) -> None:
    lengths = [0, 1, 199, 200, 201, 5000]
    keys = draw(1, sum(lengths), 8, 128, device="cuda", dtype=dtype)
    keys[..., :9] = -0.0  # the interpreter's sums forget the sign
    segments = packed(lengths, "cuda")
    expected = pool_boundary(keys, segments, boundary)
    assert torch.equal(bits(pool(keys, segments, boundary)), bits(expected))


# --- The decision --------------------------------------------------------------------------------


@torch.enable_grad()
def bounded(router: AttentionRouter, pooled: Tensor) -> tuple[Tensor, Tensor]:
    """The exact logits of ``pooled``, and how far an evaluation in float32 may be from them.

    A sum of n products and a bias rounds n + 2 times, in any order, with or without fused
    multiply-adds, each time by at most u = 2⁻²⁴ of the sum M of the magnitudes. SiLU is off by a
    few u of its value: 2 |x| + 4 for an exp(-x) computed as 2^(-x log₂ e), 4 for the division, and
    less than 8 for the rest. What a value is off reaches a logit through its gradient J. With
    independent roundings the sum of all is below 6 √(Σ (n + 2) (u J M)²), but once in 3·10⁷ times
    (Hoeffding; Higham and Mary, 2019).
    """
    u = 2.0**-24
    x = pooled.double().requires_grad_()
    outputs, errors = [], []
    for layer in (*router.task_mlp, *router.router_mlp):
        if isinstance(layer, nn.SiLU):
            outputs.append(nn.functional.silu(x))
            errors.append((2 * x.abs() + 16) * u * outputs[-1].abs())
        else:
            weight, bias = layer.weight.double(), layer.bias.double()
            outputs.append(x @ weight.T + bias)
            magnitude = x.abs() @ weight.abs().T + bias.abs()
            errors.append((layer.in_features + 2) ** 0.5 * u * magnitude)
        x = outputs[-1]
    squares = []
    for logit in x.unbind(-1):
        gradients = torch.autograd.grad(logit.sum(), outputs, retain_graph=True)
        parts = [(g * e).square().sum(-1) for g, e in zip(gradients, errors, strict=True)]
        squares.append(torch.stack(parts).sum(0))
    return x.detach(), 6 * torch.stack(squares, -1).sqrt().detach()


@torch.no_grad()
def check(router: AttentionRouter, keys: Tensor, segments: Segments) -> Routing:
    """Logits inside the bound; the modules' decisions wherever the bound leaves no doubt."""
    ours, theirs = router(keys, segments), by_modules(router, keys, segments)
    exact, error = bounded(router, pool_boundary(keys, segments, router.boundary))
    assert ours.gate is None
    assert bool(((ours.logits.double() - exact).abs() <= error).all())
    assert float(error.max()) < 1e-3 * float(exact.abs().max())  # the bound says something
    margin = (ours.logits[..., 1] - ours.logits[..., 0]).abs()
    clear = margin > 2 * error.sum(-1)
    assert torch.equal(ours.decisions[clear], theirs.decisions[clear])
    assert torch.equal(ours.decisions, (ours.logits[..., 1] >= ours.logits[..., 0]).to(torch.int8))
    return ours


@pytest.mark.parametrize(("dim", "multiplier"), [(32, 1), (32, 17), (64, 3), (128, 1), (256, 1)])
def test_logits_are_the_modules_up_to_rounding(
    device: str, launches: list[int], dim: int, multiplier: int
) -> None:
    router = make(device, dim, multiplier)
    check(router, draw(1, 17, 1, dim, device=device), packed([7, 0, 10], device))
    assert launches == [1]


@torch.no_grad()
def test_calibrated_logits_are_the_modules_up_to_rounding(device: str) -> None:
    router = make(device, 32, 2)
    router.calibrate(draw(5, 3, 32, device=device, seed=3))
    keys = draw(len(LENGTHS), 40, 3, 32, device=device)
    segments = padded(LENGTHS, 40, "left", device)
    found, expected = router(keys, segments), by_modules(router, keys, segments)
    torch.testing.assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    plain = make(device, 32, 2)(keys, segments)
    assert not torch.allclose(found.logits, plain.logits, atol=1e-2), "calibration has no effect"
    router.first_head = 1  # as a process of sequence parallelism that has the last two heads
    part = router(keys[:, :, 1:], segments)
    assert torch.equal(part.logits, found.logits[:, 1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_many_decisions_are_the_modules(device: str, dtype: torch.dtype) -> None:
    router = make(device)
    decided = [
        check(router, keys, dense(keys)).decisions
        for seed in range(3)
        for keys in [draw(3, 12, 4, 32, device=device, dtype=dtype, seed=seed)]
    ]
    assert 0 < float(torch.cat(decided).float().mean()) < 1  # both are drawn


def test_a_tie_is_sparse(device: str) -> None:
    router, keys = make(device), draw(2, 20, 3, 32, device=device)
    last = router.router_mlp[4]
    with torch.no_grad():
        last.weight[1], last.bias[1] = last.weight[0], last.bias[0]
        routing = router(keys, dense(keys))
        assert torch.equal(routing.logits[..., 0], routing.logits[..., 1])
        assert bool((routing.decisions == 1).all())
        last.weight.zero_()
        last.bias.copy_(torch.tensor([1e-30, 0.0]))  # the smallest lead decides
        assert bool((router(keys, dense(keys)).decisions == 0).all())


@torch.no_grad()
def test_a_sequence_has_the_same_bits_alone_padded_and_packed(device: str) -> None:
    router = make(device)
    sequences = [draw(n, 2, 32, device=device, seed=n) for n in LENGTHS]
    alone = [router(x[None], dense(x[None])) for x in sequences]
    decisions = torch.cat([routing.decisions for routing in alone])
    logits = torch.cat([routing.logits for routing in alone])
    expected = Routing(decisions, logits)
    everything = torch.cat(sequences)[None]
    assert same(router(everything, packed(LENGTHS, device)), expected)
    for side in ("left", "right"):
        # What lies in the padding, and in the middle of a sequence, must not matter.
        batch = torch.full((len(LENGTHS), 45, 2, 32), torch.nan, device=device)
        for row, x in zip(batch, sequences, strict=True):
            inside = slice(45 - len(x), None) if side == "left" else slice(0, len(x))
            row[inside] = x
            row[inside][BOUNDARY:-BOUNDARY] = torch.nan if len(x) > 2 * BOUNDARY else x[4:-4]
        assert same(router(batch, padded(LENGTHS, 45, side, device)), expected)
    # A [B, Hkv, D, T] cache whose last axis is not the keys', and the keys of a fused projection.
    turned = everything.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    wide = torch.full((1, everything.shape[1], 8, 32), torch.nan, device=device)
    wide[:, :, 4:6] = everything
    for view in (turned, wide[:, :, 4:6]):
        assert same(router(view, packed(LENGTHS, device)), expected)


@torch.no_grad()
def test_segments_may_be_views_of_any_integers(device: str) -> None:
    router, keys = make(device), draw(1, 20, 2, 32, device=device)
    segments = packed([5, 15], device)
    apart = Segments(*(torch.stack([x, x], 1).to(torch.int32)[:, 0] for x in segments))
    assert same(router(keys, apart), router(keys, segments))


@torch.no_grad()
def test_nothing_to_decide_gives_empty_results(device: str) -> None:
    router = make(device)
    keys = torch.ones(0, 5, 2, 32, device=device)
    assert router(keys, dense(keys)).decisions.shape == (0, 2)
    keys = torch.ones(2, 0, 3, 32, device=device)
    routing = check(router, keys, dense(keys))  # the logits of zeros, as the modules say
    assert routing.logits.shape == (2, 3, 2)


# --- What stays as it was ------------------------------------------------------------------------


@torch.no_grad()
def test_new_parameters_are_noticed(device: str) -> None:
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    before = router(keys, dense(keys))
    with torch.enable_grad():
        router.train()(keys, dense(keys)).logits.square().sum().backward()
    torch.optim.SGD(router.parameters(), lr=0.1).step()
    stepped = check(router.eval(), keys, dense(keys))
    assert not torch.equal(stepped.logits, before.logits)
    other = make(device, seed=5)
    router.load_state_dict(other.state_dict())
    assert same(router(keys, dense(keys)), other(keys, dense(keys)))


def test_the_state_dict_is_untouched(device: str) -> None:
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    before = {name: value.clone() for name, value in router.state_dict().items()}
    with torch.no_grad():
        router(keys, dense(keys))
    after = router.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_gradients_come_from_the_modules(device: str, launches: list[int]) -> None:
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    for training in (True, False):
        router.train(training).zero_grad()
        routing = router(keys, dense(keys))
        assert (routing.gate is not None) == training
        (routing.msr() if training else routing.logits).sum().backward()
        for name, parameter in router.named_parameters():
            assert bool((parameter.grad != 0).any()), (training, name)
    router.eval().requires_grad_(False)
    keys.requires_grad_()
    router(keys, dense(keys)).logits.sum().backward()
    assert bool((keys.grad != 0).any())
    assert launches == []
    router(keys.detach(), dense(keys))  # grad mode is on, but nobody wants a gradient
    assert launches == [1]


@torch.no_grad()
def test_autocast_changes_no_bit(device: str, launches: list[int]) -> None:
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    expected = router(keys, dense(keys))
    with torch.autocast(device, dtype=torch.bfloat16):
        assert same(router(keys, dense(keys)), expected)
    assert launches == [1, 1]


@torch.no_grad()
def test_hooks_and_replaced_layers_are_called(device: str, launches: list[int]) -> None:
    calls: list[str] = []

    class Louder(AttentionRouter):
        def logits(self, pooled: Tensor) -> Tensor:
            calls.append("override")
            return super().logits(pooled)

    class Adapted(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            calls.append("layer")
            return super().forward(x)

    keys = draw(2, 20, 2, 32, device=device)
    hooked, before, replaced, shared = (make(device) for _ in range(4))
    hooked.task_mlp.register_forward_hook(lambda *_: calls.append("hook"))
    before.router_mlp[2].register_forward_pre_hook(lambda *_: calls.append("pre-hook"))
    replaced.router_mlp[0] = Adapted(32, 64, device=device)
    louder = Louder(32, 2, BOUNDARY, device=device).eval()
    shared.task_mlp = nn.Sequential(nn.Linear(32, 32, device=device), nn.Tanh())
    for router in (hooked, before, replaced, louder, shared):
        assert same(router(keys, dense(keys)), by_modules(router, keys, dense(keys)))
    assert calls == [x for name in ("hook", "pre-hook", "layer", "override") for x in (name, name)]
    assert launches == []


@torch.no_grad()
@pytest.mark.parametrize(
    ("router", "dtype"),
    [
        (AttentionRouter(32, boundary=None), torch.float32),
        (AttentionRouter(32, boundary=2000), torch.float32),  # more than a program can hold
        (AttentionRouter(16, boundary=BOUNDARY), torch.float32),
        (AttentionRouter(48, boundary=BOUNDARY), torch.float32),
        (AttentionRouter(32, boundary=BOUNDARY), torch.float64),
        (AttentionRouter(32, boundary=BOUNDARY, dtype=torch.bfloat16), torch.float32),
    ],
    ids=lambda value: value.extra_repr() if isinstance(value, nn.Module) else str(value),
)
def test_other_sizes_and_dtypes_run_the_modules(
    device: str, launches: list[int], router: AttentionRouter, dtype: torch.dtype
) -> None:
    router.eval().to(device)
    keys = draw(1, 20, 2, router.head_dim, device=device, dtype=dtype)
    assert same(router(keys, dense(keys)), by_modules(router, keys, dense(keys)))
    assert launches == []


DECIDE = """
import sys, torch
sys.modules.update({without})
from elasticore.layout import SequenceLayout
from elasticore.router import AttentionRouter
keys = torch.ones(1, 9, 2, 32, device={device!r})
segments = SequenceLayout.dense().segments(1, 9, 9, keys.device)
with torch.no_grad():
    AttentionRouter(32, device=keys.device).eval()(keys, segments)
print(*(name for name in sys.modules if name.startswith("elasticore.backends.triton")))
"""


@pytest.mark.parametrize("without", ["", "triton=None"], ids=["on the CPU", "without triton"])
def test_kernels_are_not_imported_where_they_cannot_run(device: str, without: str) -> None:
    code = DECIDE.format(without=without, device=device if without else "cpu")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@torch.no_grad()
def test_bad_calls_are_named_as_ever(device: str) -> None:
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    with pytest.raises(ValueError, match="keys must be"):
        router(keys[0], dense(keys))
    with pytest.raises(TypeError, match="segments must be the Segments"):
        router(keys, tuple(dense(keys)))


# --- torch.compile -------------------------------------------------------------------------------


def arguments(router: AttentionRouter, keys: Tensor) -> tuple[object, ...]:
    segments = dense(keys)
    fields = segments.row, segments.key_start, segments.key_length
    calibration = [] if router.scale is None else [router.scale, router.shift]
    return keys, *fields, BOUNDARY, [p.detach() for p in router.parameters()], calibration


def test_the_operation_keeps_pytorchs_promises(device: str) -> None:
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    torch.library.opcheck(kernels._operation, arguments(router, keys), test_utils=tests)
    router.calibrate(draw(3, 2, 32, device=device))
    torch.library.opcheck(kernels._operation, arguments(router, keys), test_utils=tests)


@torch.no_grad()
def test_compiled_it_is_one_operation_with_the_same_bits(device: str) -> None:
    router, keys = make(device), draw(2, 20, 2, 32, device=device)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    torch.compiler.reset()
    try:
        compiled = torch.compile(router, backend=backend, fullgraph=True)
        assert same(compiled(keys, dense(keys)), router(keys, dense(keys)))
    finally:
        torch.compiler.reset()
    (graph,) = graphs
    called = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert torch.ops.elasticore.route.default in called
    assert nn.functional.linear not in called


# --- Real sizes ----------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", kernels.KEY_DTYPES)
@pytest.mark.parametrize(("dim", "multiplier"), [(128, 4), (64, 4), (256, 2), (128, 3), (32, 1)])
@torch.no_grad()
def test_real_sizes(dim: int, multiplier: int, dtype: torch.dtype) -> None:
    router = make("cuda", dim, multiplier, boundary=100)
    lengths = [4096, 0, 1, 199, 200, 201, 3000]
    keys = draw(1, sum(lengths), 8, dim, device="cuda", dtype=dtype)
    together = check(router, keys, packed(lengths, "cuda"))
    alone = [router(x, dense(x)) for x in keys.split(lengths, 1)]
    assert torch.equal(together.logits, torch.cat([routing.logits for routing in alone]))
    for _ in range(20):  # whichever slice finishes last
        assert same(router(keys, packed(lengths, "cuda")), together)


@pytest.mark.gpu
@torch.no_grad()
def test_a_graph_decides_new_keys_and_nothing_waits() -> None:
    router = make("cuda", 128, 4, boundary=100)
    keys, segments = draw(1, 5000, 8, 128, device="cuda"), packed([2000, 3000], "cuda")
    router(keys, segments)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        router(keys, segments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = router(keys, segments)
    for seed in range(3):
        keys.copy_(draw(1, 5000, 8, 128, device="cuda", seed=seed))
        graph.replay()
        assert same(captured, router(keys, segments))


@pytest.mark.gpu
@torch.no_grad()
def test_offsets_need_more_than_32_bits() -> None:
    router = make("cuda", 128, 4, boundary=100)
    tokens = 2**31 // 1024 + 1000
    keys = torch.full((1, tokens, 8, 128), torch.nan, device="cuda", dtype=torch.bfloat16)
    lengths = [tokens - 500, 500]
    for first, last in ((0, 100), (tokens - 600, tokens)):
        keys[:, first:last] = draw(1, last - first, 8, 128, device="cuda", seed=first)
    small = keys[:, -500:].clone()
    routing = check(router, keys, packed(lengths, "cuda"))
    assert torch.equal(routing.logits[1:], router(small, dense(small)).logits)
