"""The model families that can be made elastic, and where each keeps its keys before RoPE."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from elasticore.errors import UnsupportedModel

__all__ = ["FAMILIES", "KeyTap", "attention_layers", "family_of", "is_local"]


@dataclass(frozen=True)
class KeyTap:
    """Where a family's attention module shows its keys before rotary embedding.

    Attributes
    ----------
    module
        The submodule of ``self_attn`` whose output holds the keys: ``k_norm`` where the family has
        one, else the projection.
    layout
        Shape of that output: ``"flat"`` ``[B, T, Hkv*D]``, ``"heads"`` ``[B, T, Hkv, D]``,
        ``"heads_first"`` ``[B, Hkv, T, D]``, or ``"qkv"``: keys are a slice of ``[B, T, ...]``
        between the queries and the values.
    """

    module: str
    layout: Literal["flat", "heads", "heads_first", "qkv"]

    def keys(self, output: Tensor, query_heads: int, kv_heads: int, head_dim: int) -> Tensor:
        """The keys ``[B, T, Hkv, D]``, a view of the tapped output."""
        if self.layout == "heads":
            return output
        if self.layout == "heads_first":
            return output.transpose(1, 2)
        if self.layout == "qkv":
            start = query_heads * head_dim
            output = output[..., start : start + kv_heads * head_dim]
        return output.unflatten(-1, (kv_heads, head_dim))


FAMILIES: dict[str, KeyTap] = {
    "llama": KeyTap("k_proj", "flat"),
    "mistral": KeyTap("k_proj", "flat"),
    "qwen2": KeyTap("k_proj", "flat"),
    "qwen3": KeyTap("k_norm", "heads"),
    "gemma3_text": KeyTap("k_norm", "heads_first"),
    "olmo2": KeyTap("k_norm", "flat"),
    "phi3": KeyTap("qkv_proj", "qkv"),
}
"""By ``config.model_type``."""


def family_of(model: nn.Module) -> KeyTap:
    """The key tap of ``model``'s family.

    Raises
    ------
    UnsupportedModel
        If the family is not in :data:`FAMILIES`; the message names it.
    """
    family = getattr(getattr(model, "config", None), "model_type", None)
    if family not in FAMILIES:
        raise UnsupportedModel(
            f"model is of the family {family!r}, which has no key tap; supported: "
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
