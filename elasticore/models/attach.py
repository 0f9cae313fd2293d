"""Attach the hooks of an elastic model, and take them off again."""

from __future__ import annotations

import copy
import hashlib
import inspect
import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import transformers
from torch import nn
from transformers import PreTrainedModel

from elasticore.errors import UnsupportedModel
from elasticore.models import function
from elasticore.models.families import (
    Family,
    attention_layers,
    device_of,
    family_of,
    is_local,
)
from elasticore.models.fingerprint import fingerprint
from elasticore.models.hooks import begin_base, begin_pass, end_pass, route
from elasticore.models.state import (
    IMPLEMENTATION,
    PARALLEL,
    ROUTER,
    STATE,
    LayerState,
    ModelState,
)
from elasticore.models.versions import CACHE
from elasticore.router.policies import LayerShape

if TYPE_CHECKING:
    from elasticore.models.elastic import Elastic

__all__ = ["attach", "backbone_of", "detach", "state_of"]


def backbone_of(model: object) -> Any:
    """The model of transformers inside an adapter, a compiled module or a parallel wrapper.

    Raises
    ------
    TypeError
        If there is none.
    """
    inner: Any = model
    while not isinstance(inner, PreTrainedModel):
        if callable(getattr(inner, "get_base_model", None)):  # PEFT
            inner = inner.get_base_model()
        elif isinstance(getattr(inner, "_orig_mod", None), nn.Module):  # torch.compile
            inner = inner._orig_mod
        elif isinstance(inner, nn.Module) and isinstance(getattr(inner, "module", None), nn.Module):
            inner = inner.module  # DistributedDataParallel
        else:
            raise TypeError(
                f"model must be a transformers.PreTrainedModel, got {type(model).__name__}."
            )
    return inner


def state_of(model: object) -> ModelState:
    """The state of an elastic model; raises ``ValueError`` if it is not elastic."""
    state = getattr(backbone_of(model), STATE, None)
    if not isinstance(state, ModelState):
        raise ValueError("model is not elastic; call elasticore.elasticize(model, ...) first.")
    return state


def attach(model: Any, way: Elastic) -> None:
    """Make ``model`` attend in a way; as it was before if that fails.

    Raises
    ------
    UnsupportedModel
        If the family, a layer, or the version of transformers is none that is known.
    TypeError, ValueError
        If the way does not fit, or something in the model is elastic already.
    """
    if isinstance(getattr(model, STATE, None), ModelState):
        raise ValueError("model is elastic already; call elasticore.restore(model) first.")
    if any(STATE in vars(module) for module in model.modules()):
        raise ValueError(
            "model is elastic in a part of it, or is a part of a model that is; call "
            "elasticore.restore on the one that was made elastic, and make the outer one elastic."
        )
    family = family_of(model)
    every = attention_layers(model)
    layers = [layer for layer in every if not is_local(layer)]
    _check_layers(model, family, every, layers)
    shapes = [
        LayerShape(
            int(model.config.num_key_value_heads),
            int(layer.head_dim),  # type: ignore[arg-type]
            device_of(layer),
        )
        for layer in layers
    ]
    modules = way.policy.modules(shapes)
    owner = _digest(model, way)
    state = ModelState(way, model.config, local_layers=len(every) - len(layers))
    try:
        _configure(model, state, set(map(id, every)) - set(map(id, layers)))
        for index, (layer, module) in enumerate(zip(layers, modules, strict=True)):
            setattr(layer, STATE, LayerState(index, state.local_layers, way, family, owner))
            state.layers.append(layer)
            layer.add_module(ROUTER, module.train(layer.training))
            state.handles.append(layer.register_forward_pre_hook(route, with_kwargs=True))
        base = model.base_model
        if base is not model and _takes_anything(model):
            state.handles.append(model.register_forward_pre_hook(begin_pass, with_kwargs=True))
        state.handles += [
            base.register_forward_pre_hook(begin_base, with_kwargs=True),
            base.register_forward_hook(end_pass, with_kwargs=True),
        ]
    except BaseException:
        detach(model, state)
        raise


def detach(model: Any, state: ModelState) -> None:
    """Undo :func:`attach`: config, state_dict and logits are what they were before."""
    for handle in state.handles:
        handle.remove()
    config = state.original
    if state.reconfigured:
        own: Any = state.reconfigured[0].config
        if own.to_dict() != state.snapshot and own._attn_implementation == IMPLEMENTATION:
            # Changed while elastic, as by resize_token_embeddings: what changed must not be lost.
            config = own
            config._attn_implementation = state.original._attn_implementation
            delattr(config, function.ORIGINAL)
    for module in state.reconfigured:
        module.config = config
    for layer in state.layers:
        layer._modules.pop(ROUTER, None)
        layer.__dict__.pop(STATE, None)
    model.__dict__.pop(STATE, None)
    model.base_model.__dict__.pop(PARALLEL, None)


def _configure(model: Any, state: ModelState, local: set[int]) -> None:
    """Name our attention implementation in a config of the model's own.

    A config may be shared with another model. Local layers keep the original, and with it their own
    attention implementation.
    """
    function.register()
    original = model.config
    config = copy.deepcopy(original)
    setattr(config, function.ORIGINAL, original._attn_implementation)
    config._attn_implementation = IMPLEMENTATION
    state.snapshot = config.to_dict()
    setattr(model, STATE, state)
    for module in model.modules():
        if getattr(module, "config", None) is original and id(module) not in local:
            state.reconfigured.append(module)
            module.config = config


def _check_layers(
    model: Any, family: Family, every: Sequence[nn.Module], layers: Sequence[nn.Module]
) -> None:
    name = model.config.model_type
    if not layers:
        raise UnsupportedModel(
            f"model ({name}) keeps all of its {len(every)} layers inside a sliding window, so "
            "there is none to make elastic."
        )
    for layer in layers:
        if not (getattr(layer, "is_causal", True) and getattr(model.config, "is_causal", True)):
            raise UnsupportedModel(
                f"model ({name}) attends in both directions; elastic attention is causal."
            )
        for part in family.modules:
            if not isinstance(getattr(layer, part, None), nn.Module):
                raise UnsupportedModel(
                    f"model ({name}) has no {part} in layer {layer.layer_idx}, where its keys "
                    "were expected."
                )
    for module, needed in (
        (layers[0], ("hidden_states", "attention_mask", CACHE)),
        (model.base_model, ("attention_mask", "position_ids", CACHE)),
    ):
        known = inspect.signature(type(module).forward).parameters
        missing = [argument for argument in needed if argument not in known]
        if missing or not _takes_anything(module):
            raise UnsupportedModel(
                f"transformers {transformers.__version__}: {type(module).__name__}.forward takes "
                f"{', '.join(known)}, but not {', '.join(missing) or 'further arguments'}, which "
                "elasticore reads; install a transformers that elasticore's documentation names."
            )


def _takes_anything(module: nn.Module) -> bool:
    """Whether a module's forward takes keyword arguments that it does not name."""
    kinds = (p.kind for p in inspect.signature(type(module).forward).parameters.values())
    return inspect.Parameter.VAR_KEYWORD in kinds


def _digest(model: Any, way: Elastic) -> str:
    """Who reads a cache: one backbone, one policy and one pair of patterns."""
    said = (
        fingerprint(model),
        type(way.policy).__name__,
        way.policy.settings(),
        repr(way.retrieval),
        repr(way.sparse),
        way.block_size,
    )
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=repr).encode()).hexdigest()
