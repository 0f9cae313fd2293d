"""The attention and mask functions that transformers calls under the name ``elasticore``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from elasticore.errors import ElasticoreError
from elasticore.models.attend import attend
from elasticore.models.passes import PASS
from elasticore.models.state import IMPLEMENTATION, STATE, LayerState
from elasticore.models.step import Step, attend_step

__all__ = ["ORIGINAL", "register"]

ORIGINAL = "_elasticore_original_implementation"
"""Attribute of an elastic model's config: the implementation that its local layers keep."""


def attention_function(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """One attention call for all heads of an elastic layer, in transformers' own signature."""
    one = kwargs.get(PASS)
    if isinstance(one, Step):
        out = attend_step(module, query, key, value, attention_mask, scaling, one)
        return out.transpose(1, 2).contiguous(), None
    return _attention(module, query, key, value, scaling, dropout, kwargs)


# One opaque call per layer: it reads context variables, and some backends read the host.
@torch.compiler.disable
def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float | None,
    dropout: float,
    kwargs: dict[str, Any],
) -> tuple[Tensor, None]:
    if not isinstance(getattr(module, STATE, None), LayerState) or PASS not in kwargs:
        raise ElasticoreError(
            f"attn_implementation={IMPLEMENTATION!r} is set by elasticore.elasticize(model), which "
            "this model has not been through; load it with another implementation first."
        )
    if dropout:
        raise ValueError(
            f"attention_dropout must be 0 in an elastic model, got {dropout}; set "
            "model.config.attention_dropout = 0.0 before elasticize (the backbone is frozen)."
        )
    if kwargs.get("is_causal") is False:
        raise ValueError("is_causal must not be False: elastic attention is causal.")
    if torch.is_autocast_enabled(query.device.type):
        # Rotary embedding and norms leave autocast's dtype; SDPA would go back to it as well.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    out = attend(module, query, key, value, scaling, kwargs[PASS])
    out = out.transpose(1, 2).contiguous()
    if out.shape[0] == 1:  # it may keep any stride there, for which torch.compile compiles again
        out = out[0][None]
    return out, None


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    config: Any = None,
    **kwargs: Any,
) -> Any:
    """The mask of an elastic model: the padding mask ``[B, positions]`` from the first key on.

    Nothing of size T×T is made, and nothing is read on the host. Layers that the model keeps inside
    a window get the mask that their own implementation makes.
    """
    window = kwargs.get("local_size")
    if window is not None and window < config.max_position_embeddings:
        original = ALL_MASK_ATTENTION_FUNCTIONS[getattr(config, ORIGINAL)]
        return original(
            batch_size=batch_size,
            q_length=q_length,
            kv_length=kv_length,
            q_offset=q_offset,
            kv_offset=kv_offset,
            attention_mask=attention_mask,
            config=config,
            **kwargs,
        )
    if kwargs.get("use_vmap"):
        raise ValueError(
            "attention_mask: this model adds a mask of its own (or_mask_function or "
            "and_mask_function); elastic attention is causal, with padding and packing only."
        )
    if attention_mask is None:
        return None
    mask = attention_mask[:, kv_offset:]
    short = kv_length - mask.shape[1]
    # Of one length in front of a cache with room for more, so that its decoding is compiled once.
    room = isinstance(q_offset, Tensor) or mask.shape[1] >= q_offset + q_length - kv_offset
    return pad(mask, (0, short)) if room and short > 0 else mask


def register() -> None:
    """Make both functions known to transformers; harmless when called again."""
    AttentionInterface.register(IMPLEMENTATION, attention_function)
    AttentionMaskInterface.register(IMPLEMENTATION, mask_function)
