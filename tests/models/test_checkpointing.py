"""Gradient checkpointing changes memory, and nothing else: gradients, routings, records."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore
from elasticore.backends.serial import SerialAttention

from .tiny import FAMILIES, SETTINGS, tiny, tokens

PROMPT = tokens(2, 80)


NON_REENTRANT = {"use_reentrant": False}


def training(family: str = "llama") -> Any:
    """A frozen backbone with new routers, in training mode; the same ones at every call."""
    model = tiny(family)
    torch.manual_seed(1)
    return elasticore.elasticize(model, SETTINGS).train()


def checkpointed(model: Any, arguments: dict[str, Any] | None = NON_REENTRANT) -> Any:
    # The new name of transformers 5.2x, or the old one.
    new = getattr(model, "activation_checkpointing_enable", None)
    (new or model.gradient_checkpointing_enable)(arguments)
    return model


def loss_of(model: Any, prompt: Tensor = PROMPT, one: elasticore.Pass | None = None) -> Tensor:
    """A loss of the text and of the routing, as a trainer's."""
    torch.manual_seed(2)  # the noise of the sampled decisions
    one = one or elasticore.Pass()
    text = model(prompt, labels=prompt, elastic=one).loss
    gates = [routing.gate for routing in one.routings]
    return text + torch.cat(gates, 1).mean()


def gradients(model: Any) -> list[Tensor]:
    found = [p.grad for router in elasticore.routers(model) for p in router.parameters()]
    assert all(gradient is not None and bool(gradient.any()) for gradient in found)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_the_same_bit_for_bit(family: str) -> None:
    plain = training(family)
    loss = loss_of(plain)
    loss.backward()
    model = checkpointed(training(family))
    again = loss_of(model)
    assert torch.equal(again, loss)
    again.backward()
    assert all(map(torch.equal, gradients(model), gradients(plain)))


def test_the_default_of_transformers_works() -> None:
    plain, model = training(), checkpointed(training(), None)
    loss_of(plain).backward()
    loss_of(model).backward()
    assert all(map(torch.equal, gradients(model), gradients(plain)))


def test_reentrant_checkpointing_is_refused_with_advice() -> None:
    model = checkpointed(training(), {"use_reentrant": True})
    with pytest.raises(ValueError, match=r'Enable checkpointing with {"use_reentrant": False}'):
        model(PROMPT)
    loss_of(checkpointed(model)).backward()


def test_reentrant_checkpointing_does_no_harm_in_evaluation() -> None:
    model = checkpointed(training(), {"use_reentrant": True}).eval()
    with torch.no_grad():
        assert bool(model(PROMPT).logits.isfinite().all())


def test_the_recompute_leaves_routings_alone() -> None:
    model = checkpointed(training())
    early, late = elasticore.Pass(), elasticore.Pass()
    first = loss_of(model, one=early)
    before = early.routings
    loss_of(model, tokens(3, 40), late)  # another forward before the backward of the earlier one
    first.backward()
    assert len(before) == 3
    assert all(one is two for one, two in zip(early.routings, before, strict=True))
    assert [routing.decisions.shape[0] for routing in late.routings] == [3, 3, 3]


def test_the_recompute_is_no_pass_of_a_record(monkeypatch: pytest.MonkeyPatch) -> None:
    model = checkpointed(training())
    with elasticore.record() as trace:
        loss = loss_of(model)
        with monkeypatch.context() as patch:
            patch.delattr(elasticore.HeadPlan, "esr")  # nothing is counted again
            loss.backward()
        with torch.no_grad():
            model.eval()(tokens(1, 30))
    assert [one.keys.tolist() for one in trace.passes] == [[80, 80], [30]]
    assert trace.decisions.shape == (3, 1, 2)


class Counting(SerialAttention):
    name = "counting"
    calls = 0

    def attend(self, *args: Any, **kwargs: Any) -> Tensor:
        Counting.calls += 1
        return super().attend(*args, **kwargs)


@pytest.mark.usefixtures("clean_registry")
@pytest.mark.parametrize("thread", [False, True])
def test_the_recompute_runs_on_the_backend_of_the_forward(thread: bool) -> None:
    elasticore.register_backend("counting", Counting)
    Counting.calls = 0
    model = checkpointed(training())
    with elasticore.use_backend("counting"):
        loss = loss_of(model)
    assert Counting.calls == 3
    if thread:  # as the backward pass of a GPU does: in a context of its own
        backward = threading.Thread(target=loss.backward)
        backward.start()
        backward.join()
    else:
        loss.backward()
    gradients(model)
    assert Counting.calls == 6
