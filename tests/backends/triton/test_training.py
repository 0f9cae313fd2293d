"""Training on the triton backend: what runs when, checkpointing, a model, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad
from torch.utils.checkpoint import checkpoint

import elasticore as ec
from elasticore import HeadMode, testing
from elasticore.backends.triton import kernels, training
from elasticore.errors import ElasticoreError
from elasticore.testing import Case, Problem

FULL, STREAMING, SELECTED = HeadMode
PAIRS = {"fa-ssa": (FULL, STREAMING), "fa-xa": (FULL, SELECTED), "xa-ssa": (SELECTED, STREAMING)}
Fit = Callable[[Case], Case]
SMALL = Case("right", 1, 32, 101, "some", "32")


def problem(pair: str = "fa-ssa", case: Case = SMALL, dtype: torch.dtype = torch.float16,
            device: str = "cpu") -> Problem:  # fmt: skip
    return testing.make_problem(case, dtype=dtype, device=device, lanes=PAIRS[pair], gated=True)


def inputs(problem: Problem) -> tuple[Tensor, ...]:
    assert problem.plan.gate is not None
    return problem.q, problem.k, problem.v, problem.plan.gate


def on(problem: Problem, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
    """The problem's output, as a function of what wants gradients."""
    plan = dataclasses.replace(problem.plan, gate=gate, check=False)
    return problem._replace(q=q, k=k, v=v, plan=plan).run("triton")


def noise(problem: Problem) -> Tensor:
    drawn = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(problem.q)


