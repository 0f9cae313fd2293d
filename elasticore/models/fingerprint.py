"""What identifies a backbone: its sizes, and a hash of a sample of its weights."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elasticore.errors import RouterMismatch
from elasticore.models.families import attention_layers

__all__ = ["HUB_ID", "check_base_model", "fingerprint", "fingerprint_of", "weights_hash"]

HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What identifies the backbone that routers belong to: its sizes and a hash of its weights.

    The hash covers a sample of the embedding and of every layer's norms, rounded to bfloat16, so
    that a model loaded in float32 and in bfloat16 is the same one. Loading in float16 may round to
    other values; ``elasticize(model, way, check_base=False)`` is for that. Weights that are on disk
    are left out.
    """
    config: Any = model.config
    layers = attention_layers(model)
    samples: list[Tensor] = [model.get_input_embeddings().weight]  # type: ignore[operator]
    samples += [p for name, p in model.named_parameters() if name.endswith("layernorm.weight")]
    whole = not any(sample.is_meta for sample in samples)
    name = str(getattr(config, "_name_or_path", ""))
    return {
        "family": config.model_type,
        "layers": len(layers),
        "kv_heads": config.num_key_value_heads,
        "head_dim": int(layers[0].head_dim),  # type: ignore[arg-type]
        "weights": weights_hash(samples) if whole else None,
        # A hub id says where the model is from; of a local path only the last part means anything.
        "name": name if HUB_ID.match(name) else Path(name).name,
    }


def weights_hash(samples: Iterable[Tensor]) -> str:
    """The hash in a :func:`fingerprint`, of the embedding and then every layer's norms."""
    digest = hashlib.sha256()
    for tensor in samples:
        flat = tensor.detach().flatten()
        picked = flat[:: max(1, flat.numel() // 256)][:256]
        digest.update(
            picked.to("cpu", torch.bfloat16).contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:32]


def check_base_model(saved: Mapping[str, Any], own: Mapping[str, Any], weights: bool) -> None:
    """Raise :class:`RouterMismatch` unless two fingerprints are of one model.

    Parameters
    ----------
    saved, own
        Of the model that a way was made for, and of the one at hand.
    weights
        Whether the weights have to be the same as well; those on disk are not known.
    """
    sizes = ("family", "layers", "kv_heads", "head_dim")
    wrong = [
        f"{key} {saved.get(key)} (model: {own[key]})" for key in sizes if saved.get(key) != own[key]
    ]
    if wrong:
        raise RouterMismatch(f"way is for another model: {', '.join(wrong)}.")
    if weights and own["weights"] is not None and saved.get("weights") != own["weights"]:
        raise RouterMismatch(
            "way is for other weights than this model's (it was trained on "
            f"{saved.get('name') or 'a model without a name'}); load that one, or pass "
            "check_base=False to use it all the same."
        )


def fingerprint_of(model: nn.Module, folder: Path) -> dict[str, Any]:
    """The :func:`fingerprint` of a model without weights, whose weights a directory holds.

    Parameters
    ----------
    model
        On the device ``meta``.
    folder
        With safetensors files; if it lacks any that is needed, ``weights`` is None.
    """
    from safetensors import safe_open

    embedding = model.get_input_embeddings()  # type: ignore[operator]
    wanted = [f"{name}.weight" for name, module in model.named_modules() if module is embedding]
    wanted += [name for name, _ in model.named_parameters() if name.endswith("layernorm.weight")]
    found: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as tensors:
            found |= {name: tensors.get_tensor(name) for name in wanted if name in tensors.keys()}  # noqa: SIM118
    whole = all(name in found for name in wanted)
    weights = weights_hash(found[name] for name in wanted) if whole else None
    return {**fingerprint(model), "weights": weights}
