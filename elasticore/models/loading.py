"""Loading a backbone by name, with ours among the names."""

from __future__ import annotations

from typing import Any

import torch

from elasticore.assets import backbone_path

__all__ = ["TINY", "load_backbone"]

TINY = "tiny"
"""Name of the backbone that ships with the package."""


def load_backbone(name: str, dtype: str = "float32") -> tuple[Any, Any]:
    """The model and the tokenizer at a directory or hub id, or called ``"tiny"`` or ``"smollm2"``.

    The model is on the GPU if there is one, in evaluation mode.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if dtype not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype must be float32, bfloat16 or float16, got {dtype!r}.")
    path = backbone_path(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(path)
    except OSError as error:
        reason = str(error).partition("\n")[0]
        raise FileNotFoundError(
            f"model {name} is no directory with a model, and the hub did not give it: {reason}"
        ) from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device)  # type: ignore[arg-type]
    return model.eval(), tokenizer
