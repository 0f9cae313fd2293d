"""The model families that can be made elastic, and how each makes its keys before RoPE."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain

import torch
from torch import Tensor, nn

from elasticore.errors import UnsupportedModel

__all__ = ["FAMILIES", "Family", "attention_layers", "device_of", "family_of", "is_local"]


@dataclass(frozen=True)
class Family:
    """How the attention of a family turns hidden states into keys before rotary embedding.

    Attributes
    ----------
    modules
        The submodules of ``self_attn`` that do it. They are looked up in every pass, so that an
        adapter, a quantized layer or anything else put in their place is what runs.
    project
        ``(attention, hidden [B, T, hidden size]) -> keys [B, T, Hkv, D]``.
    """

    modules: tuple[str, ...]
    project: Callable[[nn.Module, Tensor], Tensor]


def _heads(attention: nn.Module, keys: Tensor) -> Tensor:
    return keys.unflatten(-1, (-1, attention.head_dim))


def _plain(attention: nn.Module, hidden: Tensor) -> Tensor:
    return _heads(attention, attention.k_proj(hidden))  # type: ignore[operator]


def _norm_of_heads(attention: nn.Module, hidden: Tensor) -> Tensor:
    return attention.k_norm(_plain(attention, hidden))  # type: ignore[operator]


def _norm_of_all(attention: nn.Module, hidden: Tensor) -> Tensor:
    return _heads(attention, attention.k_norm(attention.k_proj(hidden)))  # type: ignore[operator]


def _fused(attention: nn.Module, hidden: Tensor) -> Tensor:
    """Keys lie between the queries and the values of one projection."""
    everything = _heads(attention, attention.qkv_proj(hidden))  # type: ignore[operator]
    groups = int(attention.num_key_value_groups)  # type: ignore[arg-type]
    kv_heads = everything.shape[2] // (groups + 2)
    return everything[:, :, groups * kv_heads : (groups + 1) * kv_heads]


FAMILIES: dict[str, Family] = {
    "llama": Family(("k_proj",), _plain),
    "mistral": Family(("k_proj",), _plain),
    "qwen2": Family(("k_proj",), _plain),
    "qwen3": Family(("k_proj", "k_norm"), _norm_of_heads),
    "gemma3_text": Family(("k_proj", "k_norm"), _norm_of_heads),
    "olmo2": Family(("k_proj", "k_norm"), _norm_of_all),
    "phi3": Family(("qkv_proj",), _fused),
}
"""By ``config.model_type``."""


def family_of(model: nn.Module) -> Family:
    """The family of ``model``.

    Raises
    ------
    UnsupportedModel
        If it is not in :data:`FAMILIES`; the message names it.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model is of the family {family!r}, whose keys elasticore does not know; supported: "
            f"{', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[family]


def attention_layers(model: nn.Module) -> list[nn.Module]:
    """Every self-attention module, in layer order."""
    layers = [m for name, m in model.named_modules() if name.split(".")[-1] == "self_attn"]
    return sorted(layers, key=lambda m: int(m.layer_idx))


def is_local(attention: nn.Module) -> bool:
    """Whether the model itself keeps this layer inside a sliding window.

    Such a layer stays as it is. A window that no input can outgrow does not count.
    """
    config = attention.config
    # Families with mixed layers keep the window on the module, the others in the config.
    window = getattr(attention, "sliding_window", None)
    if not hasattr(attention, "sliding_window"):
        window = getattr(config, "sliding_window", None)
    return window is not None and window < config.max_position_embeddings  # type: ignore[union-attr]


def device_of(layer: nn.Module) -> torch.device:
    """Where a layer computes: where its weights lie, or where accelerate brings them."""
    for tensor in chain(layer.parameters(), layer.buffers()):
        if tensor.device.type != "meta":
            return tensor.device
    for module in layer.modules():  # weights on disk or in CPU memory, brought in for each call
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("meta")  # a model of shapes only
