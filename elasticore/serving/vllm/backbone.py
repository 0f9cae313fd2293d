"""What is known of a served model from its configuration: its layers, heads and rotations.

vLLM has classes of its own for a model; transformers' class for it, made without weights, says
which of its layers are elastic and how their keys were rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from elasticore.errors import UnsupportedModel
from elasticore.models.families import attention_layers, family_of, is_local
from elasticore.router.policies import LayerShape

__all__ = ["Backbone"]

ROTATIONS = ("default", "linear", "llama3", "yarn")
"""Rotary embeddings that depend on a token's position alone, and that both sides make alike."""


class Backbone:
    """The layers of a model, by its configuration.

    Parameters
    ----------
    config
        The model's configuration in transformers.

    Attributes
    ----------
    skeleton
        transformers' model, without weights.
    elastic
        The numbers of the layers that can be elastic.
    shapes
        What a policy is told of each of them.

    Raises
    ------
    UnsupportedModel
        If the family is none that is known, or every layer has a sliding window.
    ValueError
        If its keys cannot be rotated back.
    """

    def __init__(self, config: Any) -> None:
        with torch.device("meta"):
            self.skeleton = AutoModelForCausalLM.from_config(config)
        family_of(self.skeleton)
        self.config = config
        layers = {int(x.layer_idx): x for x in attention_layers(self.skeleton)}  # type: ignore[arg-type]
        self._layers = {i: layer for i, layer in layers.items() if not is_local(layer)}
        self.elastic = tuple(self._layers)
        if not self.elastic:
            raise UnsupportedModel(
                f"the model keeps all of its {len(layers)} layers inside a sliding window, so "
                "there is none to make elastic."
            )
        self.shapes = [
            LayerShape(config.num_key_value_heads, int(layer.head_dim), torch.device("cpu"))  # type: ignore[arg-type]
            for layer in self._layers.values()
        ]
        self._rotary: nn.Module = type(self.skeleton.base_model.rotary_emb)(config)
        parameters = config.rope_parameters
        kinds = [parameters] if "rope_type" in parameters else parameters.values()
        wrong = sorted({kind["rope_type"] for kind in kinds} - set(ROTATIONS))
        if wrong:
            raise ValueError(
                f"the model's rotary embedding is of the kind {', '.join(wrong)}, which depends on "
                f"more than positions; supported are {', '.join(ROTATIONS)}."
            )

    def before_rotation(self, layer: int, keys: Tensor, position: Tensor) -> Tensor:
        """Keys as they were before rotary embedding.

        Parameters
        ----------
        layer
            The layer's number.
        keys
            ``[n, Hkv, D]``, rotated.
        position
            int64 ``[n]``: where each token stands in its sequence.

        Notes
        -----
        The rotation by ``cos`` and ``sin``, which may carry a factor, is undone in float32:
        ``x = (y cos + rotated(y) sin) / (cos² + sin²)``.
        """
        kind = getattr(self._layers[layer], "layer_type", None)
        known = () if kind is None or "rope_type" in self.config.rope_parameters else (kind,)
        like = torch.empty(0, dtype=torch.float32)
        cos, sin = (x[0, :, None] for x in self._rotary(like, position[None], *known))
        width = cos.shape[-1] // 2
        cos, sin = cos[..., :width], sin[..., :width]
        norm = cos.square() + sin.square()
        cos, sin = cos / norm, sin / norm
        first, second, rest = keys.float().split((width, width, keys.shape[-1] - 2 * width), -1)
        back = (first * cos + second * sin, second * cos - first * sin, rest)
        return torch.cat(back, -1).to(keys.dtype)
