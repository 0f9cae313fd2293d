"""Greedy decoding, whatever settings of generation come with a model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import GenerationConfig

__all__ = ["greedy"]


@contextmanager
def greedy(model: Any) -> Iterator[None]:
    """Let ``model.generate`` write the likeliest token each time, in the block.

    A model's ``generation_config.json`` may ask for sampling, beams, penalties or lengths, and
    transformers takes from there whatever a call does not say. Here it gives the ids of special
    tokens alone: at which ones an answer ends, and what fills rows.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id,
        pad_token_id=own.pad_token_id,
        do_sample=False,
    )
    try:
        yield
    finally:
        model.generation_config = own
