"""Loading a backbone by name, with ours among the names; damaged files are named."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from elasticore.assets import backbone_path

__all__ = ["TINY", "load_backbone", "load_tokenizer"]

TINY = "tiny"
"""Name of the backbone that ships with the package."""


def load_backbone(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The model and the tokenizer at a directory or hub id, or called ``"tiny"`` or ``"smollm2"``.

    The model is on the GPU if there is one, in evaluation mode.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If the dtype is another, or a file is damaged or lacks weights, which would be random.
    """
    from transformers import AutoModelForCausalLM

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    path = backbone_path(name)
    with _named("model", name):
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=getattr(torch, dtype), output_loading_info=True
        )
    model, told = loaded
    if told["missing_keys"]:
        raise ValueError(
            f"model {name} is not whole: its files lack {len(told['missing_keys'])} weights, such "
            f"as {min(told['missing_keys'])}; copy or download it again."
        )
    tokenizer = load_tokenizer(name)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)
    return model.eval(), tokenizer


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model at a directory or hub id, or called ``"tiny"`` or ``"smollm2"``.

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If a file is damaged.
    """
    from transformers import AutoTokenizer

    path = backbone_path(name)
    with _named("tokenizer", name):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):  # made out of nothing
        raise FileNotFoundError(f"tokenizer {name} has no tokens: there is no tokenizer.json.")
    return tokenizer


@contextmanager
def _named(what: str, name: str) -> Iterator[None]:
    """Say of whose files an error is."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, OSError) or reason.startswith("Couldn't instantiate"):
            raise FileNotFoundError(
                f"{what} {name} is no directory with a {what}, and the hub did not give it: "
                f"{reason}"
            ) from error
        raise ValueError(
            f"{what} {name} cannot be read ({type(error).__name__}: {reason}); copy or download it "
            "again."
        ) from error
