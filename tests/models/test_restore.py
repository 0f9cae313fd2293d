"""elasticize() and restore(): nothing is left behind, also after a failure, also by copies."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import elasticore
from elasticore import AllRetrieval, AllSparse, Elastic, ElasticoreError, Streaming
from elasticore.models.families import attention_layers

from .tiny import FAMILIES, SETTINGS, elastic, first_head_sparse, routings, spread, tiny, tokens

PROMPT = tokens(2, 80)


def anatomy(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Every attribute of every module; dictionaries (hooks, parameters, submodules) by entry."""
    return {
        name: {
            key: list(value.items()) if isinstance(value, dict) else value
            for key, value in vars(module).items()
        }
        for name, module in model.named_modules()
    }


def same(first: Any, second: Any) -> bool:
    """The same objects in the same order."""
    if isinstance(first, dict):
        return list(first) == list(second) and all(same(first[k], second[k]) for k in first)
    if isinstance(first, (list, tuple)) and isinstance(second, (list, tuple)):
        return len(first) == len(second) and all(map(same, first, second))
    return first is second or (isinstance(first, (str, int)) and first == second)


class Untouched:
    """Asserts at the end of a ``with`` block that a model is what it was at its start."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def look(self) -> tuple[Any, ...]:
        state = {name: value.clone() for name, value in self.model.state_dict().items()}
        return anatomy(self.model), self.model.config.to_dict(), state, self.model(PROMPT).logits

    def __enter__(self) -> None:
        self.before, self.config = self.look(), self.model.config

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        if error is not None:
            return
        anatomy_before, config, state, logits = self.before
        anatomy_now, config_now, state_now, logits_now = self.look()
        assert same(anatomy_now, anatomy_before)
        assert self.model.config is self.config
        assert config_now == config
        assert list(state_now) == list(state)
        assert all(torch.equal(state_now[name], state[name]) for name in state)
        assert torch.equal(logits_now, logits)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_leaves_nothing_behind(family: str) -> None:
    model = tiny(family)
    with Untouched(model):
        elastic(model, AllSparse)
        assert elasticore.is_elastic(model)
        model.generate(PROMPT, max_new_tokens=3, pad_token_id=0)
        assert elasticore.restore(model) is model
        assert not elasticore.is_elastic(model)


def test_hooks_and_attributes_of_others_survive() -> None:
    model, calls = tiny(), []
    attention = attention_layers(model)[0]
    attention.note = "mine"
    attention.k_proj.register_forward_hook(lambda *_: calls.append(1))
    with Untouched(model):
        elastic(model)
        elasticore.restore(model)
    assert attention.note == "mine" and len(calls) == 2


def test_models_can_be_made_elastic_again_and_again() -> None:
    model = tiny()
    with Untouched(model):
        seen = []
        for _ in range(3):
            elastic(model, first_head_sparse)
            seen.append(model(PROMPT).logits)
            elasticore.restore(model)
        assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2])


def test_elastic_models_refuse_what_only_others_can_do() -> None:
    model = tiny()
    with pytest.raises(ValueError, match="not elastic"):
        elasticore.restore(model)
    with pytest.raises(ValueError, match="not elastic"):
        elasticore.routers(model)
    elastic(model)
    with pytest.raises(ValueError, match=r"elastic already.*restore"):
        elasticore.elasticize(model)


def test_models_of_one_config_do_not_affect_each_other() -> None:
    plain = tiny()
    first, second = copy.deepcopy(plain), copy.deepcopy(plain)
    for module in (*first.modules(), *second.modules()):
        if hasattr(module, "config"):
            module.config = plain.config  # one object, as models built from one config have
    dense = plain(PROMPT).logits
    elastic(first, first_head_sparse)
    with elasticore.record() as trace:
        mixed = first(PROMPT).logits
    assert torch.equal(plain(PROMPT).logits, dense)
    # A wider window: all 80 tokens are in reach, so this one is the dense model again.
    elastic(second, first_head_sparse, Elastic(sparse=Streaming(16, 64)))
    assert torch.equal(first(PROMPT).logits, mixed)
    torch.testing.assert_close(second(PROMPT).logits, dense)
    elasticore.restore(first)
    assert torch.equal(first(PROMPT).logits, dense)
    torch.testing.assert_close(second(PROMPT).logits, dense)
    assert trace.msr.tolist() == [0.5, 0.5]


# A failure leaves the model as it was.


class Sparse(nn.Module):
    def forward(self, keys: Tensor, segments: elasticore.Segments) -> elasticore.Routing:
        return elasticore.Routing(torch.ones(segments.row.numel(), keys.shape[2]).to(torch.int8))


class Unmovable(Sparse):
    def to(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory")


FAILURES: dict[str, tuple[Callable[[Any], Any], type[Exception], str]] = {
    "no settings": (lambda m: elasticore.elasticize(m, 3), TypeError, "way must be"),
    "no hub id": (
        lambda m: elasticore.elasticize(m, "a/b/c"),
        FileNotFoundError,
        "neither a directory nor a hub id",
    ),
    "too few policies": (
        lambda m: elasticore.elasticize(m, Elastic([Sparse()] * 2)),
        ValueError,
        r"one module per elastic layer \(3\), got 2",
    ),
    "a policy that is no module": (
        lambda m: elasticore.elasticize(m, Elastic([Sparse(), Sparse(), "all"])),
        TypeError,
        "policy must be a Policy .* got 'all'",
    ),
    "a policy that fails to move": (
        lambda m: elasticore.elasticize(m, Elastic([Sparse(), Sparse(), Unmovable()])),
        RuntimeError,
        "out of memory",
    ),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failure_leaves_the_model_as_it_was(failure: str) -> None:
    model = tiny()
    call, error, message = FAILURES[failure]
    with Untouched(model):
        with pytest.raises(error, match=message):
            call(model)
        assert not elasticore.is_elastic(model)


def test_a_failure_in_the_last_layer_undoes_the_others() -> None:
    model = tiny()
    attention_layers(model)[2].attention_router = "taken"  # so that no submodule can go there
    with Untouched(model), pytest.raises(KeyError, match="already exists"):
        elastic(model)


def test_a_pass_that_fails_leaves_the_next_one_alone() -> None:
    model = elastic(tiny(), first_head_sparse)
    expected = model(PROMPT).logits
    broken = attention_layers(model)[1].o_proj.register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        model(tokens(3, 33))
    broken.remove()
    assert torch.equal(model(PROMPT).logits, expected)


# Copies, dtypes and files of an elastic model.


def deep_copied(model: Any) -> Any:
    return copy.deepcopy(model)


def pickled(model: Any) -> Any:
    return pickle.loads(pickle.dumps(model))


def saved(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [deep_copied, pickled, saved])
def test_a_copy_is_elastic_on_its_own(copied: Callable[[Any], Any]) -> None:
    model = tiny()
    dense = model(PROMPT).logits
    elastic(model, first_head_sparse)
    mixed = model(PROMPT).logits
    twin = copied(model)
    assert torch.equal(twin(PROMPT).logits, mixed)
    elasticore.restore(model)
    assert torch.equal(twin(PROMPT).logits, mixed)
    assert torch.equal(elasticore.restore(twin)(PROMPT).logits, dense)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_an_elastic_model_can_change_its_dtype(dtype: torch.dtype) -> None:
    model = tiny()
    names = list(model.state_dict())
    elastic(model, AllRetrieval).to(dtype)
    logits = model(PROMPT).logits
    assert logits.dtype == dtype
    assert torch.equal(elasticore.restore(model)(PROMPT).logits, logits)
    assert list(model.state_dict()) == names


def test_routers_that_were_cast_with_the_model_still_route() -> None:
    model = elasticore.elasticize(tiny(), SETTINGS).half()
    for routing in routings(model, PROMPT):
        assert routing.logits is not None and bool(routing.logits.isfinite().all())


def test_a_state_dict_carries_the_routers() -> None:
    def logits_of(model: Any) -> list[Tensor | None]:
        return [routing.logits for routing in routings(model, PROMPT)]

    model = spread(elasticore.elasticize(tiny(), SETTINGS))
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    other = elasticore.elasticize(tiny(seed=1), SETTINGS)
    other.load_state_dict(torch.load(file))
    for one, two in zip(logits_of(model), logits_of(other), strict=True):
        assert one is not None and two is not None and torch.equal(one, two)


def test_saving_while_elastic_still_loads_as_the_model_itself(tmp_path: Any) -> None:
    model = tiny()
    dense = model(PROMPT).logits
    elastic(model, AllSparse).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert loaded.config._attn_implementation == "sdpa"
    assert torch.equal(loaded(PROMPT).logits, dense)


def test_another_attention_implementation_is_refused_until_restored() -> None:
    model = tiny()
    with Untouched(model):
        elastic(model, AllSparse)
        model.set_attn_implementation("eager")
        with pytest.raises(ElasticoreError, match=r"'eager' on an elastic model.*restore"):
            model(PROMPT)
        elasticore.restore(model)


def test_what_was_changed_while_elastic_is_not_lost() -> None:
    model = tiny()
    original = model.config
    elastic(model)
    model.resize_token_embeddings(140, mean_resizing=False)
    elasticore.restore(model)
    assert model.config.vocab_size == 140 == model.get_input_embeddings().weight.shape[0]
    assert model.config._attn_implementation == original._attn_implementation == "sdpa"
    assert original.vocab_size == 128, "another model may share it"
    assert not any("elasticore" in key for key in model.config.to_dict())
    model(tokens(1, 20))


def test_a_policy_that_returns_no_routing_is_named() -> None:
    model = tiny()
    elastic(model, Shrug)
    with pytest.raises(TypeError, match="policies must return a Routing, got NoneType from Shrug"):
        model(tokens(1, 20))


class Shrug(nn.Module):
    """Decides nothing."""

    def forward(self, keys: Tensor, segments: elasticore.Segments) -> None:
        return None
