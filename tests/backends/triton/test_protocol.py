"""The Hopper kernels' barriers, blocks and masks, tried without a GPU on the emulator beside."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore as ec
from elasticore import HeadMode, HeadPlan, testing
from elasticore.backends.triton.hopper import dkv, dq, forward, snapshot
from elasticore.testing import Case
from tests.plans import pair_of

from . import emulator

FULL, STREAMING, SELECTED = HeadMode
CASES = [
    (Case("dense", 2, 32, 513, "some", "128"), (FULL, STREAMING)),
    (Case("packed", 3, 32, 320, "all", "128"), (FULL, SELECTED)),
    (Case("left", 1, 32, 260, "some", "128"), (FULL, SELECTED)),
    (Case("right", 2, 32, 390, "all", "128"), (FULL, STREAMING)),
    (Case("packed", 2, 32, 300, "one", "128"), (SELECTED, STREAMING)),
]
pytestmark = [
    pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels themselves run here"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NaN that is masked later
]


def emulate(monkeypatch: pytest.MonkeyPatch, seed: int, skip: str = "") -> None:
    for module in (forward, snapshot, dq, dkv):
        monkeypatch.setattr(module, "launch", partial(emulator.launch, seed=seed, skip=skip))
        monkeypatch.setattr(module, "processors", lambda device: 2)


def close(ours: Tensor | None, exact: Tensor) -> None:
    # Weights, their gradients and the result are rounded to float16, 2^-11 each.
    assert ours is not None
    exact = exact.detach()
    assert (ours - exact).abs().max() <= 3 * 2**-11 * max(2.0, float(exact.abs().max()))


@pytest.mark.parametrize("seed", range(len(CASES)))
def test_no_order_of_events_matters(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    case, pair = CASES[seed]
    p = testing.make_problem(case, dtype=torch.float16, lanes=pair, gated=True)
    assert p.plan.gate is not None
    short = ec.Streaming(128 * (seed % 2), 128)
    plan = HeadPlan.from_gate(p.plan.gate, *pair_of(pair, short), block_size=128)
    p = p._replace(plan=plan)
    segments = p.segments()
    inside = torch.zeros(p.q.shape[0], p.k.shape[2], dtype=torch.bool)
    for row, *_, start, length in torch.stack(tuple(segments), 1).tolist():
        inside[row, start : start + length] = True
    outside = ~inside[:, None, :, None]

    def poisoned(x: Tensor) -> Tensor:
        return x.detach().masked_fill(outside[:, :, -x.shape[2] :], torch.nan)

    def dense(decisions: Tensor) -> Tensor:
        return testing.dense_attention(p._replace(plan=plan.with_decisions(decisions)))

    if case.layout == "packed":
        q, k, v = p.q.detach(), p.k.detach(), p.v.detach()
    else:
        q, k, v = (poisoned(x) for x in (p.q, p.k, p.v))
    settings: dict[str, Any] = {"scale": p.scale, "sink": seed % 2, "local": 1, "block_size": 128}
    lists = None
    if SELECTED in pair:
        assert plan.selector is not None
        lists = plan.selector.select(q, k, segments, block_size=128, scale=p.scale)
    call = (q, k, v, plan.modes, None if case.layout == "dense" else segments, lists)
    exact = dense(plan.decisions)

    emulate(monkeypatch, seed)
    out, lse = forward.attention(*call, **settings)
    close(out, exact)
    if pair[0] is FULL:
        both = snapshot.attention(*call, sparse=pair[1], both=True, **settings)
        close(both[0], exact)
        close(both[1], dense(plan.swapped().decisions))
        alone = snapshot.attention(*call, sparse=pair[1], both=False, **settings)
        assert torch.equal(alone[0], both[0])
        assert torch.equal(alone[2], both[2])
    weight = torch.randn(q.shape, generator=torch.Generator().manual_seed(seed)).half()
    wanted = torch.autograd.grad((exact * weight).sum(), (p.q, p.k, p.v))
    delta = (exact.detach() * weight).sum(3).float()
    grad = weight if case.layout == "packed" else poisoned(weight)
    backward = (q, k, v, grad, lse, delta, *call[3:])
    ours = dq.query_gradient(*backward, **settings), *dkv.key_value_gradients(*backward, **settings)
    for mine, right in zip(ours, wanted, strict=True):
        close(mine, right)


@pytest.mark.parametrize("waits", ["fetch", "step"])
def test_a_wait_that_is_missing_shows(waits: str, monkeypatch: pytest.MonkeyPatch) -> None:
    p = testing.make_problem(Case("dense", 2, 32, 640, "all", "128"), dtype=torch.float16)
    modes = torch.zeros_like(p.plan.modes)
    settings: dict[str, Any] = {"scale": p.scale, "sink": 1, "local": 1, "block_size": 128}

    def run(skip: str) -> Tensor:
        emulate(monkeypatch, 0, skip)
        return forward.attention(p.q, p.k, p.v, modes, None, None, **settings)[0]

    right = run("")
    with pytest.raises(AssertionError):
        assert torch.equal(run(waits), right)
