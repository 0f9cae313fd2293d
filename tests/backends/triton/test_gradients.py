"""Gradients on the triton backend: right, and bit for bit what they must be."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

import elasticore as ec
from elasticore import HeadMode, testing
from elasticore.backends.triton import kernels, portable
from elasticore.testing import Case, Problem

GPU = torch.cuda.is_available()
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float16, torch.float32]
FULL, STREAMING, SELECTED = HeadMode
PAIRS = {"fa-ssa": (FULL, STREAMING), "fa-xa": (FULL, SELECTED), "xa-ssa": (SELECTED, STREAMING)}
NAMES = ("q", "k", "v", "gate")
Fit = Callable[[Case], Case]

SMALL = [
    Case("dense", 2, 32, 129, "some", "32"),
    Case("left", 1, 48, 129, "some", "32"),
    Case("right", 1, 64, 101, "some", "32"),
    Case("packed", 1, 128, 113, "some", "32"),
    Case("right", 1, 32, 113, "all", "32"),
    Case("packed", 4, 32, 127, "one", "32"),
    Case("left", 1, 32, 1, "all", "64"),
]
"""Every layout; groups, head dimensions with and without padding, and queries of all kinds."""


def problem(pair: str = "fa-ssa", case: Case = SMALL[2], dtype: torch.dtype = torch.float16,
            device: str = "cpu") -> Problem:  # fmt: skip
    return testing.make_problem(case, dtype=dtype, device=device, lanes=PAIRS[pair], gated=True)


def inputs(problem: Problem) -> tuple[Tensor, ...]:
    assert problem.plan.gate is not None
    return problem.q, problem.k, problem.v, problem.plan.gate


def noise(problem: Problem) -> Tensor:
    drawn = torch.randn(problem.q.shape, generator=torch.Generator().manual_seed(1))
    return drawn.to(problem.q)


def conformance() -> list[tuple[Case, str, torch.dtype, str]]:
    """On a GPU the whole cover with all pairs, else each small case with one; dtypes in turns."""
    if not GPU:
        turns = zip(SMALL, itertools.cycle(PAIRS), itertools.cycle(DTYPES), strict=False)
        return [(*one, "portable") for one in turns]
    both = list(itertools.product(testing.matrix(), PAIRS))
    found = [
        (*one, dtype, "portable") for one, dtype in zip(both, itertools.cycle(DTYPES), strict=False)
    ]
    if torch.cuda.get_device_capability() == (9, 0):
        fitting = [one for one in both if one[0].preset == "128" and one[0].head_dim >= 64]
        found += [(*one, dtype, "hopper") for one in fitting for dtype in DTYPES[:2]]
    return found


@pytest.mark.parametrize(("case", "pair", "dtype", "kernel"), conformance(), ids=str)
def test_gradients(
    case: Case,
    pair: str,
    dtype: torch.dtype,
    kernel: str,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(kernels, "choose_training", lambda *_, **__: kernels.TRAINING[kernel])
    testing.check_gradients("triton", case, lanes=PAIRS[pair], dtype=dtype, device=device)


@pytest.mark.gpu
@pytest.mark.parametrize("pair", PAIRS)
def test_two_runs_have_the_same_bits(pair: str, fit: Fit) -> None:
    case = Case("left", 4, 128, 2177, "all", "128")
    how = {"lanes": PAIRS[pair], "gradients": True, "dtype": torch.float16, "device": "cuda"}
    testing.check_repeatable("triton", case, **how)


@pytest.mark.parametrize("pair", PAIRS)
def test_without_a_gate_every_lane_goes_backward(pair: str, device: str) -> None:
    lanes = PAIRS[pair]
    plain = testing.make_problem(SMALL[3], dtype=torch.float32, device=device, lanes=lanes)
    x = [t.detach().requires_grad_() for t in plain[:3]]
    plain = plain._replace(q=x[0], k=x[1], v=x[2])
    weight = noise(plain)
    exact = grad(testing.dense_attention(plain), x, weight.double())
    for ours, right in zip(grad(plain.run("triton"), x, weight), exact, strict=True):
        # Sums of up to 113 terms, each a product over 128 dimensions.
        assert (ours - right).abs().max() <= 128 * 2**-23 * right.abs().max().clamp(min=1)


@pytest.mark.parametrize("wanted", ["q", "v", "gate", "k gate"])
def test_only_what_is_wanted_is_computed(
    wanted: str, fit: Fit, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = problem("xa-ssa", fit(SMALL[1]), device=device)
    weight = noise(p)
    tensors = dict(zip(NAMES, inputs(p), strict=True))
    everything = dict(zip(NAMES, grad(p.run("triton"), inputs(p), weight), strict=True))
    names = wanted.split()
    called = []
    choice = kernels.choose_training(*p[:3], scale=p.scale, block_size=p.plan.block_size)

    def query(*args: Any, **settings: Any) -> Any:
        called.append("q")
        return choice.query_gradient(*args, **settings)

    def key_value(*args: Any, **settings: Any) -> Any:
        called.extend(name for name, want in zip("kv", settings["wanted"], strict=True) if want)
        return choice.key_value_gradients(*args, **settings)

    counted = choice._replace(query_gradient=query, key_value_gradients=key_value)
    monkeypatch.setattr(kernels, "choose_training", lambda *_, **__: counted)
    for name, tensor in tensors.items():
        tensor.requires_grad_(name in names)
    some = grad(p.run("triton"), [tensors[name] for name in names], weight)
    assert called == [name for name in names if name != "gate"]
    for name, ours in zip(names, some, strict=True):
        # Kernels with fewer outputs are compiled apart, which on a GPU may turn a last bit.
        tolerance = 0 if not GPU or name in ("q", "gate") else 2**-10
        assert (ours - everything[name]).abs().max() <= tolerance * everything[name].abs().max()


@pytest.mark.parametrize("pair", ["fa-ssa", "fa-xa"])
@pytest.mark.parametrize("case", [SMALL[1], SMALL[3]], ids=str)
def test_both_branches_in_one_launch(case: Case, pair: str, fit: Fit, device: str) -> None:
    p = problem(pair, fit(case), device=device)
    q, k, v, modes = p.q.detach(), p.k.detach(), p.v.detach(), p.plan.modes
    where, lists = p.segments(), None
    sink, local = p.plan.streaming.blocks(p.plan.block_size)
    settings: dict[str, Any] = {
        "scale": p.scale,
        "sink": sink,
        "local": local,
        "block_size": p.plan.block_size,
    }
    if pair == "fa-xa":
        assert p.plan.selector is not None
        lists = p.plan.selector.select(q, k, where, block_size=p.plan.block_size, scale=p.scale)
    sparse = PAIRS[pair][1]
    choice = kernels.choose_training(q, k, v, scale=p.scale, block_size=p.plan.block_size)

    def run(modes: Tensor, both: bool) -> tuple[Tensor, Tensor | None, Tensor]:
        return choice.snapshot(q, k, v, modes, where, lists, sparse=sparse, both=both, **settings)

    # One branch alone has the bits that it has beside the other.
    out, other, lse = run(modes, True)
    alone, none, alone_lse = run(modes, False)
    assert none is None
    assert torch.equal(alone, out)
    assert torch.equal(alone_lse, lse)
    # A head has the same bits whether a mode was chosen or not.
    swapped, chosen, _ = run(p.plan.swapped().modes, True)
    assert other is not None
    assert chosen is not None
    assert torch.equal(swapped, other)
    assert torch.equal(chosen, out)
    if not GPU:  # where the same code is compiled differently
        expected, level = portable.attention(
            q, k, v, torch.full_like(modes, int(sparse)), where, lists, **settings
        )
        ours, _, ours_level = run(torch.full_like(modes, int(sparse)), True)
        assert torch.equal(ours, expected)
        assert torch.equal(ours_level, level)


def test_the_gate_s_gradient_is_within_a_thousandth(fit: Fit, device: str) -> None:
    case = fit(SMALL[0] if not GPU else Case("dense", 4, 128, 1089, "all", "32"))
    for dtype in DTYPES[:2] if GPU else DTYPES[:1]:
        p = problem("fa-ssa", case, dtype, device)
        size = p.plan.block_size
        narrow = dataclasses.replace(p.plan, sparse=ec.Streaming(0, size), check=False)
        p = p._replace(plan=narrow)
        weight, gate = noise(p), inputs(p)[3]
        (ours,) = grad(p.run("triton"), gate, weight)
        with torch.no_grad():
            retrieval, sparse = (
                testing.dense_attention(p._replace(plan=dataclasses.replace(
                    p.plan, gate=torch.full_like(gate, value), check=False)))
                for value in (0.0, 1.0)
            )  # fmt: skip
            terms = (weight.double() * (sparse - retrieval)).unflatten(1, (gate.shape[1], -1))
        error = (ours - terms.sum((2, 3, 4))).abs()
        assert bool((error <= 1e-3 * terms.abs().sum((2, 3, 4))).all())


def test_the_gate_s_gradient_is_zero_where_the_branches_agree(fit: Fit, device: str) -> None:
    p = problem(case=fit(SMALL[2]), device=device)
    size = p.plan.block_size
    wide = dataclasses.replace(p.plan, sparse=ec.Streaming(size, 3 * size), check=False)
    (gate,) = grad(p._replace(plan=wide).run("triton").sum(), inputs(p)[3])
    assert not gate.any()


def test_padding_may_hold_anything(fit: Fit, device: str) -> None:
    p = problem(case=fit(Case("left", 1, 32, 70, "all", "32")), device=device)
    weight = noise(p)
    expected = grad(p.run("triton"), inputs(p), weight)
    inside = torch.zeros(p.q.shape[0], p.q.shape[2], dtype=torch.bool, device=device)
    for row, start, length, *_ in torch.stack(p.segments(), 1).tolist():
        inside[row, start : start + length] = True
    assert not inside.all()
    poisoned = weight.masked_fill(~inside[:, None, :, None], torch.nan)
    again = grad(p.run("triton"), inputs(p), poisoned)
    assert all(map(torch.equal, again, expected))


def test_an_incoming_gradient_of_any_strides(fit: Fit, device: str) -> None:
    p = problem(case=fit(SMALL[2]), device=device)
    out, one = p.run("triton"), torch.ones((), device=device).half()
    ones = grad(out, inputs(p), torch.ones_like(out), retain_graph=True)
    shifted = one.repeat(out.numel() + 1)[1:].view(out.shape)  # on an odd address
    for strange in (one.expand_as(out), shifted):
        again = grad(out, inputs(p), strange, retain_graph=True)
        assert all(map(torch.equal, again, ones))


def test_inputs_of_any_strides(fit: Fit, device: str) -> None:
    p = problem("fa-xa", case=fit(SMALL[3]), device=device)
    weight = noise(p)
    expected = grad(p.run("triton"), inputs(p), weight)
    # Tokens 8 numbers further apart: 16 bytes, and no more.
    padded = [torch.nn.functional.pad(t, (0, 8))[..., :-8].detach() for t in inputs(p)[:3]]
    q, k, v = (t.requires_grad_() for t in padded)
    again = p._replace(q=q, k=k, v=v)
    odd = torch.nn.functional.pad(weight, (0, 8))[..., :-8]
    for ours, right in zip(grad(again.run("triton"), inputs(again), odd), expected, strict=True):
        # Kernels for other strides are compiled apart, which may turn a last bit.
        tolerance = 2**-10 if GPU else 0
        assert (ours - right).abs().max() <= tolerance * right.abs().max()


@pytest.mark.gpu
def test_kernel_choice() -> None:
    p = problem(case=Case("dense", 1, 64, 256, "all", "128"), device="cuda")
    hopper = torch.cuda.get_device_capability() == (9, 0)
    settings = {"scale": 1.0, "block_size": 128}
    expected = kernels.TRAINING["hopper" if hopper else "portable"]
    assert kernels.choose_training(*p[:3], **settings) is expected  # type: ignore[arg-type]
    for change in ({"block_size": 64}, {"scale": -1.0}):
        chosen = kernels.choose_training(*p[:3], **(settings | change))  # type: ignore[arg-type]
        assert chosen is kernels.TRAINING["portable"]


@pytest.mark.parametrize("scale", [-0.3, 0.0])
def test_scales_that_are_not_positive(scale: float, device: str) -> None:
    p = problem(dtype=torch.float32, device=device)._replace(scale=scale)
    weight = noise(p)
    exact = grad(testing.dense_attention(p), inputs(p)[:3], weight.double())
    for ours, right in zip(grad(p.run("triton"), inputs(p)[:3], weight), exact, strict=True):
        # Sums of up to 101 terms, each a product over 64 dimensions.
        assert (ours - right).abs().max() <= 101 * 2**-23 * right.abs().max().clamp(min=1)
