"""Make a Hugging Face model elastic, and undo it: hooks only."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from torch import nn

from elasticore.errors import UnsupportedModel
from elasticore.models import function
from elasticore.models.config import ElasticConfig
from elasticore.models.families import attention_layers, family_of, is_local
from elasticore.models.state import ROUTER, STATE, LayerState, ModelState
from elasticore.router import AttentionRouter, GumbelSigmoid, GumbelSoftmax, Routing, Sampler

__all__ = ["elasticize", "is_elastic", "restore", "routers", "routings"]

Model = TypeVar("Model", bound=nn.Module)
_SAMPLERS: dict[str, Callable[[], Sampler]] = {
    "gumbel-softmax": GumbelSoftmax,
    "gumbel-sigmoid": GumbelSigmoid,
}


def elasticize(
    model: Model,
    router: ElasticConfig | str | Path | None = None,
    *,
    policies: Iterable[nn.Module] | None = None,
) -> Model:
    """Let a router in every layer of ``model`` choose the mode of each KV head per input.

    Nothing in the model is copied or patched: each attention layer gets hooks that tap its keys
    before rotary embedding, a submodule ``attention_router``, and the attention implementation
    ``elasticore``. Layers that the model itself keeps inside a sliding window stay as they are.
    The model's parameters are not touched; freezing them is up to the trainer.

    Parameters
    ----------
    model
        A decoder of a supported family (``elasticore.FAMILIES``); changed in place.
    router
        What to route with: an :class:`ElasticConfig` for new, untrained routers (the default
        settings if None), or a directory or hub id of trained ones (:func:`load_router`).
    policies
        Instead of new routers: one module per elastic layer, called as ``policy(keys, segments)``
        and returning a ``Routing``, such as :class:`AllSparse` or those of
        :func:`fixed_policies`.

    Returns
    -------
    nn.Module
        ``model`` itself.

    Raises
    ------
    UnsupportedModel
        If the family, or a layer of it, cannot be made elastic. The model is as it was.
    TypeError, ValueError
        If an argument is wrong, or the model is elastic already.

    Examples
    --------
    >>> import elasticore, transformers
    >>> config = transformers.LlamaConfig(
    ...     hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
    ...     num_key_value_heads=2, vocab_size=100)
    >>> model = transformers.LlamaForCausalLM(config)
    >>> model = elasticore.elasticize(model, elasticore.ElasticConfig(mode="fa-ssa"))
    >>> model = elasticore.restore(model)
    """
    if isinstance(router, (str, Path)):
        from elasticore.models.files import load_router

        if policies is not None:
            raise ValueError("policies cannot be given together with the path of trained routers.")
        return load_router(model, router)
    _check_model(model)
    config = ElasticConfig() if router is None else router
    if not isinstance(config, ElasticConfig):
        raise TypeError(
            f"router must be an ElasticConfig, a path, a hub id or None, got {router!r}."
        )
    backbone: Any = model
    family = family_of(model)
    layers = attention_layers(model)
    elastic = [layer for layer in layers if not is_local(layer)]
    if not elastic:
        raise UnsupportedModel(
            f"model ({backbone.config.model_type}) keeps all of its {len(layers)} layers inside a "
            "sliding window, so there is none to make elastic."
        )
    for layer in elastic:
        if not (getattr(layer, "is_causal", True) and getattr(backbone.config, "is_causal", True)):
            raise UnsupportedModel(
                f"model ({backbone.config.model_type}) attends in both directions; elastic "
                "attention is causal."
            )
        if not isinstance(getattr(layer, family.module, None), nn.Module):
            raise UnsupportedModel(
                f"model ({backbone.config.model_type}) has no {family.module} in layer "
                f"{layer.layer_idx}, where its keys were expected."
            )
    modules = _routers(elastic, config) if policies is None else _policies(elastic, policies)

    state = ModelState(config, backbone.config, family, local_layers=len(layers) - len(elastic))
    try:
        _attach(model, state, elastic, modules)
    except BaseException:
        _detach(model, state)
        raise
    return model


def restore(model: Model) -> Model:
    """Undo :func:`elasticize`: config, state_dict and logits are what they were before.

    Raises
    ------
    ValueError
        If ``model`` is not elastic.
    """
    _detach(model, _state(model))
    return model


def is_elastic(model: nn.Module) -> bool:
    """Whether ``model`` has been through :func:`elasticize` and not through :func:`restore`."""
    return isinstance(getattr(model, STATE, None), ModelState)


def routers(model: nn.Module) -> list[nn.Module]:
    """The routers (or policies) of an elastic model, one per elastic layer."""
    return [layer.router for layer in _state(model).layers]


def routings(model: nn.Module) -> list[Routing]:
    """What each router decided in the latest pass that routed, with gradients in training.

    Raises
    ------
    ValueError
        If the model is not elastic, or its latest pass routed nothing.
    """
    state = _state(model)
    if len(state.routings) != len(state.layers):
        raise ValueError("model has no routing yet: its latest pass was not a prefill.")
    return [state.routings[layer.index] for layer in state.layers]


def _check_model(model: object) -> None:
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise TypeError(
            f"model must be a transformers.PreTrainedModel, got {type(model).__name__}."
        )
    if is_elastic(model):
        raise ValueError("model is elastic already; call elasticore.restore(model) first.")


def _state(model: nn.Module) -> ModelState:
    state = getattr(model, STATE, None)
    if not isinstance(state, ModelState):
        raise ValueError("model is not elastic; call elasticore.elasticize(model, ...) first.")
    return state


def _routers(layers: Sequence[nn.Module], config: ElasticConfig) -> list[nn.Module]:
    made: list[nn.Module] = []
    for layer in layers:
        router = AttentionRouter(
            int(layer.head_dim),  # type: ignore[arg-type]
            config.hidden_multiplier,
            config.boundary,
            _SAMPLERS[config.sampler](),
            device=next(layer.parameters()).device,
        )
        # Routers start in the model's mode; they stay in float32, whatever the backbone's dtype.
        made.append(router.train(layer.training))
    return made


def _policies(layers: Sequence[nn.Module], policies: Iterable[nn.Module]) -> list[nn.Module]:
    try:
        made = list(policies)
    except TypeError:
        raise TypeError(f"policies must be a sequence of modules, got {policies!r}.") from None
    if len(made) != len(layers):
        raise ValueError(
            f"policies must hold one module per elastic layer ({len(layers)}), got {len(made)}."
        )
    for layer, policy in zip(layers, made, strict=True):
        if not isinstance(policy, nn.Module):
            raise TypeError(f"policies must be nn.Modules, got {policy!r}.")
        policy.to(next(layer.parameters()).device)
    return made


def _attach(
    model: Any, state: ModelState, layers: Sequence[nn.Module], modules: Sequence[nn.Module]
) -> None:
    function.register()
    original = model.config
    # A config may be shared with another model: this one gets its own. Local layers keep the
    # original, and with it their own attention implementation.
    elastic_config = copy.deepcopy(original)
    setattr(elastic_config, function.ORIGINAL, original._attn_implementation)
    elastic_config._attn_implementation = function.IMPLEMENTATION
    local = {id(layer) for layer in attention_layers(model)} - {id(layer) for layer in layers}
    state.snapshot = elastic_config.to_dict()
    setattr(model, STATE, state)
    for module in model.modules():
        if getattr(module, "config", None) is original and id(module) not in local:
            state.reconfigured.append(module)
            module.config = elastic_config
    for index, (layer, router) in enumerate(zip(layers, modules, strict=True)):
        one = LayerState(index, layer, state)
        state.layers.append(one)
        setattr(layer, STATE, one)
        layer.add_module(ROUTER, router)
        tapped = layer.get_submodule(state.family.module)
        state.handles += [
            layer.register_forward_pre_hook(one.before, with_kwargs=True),
            tapped.register_forward_hook(one.tap),
        ]
    state.handles += [
        model.base_model.register_forward_pre_hook(state.begin, with_kwargs=True),
        model.base_model.register_forward_hook(state.end),
    ]


def _detach(model: nn.Module, state: ModelState) -> None:
    for handle in state.handles:
        handle.remove()
    config = state.original
    if state.reconfigured:
        own: Any = state.reconfigured[0].config
        if own.to_dict() != state.snapshot and own._attn_implementation == function.IMPLEMENTATION:
            # Changed while elastic, as by resize_token_embeddings: what changed must not be lost.
            config = own
            config._attn_implementation = state.original._attn_implementation
            delattr(config, function.ORIGINAL)
    for module in state.reconfigured:
        module.config = config
    for one in state.layers:
        one.attention._modules.pop(ROUTER, None)
        one.attention.__dict__.pop(STATE, None)
    model.__dict__.pop(STATE, None)
