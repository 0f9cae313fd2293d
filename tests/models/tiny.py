"""Tiny random models of every supported family, and policies that make their routing visible."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import elasticore
from elasticore import (
    BlockSelector,
    Elastic,
    Full,
    Policy,
    Routing,
    Segments,
    Streaming,
    XAttention,
    pool_boundary,
)
from elasticore.models.families import attention_layers, is_local
from elasticore.models.versions import CACHE
from elasticore.router import FixedPolicy, Modules

SETTINGS = Elastic(sparse=Streaming(sink=16, local=32))
"""Small enough that a streaming head misses keys from the 49th token on."""

HALF = XAttention(threshold=0.5)
"""Drops blocks of random texts as short as these, where the default of 0.9 would keep all."""

CLOSE = {"rtol": 0.0, "atol": 5e-5}
"""The same computation in another order. Rounding moved these models' logits, which are below 8, by
up to 1.5e-5; a wrong mode, or a key that leaked in, moves them by more than 1e-3."""

SIZES: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "sdpa",
}
HEAD_DIM = {"head_dim": 16}
MIXED = ["full_attention", "sliding_attention", "full_attention"]
MODELS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "llama": (transformers.LlamaForCausalLM, transformers.LlamaConfig, HEAD_DIM),
    "qwen2": (transformers.Qwen2ForCausalLM, transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3ForCausalLM, transformers.Qwen3Config, HEAD_DIM),
    "mistral": (
        transformers.MistralForCausalLM,
        transformers.MistralConfig,
        {"sliding_window": None, **HEAD_DIM},
    ),
    "gemma3_text": (
        transformers.Gemma3ForCausalLM,
        transformers.Gemma3TextConfig,
        {"sliding_window": 16, "layer_types": MIXED, "query_pre_attn_scalar": 16, **HEAD_DIM},
    ),
    "olmo2": (transformers.Olmo2ForCausalLM, transformers.Olmo2Config, {}),
    "phi3": (transformers.Phi3ForCausalLM, transformers.Phi3Config, {}),
}
FAMILIES = tuple(MODELS)


def tiny(family: str = "llama", *, seed: int = 0, **settings: Any) -> Any:
    """A random model in evaluation mode, float32, on SDPA. Norm weights are random as well."""
    model_class, config_class, own = MODELS[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**{**SIZES, **own, **settings}))
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.normal_(parameter, 1.0, 0.2)
        elif parameter.ndim == 2:
            nn.init.normal_(parameter, 0.0, 0.1)  # the default 0.02 attends almost evenly
    return model.eval().requires_grad_(False)


def tokens(batch: int, length: int, seed: int = 0) -> Tensor:
    """Random token ids ``[batch, length]``, without special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, SIZES["vocab_size"], (batch, length), generator=generator)


def small(mode: str = "fa-ssa", selector: BlockSelector | None = None, **settings: Any) -> Elastic:
    """A way of the paper's, with blocks of 16 tokens."""
    patterns = {"fa": Full(), "ssa": Streaming(16, 32), "xa": selector or XAttention()}
    retrieval, sparse = mode.split("-")
    return Elastic(
        retrieval=patterns[retrieval], sparse=patterns[sparse], block_size=16, **settings
    )


def elastic(
    model: Any,
    policy: Policy | Callable[[], Any] | None = None,
    way: Elastic = SETTINGS,
) -> Any:
    """``model`` made elastic: by a policy, or by one ``policy()`` per elastic layer (ByContent)."""
    if isinstance(policy, type) and issubclass(policy, Policy):
        policy = policy()
    if not isinstance(policy, Policy):
        layers = [layer for layer in attention_layers(model) if not is_local(layer)]
        policy = Modules([(policy or ByContent)() for _ in layers])
    return elasticore.elasticize(model, dataclasses.replace(way, policy=policy))


def routings(model: Any, *args: Any, **kwargs: Any) -> list[Routing]:
    """What every layer decided in ``model(*args, **kwargs)``."""
    one = elasticore.Pass()
    model(*args, **kwargs, elastic=one)
    return one.routings


class ByContent(nn.Module):
    """Sparse where the pooled keys sum up to more than zero: varies by sequence, layer and head."""

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide."""
        return Routing((pool_boundary(keys, segments, 8).sum(-1) > 0).to(torch.int8))


class Listening(nn.Module):
    """Retrieval everywhere; keeps the keys that it was shown."""

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide."""
        self.seen = keys.clone()
        return Routing(torch.zeros(segments.row.numel(), keys.shape[2], dtype=torch.int8))


def first_head_sparse() -> nn.Module:
    """A policy that sends KV head 0 to sparse and head 1 to retrieval, whatever the input."""
    return FixedPolicy([1, 0])


def spread(model: Any, seed: int = 0) -> Any:
    """Random router weights, large enough for decisions to vary and logits not to be close."""
    generator = torch.Generator().manual_seed(seed)
    for router in elasticore.routers(model):
        for parameter in router.parameters():
            parameter.data.normal_(0.0, 0.6, generator=generator)
    return model


def cached(cache: Any) -> dict[str, Any]:
    """The argument that gives a model its cache, under the name of this transformers."""
    return {CACHE: cache}


def cache_of(output: Any) -> Any:
    """The cache in a model's output."""
    return getattr(output, CACHE)
