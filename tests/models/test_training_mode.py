"""Training mode: gates carry gradients to every router, and to nothing that is frozen."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import elasticore
from elasticore import Elastic, Router

from .tiny import FAMILIES, SETTINGS, routings, small, spread, tiny, tokens

PROMPT = tokens(2, 80)


def training(family: str = "llama", way: Elastic = SETTINGS, **settings: Any) -> Any:
    model = tiny(family, **settings)
    torch.manual_seed(1)
    return elasticore.elasticize(model, way).train()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_router_learns_and_the_backbone_does_not(family: str) -> None:
    model = training(family)
    model(PROMPT, labels=PROMPT).loss.backward()
    for name, parameter in model.named_parameters():
        if "attention_router" in name:
            assert parameter.grad is not None and bool(parameter.grad.any()), name
        else:
            assert parameter.grad is None, name


def test_a_backbone_that_is_not_frozen_trains_along() -> None:
    model = training().requires_grad_(True)
    model(PROMPT, labels=PROMPT).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("mode", ["fa-ssa", "fa-xa", "xa-ssa"])
@pytest.mark.parametrize("sampler", ["gumbel-softmax", "gumbel-sigmoid"])
def test_every_mode_and_sampler_gives_gates_of_zero_and_one(mode: str, sampler: str) -> None:
    model = training(way=small(mode, policy=Router(sampler=sampler)))
    one = elasticore.Pass()
    model(PROMPT, labels=PROMPT, elastic=one).loss.backward()
    assert len(one.routings) == 3
    for routing in one.routings:
        assert routing.gate is not None and routing.gate.requires_grad
        assert torch.equal(routing.gate, routing.decisions.float())
    assert all(p.grad is not None for r in elasticore.routers(model) for p in r.parameters())


def test_a_gate_weighs_what_each_mode_would_have_cost() -> None:
    # Sparse attention adds nothing inside its window, so its gate has no gradient there.
    model = training()
    short = tokens(2, 48)
    model(short, labels=short).loss.backward()
    largest = max(p.grad.abs().max() for r in elasticore.routers(model) for p in r.parameters())
    assert largest < 1e-6
    model.zero_grad()
    model(PROMPT, labels=PROMPT).loss.backward()
    largest = max(p.grad.abs().max() for r in elasticore.routers(model) for p in r.parameters())
    assert largest > 1e-4


def test_decisions_are_sampled_in_training_only() -> None:
    model = training()
    with elasticore.record() as sampled, torch.no_grad():
        for _ in range(5):
            model(PROMPT)
    assert any(
        not torch.equal(one.decisions, sampled.decisions) for one in sampled.passes
    )  # five draws of twelve coins
    with elasticore.record() as settled:
        model.eval()(PROMPT)
        model(PROMPT)
    assert torch.equal(settled.passes[0].decisions, settled.passes[1].decisions)
    assert all(routing.gate is None for routing in routings(model, PROMPT))


@pytest.mark.parametrize("length", [40, 80])
def test_a_text_is_routed_in_training_as_in_inference(length: int) -> None:
    model, prompt = spread(training()), tokens(1, length)
    trained = routings(model, prompt)[0].logits
    settled = routings(model.eval(), prompt)[0].logits
    assert trained is not None and settled is not None
    assert torch.equal(trained, settled)  # later layers see what sampled modes have made of it


def test_dropout_in_training_is_refused() -> None:
    model = training(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout must be 0.*got 0.1"):
        model(PROMPT)
    assert bool(model.eval()(PROMPT).logits.isfinite().all())
