"""What routers read in a server is what they read in transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import elasticore
from elasticore import Elastic, UnsupportedModel
from elasticore.assets import tiny as assets
from elasticore.models.families import attention_layers, is_local
from elasticore.models.fingerprint import fingerprint_of
from elasticore.router import Modules
from elasticore.serving.vllm.backbone import Backbone
from elasticore.serving.vllm.decisions import Decisions
from elasticore.serving.vllm.step import Step
from tests.models.tiny import FAMILIES, Listening, cache_of, elastic, small, spread, tiny, tokens

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}


def models() -> list[Any]:
    made: list[Any] = [pytest.param(family, {}, id=family) for family in FAMILIES]
    for rope in (YARN, LLAMA3, LINEAR):
        settings = {"rope_parameters": rope, "max_position_embeddings": 512}
        made.append(pytest.param("llama", settings, id=str(rope["rope_type"])))
    partial = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    made.append(pytest.param("phi3", {"rope_parameters": partial}, id="partial"))
    return made


@pytest.mark.parametrize(("family", "settings"), models())
def test_cached_keys_are_rotated_back(family: str, settings: dict[str, Any]) -> None:
    model = tiny(family, **settings)
    backbone = Backbone(model.config)
    layers = attention_layers(model)
    assert list(backbone.elastic) == [i for i, x in enumerate(layers) if not is_local(x)]
    elastic(model, Listening)
    cache = cache_of(model(tokens(1, 90)))
    for layer, policy in zip(backbone.elastic, elasticore.routers(model), strict=True):
        rotated = cache.layers[layer].keys[0].transpose(0, 1)
        back = backbone.before_rotation(layer, rotated, torch.arange(90))
        # One product, one sum and their inverse in float32, of keys below 16.
        torch.testing.assert_close(back, policy.seen[0, :90], rtol=0, atol=1e-5)


@pytest.mark.parametrize("boundary", [10, None])
def test_prompts_are_decided_together_as_each_is_alone(boundary: int | None) -> None:
    way = small(policy=elasticore.Router(boundary=boundary))
    model = spread(elasticore.elasticize(tiny(), way))
    way, backbone = elasticore.way_of(model), Backbone(model.config)
    lengths = (1, 15, 20, 21, 77)
    prompts = [tokens(1, length, length) for length in lengths]
    caches = [cache_of(model(prompt)) for prompt in prompts]
    expected = [elasticore.Pass() for _ in prompts]
    for prompt, one in zip(prompts, expected, strict=True):
        model(prompt, elastic=one)
    starts = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    table = torch.arange(40).view(5, 8)
    step = Step.of(starts, lengths, lengths, table, 16)
    decisions = Decisions(way, backbone, backbone.elastic)
    for number, layer in enumerate(backbone.elastic):

        def read(row: int, position: torch.Tensor, layer: int = layer) -> torch.Tensor:
            return caches[row].layers[layer].keys[0].transpose(0, 1)[position]

        decisions.decide(layer, step, read, 40)
        found = decisions.of(layer, step.page)
        alone = torch.cat([one.routings[number].decisions for one in expected])
        assert torch.equal(found, alone)
    shares = [torch.stack([r.decisions for r in one.routings]).float().mean() for one in expected]
    torch.testing.assert_close(decisions.share(step.page), torch.stack(shares))


def test_a_checkpoint_is_known_without_loading_it() -> None:
    folder = assets() / "backbone"
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    skeleton = Backbone(model.config).skeleton
    known, own = fingerprint_of(skeleton, folder), elasticore.fingerprint(model)
    assert {**known, "name": ""} == {**own, "name": ""} and own["weights"]
    assert fingerprint_of(skeleton, Path("nowhere"))["weights"] is None


def test_keys_that_cannot_be_rotated_back_are_refused() -> None:
    factors = [1.0] * 8
    rope = {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "short_factor": factors,
        "long_factor": factors,
        "original_max_position_embeddings": 64,
    }
    with pytest.raises(ValueError, match=r"of the kind longrope.*supported are default"):
        Backbone(tiny("phi3", rope_parameters=rope).config)


def test_families_that_are_not_known_are_refused() -> None:
    import transformers

    config = transformers.GPT2Config(n_layer=1, n_embd=16, n_head=2)
    with pytest.raises(UnsupportedModel, match="gpt2"):
        Backbone(config)


def test_models_inside_a_window_are_refused() -> None:
    with pytest.raises(UnsupportedModel, match="all of its 3 layers inside a sliding window"):
        Backbone(tiny("mistral", sliding_window=64).config)


def test_modules_of_ones_own_are_policies_too() -> None:
    backbone = Backbone(tiny().config)
    way = Elastic(Modules([Listening() for _ in backbone.elastic]))
    assert Decisions(way, backbone, backbone.elastic)