class Launches:
    """What was launched forward: a kernel's name, and how many branches it computed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: list[tuple[str, int]] = []
        one, choose = kernels.attention, kernels.choose_training

        def attention(*args: Any, **settings: Any) -> Any:
            self.seen.append(("one", 1))
            return one(*args, **settings)

        def counted(*args: Any, **settings: Any) -> Any:
            chosen = choose(*args, **settings)

            def snapshot(*args: Any, **settings: Any) -> Any:
                self.seen.append(("snapshot", 1 + settings["both"]))
                return chosen.snapshot(*args, **settings)

            return chosen._replace(snapshot=snapshot)

        monkeypatch.setattr(kernels, "attention", attention)
        monkeypatch.setattr(kernels, "choose_training", counted)

    def branches(self) -> int:
        """Branches computed since the last time."""
        seen, self.seen = self.seen, []
        return sum(count for _, count in seen)


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch, fit: Fit) -> Launches:
    """Of both kinds of training kernels."""
    return Launches(monkeypatch)


def test_a_gate_that_wants_no_gradient_costs_nothing(
    launches: Launches, fit: Fit, device: str
) -> None:
    p = problem(case=fit(SMALL), device=device)
    inputs(p)[3].requires_grad_(False)
    p.run("triton")
    assert launches.seen == [("one", 1)]


@pytest.mark.parametrize("pair", PAIRS)
def test_checkpointing_runs_one_branch_and_then_both(
    pair: str, launches: Launches, fit: Fit, device: str
) -> None:
    p = problem(pair, fit(SMALL), device=device)
    weight = noise(p)
    out = p.run("triton")
    assert launches.branches() == 2
    expected = grad(out, inputs(p), weight)
    again = checkpoint(lambda *x: on(p, *x), *inputs(p), use_reentrant=False)
    assert launches.branches() == 1
    assert torch.equal(again, out)
    assert all(map(torch.equal, grad(again, inputs(p), weight), expected))
    assert launches.branches() == 2


def test_checkpoints_inside_each_other(launches: Launches, fit: Fit, device: str) -> None:
    p = problem(case=fit(SMALL), device=device)
    weight = noise(p)
    expected = grad(p.run("triton"), inputs(p), weight)
    launches.branches()

    def inner(*x: Tensor) -> Tensor:
        return checkpoint(lambda *y: on(p, *y), *x, use_reentrant=False)

    out = checkpoint(inner, *inputs(p), use_reentrant=False)
    assert all(map(torch.equal, grad(out, inputs(p), weight), expected))
    # The outer one's second forward ends where the inner one's inputs are known.
    assert launches.branches() == 1 + 2


def test_saved_tensors_that_are_kept_elsewhere_are_all_computed(
    launches: Launches, fit: Fit, device: str
) -> None:
    p = problem(case=fit(SMALL), device=device)
    with torch.autograd.graph.save_on_cpu():
        out = p.run("triton")
    assert launches.branches() == 2
    expected = grad(p.run("triton").sum(), inputs(p))
    assert all(map(torch.equal, grad(out.sum(), inputs(p)), expected))


def test_a_checkpoint_that_never_recomputes_is_an_error(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "runs_again", lambda: True)
    p = problem(device=device)
    out = p.run("triton")
    with pytest.raises(ElasticoreError, match="did not run this attention again"):
        out.sum().backward()


def test_second_derivatives_are_refused(device: str) -> None:
    p = problem(device=device)
    with pytest.raises(ec.UnsupportedRequest, match="first derivatives only"):
        grad(p.run("triton").sum(), inputs(p), create_graph=True)


def test_wide_heads_are_refused_with_gradients(device: str) -> None:
    p = problem(case=Case("dense", 1, 144, 20, "all", "32"), device=device)
    with pytest.raises(ec.UnsupportedRequest, match="head_dim 144"):
        p.run("triton")
    with torch.no_grad():
        assert p.run("triton").shape == p.q.shape


@pytest.mark.parametrize("backend", ["serial", "triton"])
def test_gradients_break_a_compiled_graph(backend: str, device: str) -> None:
    p = problem(case=Case("dense", 1, 32, 40, "all", "32"), device=device)
    torch.compiler.reset()

    def twice() -> Tensor:
        return 2 * p.run(backend)

    compiled, expected = torch.compile(twice, backend="aot_eager")(), twice()
    assert torch.equal(compiled, expected)
    ours, eager = grad(compiled.sum(), inputs(p)), grad(expected.sum(), inputs(p))
    assert all(map(torch.equal, ours, eager))
    with pytest.raises(Exception, match="do without fullgraph=True"):
        torch.compile(twice, backend="eager", fullgraph=True)()


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_trains_as_on_the_serial_backend(
    checkpointing: bool, launches: Launches, device: str
) -> None:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        vocab_size=64,
        attn_implementation="sdpa",
    )
    backbone = transformers.LlamaForCausalLM(config).requires_grad_(False)
    prompt = torch.randint(3, 64, (2, 60), device=device)

    def step(backend: str) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(1)
        way = ec.Elastic(sparse=ec.Streaming(16, 32))
        model = ec.elasticize(copy.deepcopy(backbone).to(device), way).train()
        if checkpointing:
            # The new name of transformers 5.2x, or the old one.
            enable = getattr(model, "activation_checkpointing_enable", None)
            (enable or model.gradient_checkpointing_enable)({"use_reentrant": False})
        with ec.use_backend(backend):
            torch.manual_seed(2)  # the noise of the sampled decisions
            loss = model(prompt, labels=prompt, use_cache=False).loss
            loss.backward()
        return loss, [p.grad for router in ec.routers(model) for p in router.parameters()]

    loss, gradients = step("serial")
    assert launches.branches() == 0
    ours, our_gradients = step("triton")
    assert launches.branches() == 2 * (3 if checkpointing else 2)
    # float32 throughout: a few hundred roundings one after the other, from layer to layer.
    assert (ours - loss).abs() <= 256 * 2**-23 * loss
    for mine, right in zip(our_gradients, gradients, strict=True):
        assert bool(right.any())
        # Of the rounding of hidden states of unit size, the gate's sum keeps what does not cancel.
        assert (mine - right).norm() <= 1e-3 * right.norm()


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("layout", ["dense", "packed"])
def test_training_never_waits(pair: str, layout: str, fit: Fit) -> None:
    p = problem(pair, Case(layout, 4, 128, 2177, "all", "128"), torch.bfloat16, "cuda")
    chosen = {
        name: ec.XAttention()
        for name in ("retrieval", "sparse")
        if isinstance(getattr(p.plan, name), ec.BlockSelector)
    }
    plan = dataclasses.replace(p.plan, **chosen, check=False)
    p = p._replace(plan=plan)
    weight = noise(p)
    grad(p.run("triton"), inputs(p), weight)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        grad(p.run("triton"), inputs(p), weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_the_first_forward_of_a_checkpoint_holds_one_output(fit: Fit) -> None:
    case = Case("dense", 4, 128, 2177, "all", "128")
    p = problem("fa-ssa", case, torch.bfloat16, "cuda")
    grad(p.run("triton").sum(), inputs(p))
    size = p.q.numel() * p.q.element_size()

    def held(run: Any) -> int:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        out = run()
        assert out.shape == p.q.shape
        return torch.cuda.memory_allocated() - before

    kept = held(lambda: checkpoint(lambda *x: on(p, *x), *inputs(p), use_reentrant=False))
    both = held(lambda: p.run("triton"))
    assert kept < 1.5 * size
    assert 2 * size <= both < 2.5 * size
