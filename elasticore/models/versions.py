"""What transformers calls the things that are read from it, in the version that is installed."""

from __future__ import annotations

import inspect

from transformers.models.llama.modeling_llama import LlamaModel

__all__ = ["CACHE"]

_NAMES = ("cache", "past_key_values")

CACHE: str = next(
    name for name in _NAMES if name in inspect.signature(LlamaModel.forward).parameters
)
"""The argument of a model, and the field of its output, that holds the cache."""
