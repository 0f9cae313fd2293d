"""Routers on disk and on the hub: safetensors and JSON, never code."""

from __future__ import annotations

import hashlib
import json
import re
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from elasticore import __version__
from elasticore.errors import ElasticoreError
from elasticore.models.config import ElasticConfig
from elasticore.models.elastic import _check_model, _state, elasticize, is_elastic, restore, routers
from elasticore.models.families import attention_layers, family_of
from elasticore.router import AttentionRouter, FixedPolicy

__all__ = ["RouterMismatch", "RouterNotFound", "fingerprint", "load_router", "save_router"]

WEIGHTS, SETTINGS = "router.safetensors", "router.json"
FORMAT = 1
_HUB_ID = re.compile(r"^[\w.-]+/[\w.-]+$")

Model = TypeVar("Model", bound=nn.Module)


class RouterMismatch(ElasticoreError, ValueError):
    """Routers that were trained for another model than the one they are loaded into."""


class RouterNotFound(ElasticoreError, FileNotFoundError, ValueError):
    """No routers where they were said to be, neither on disk nor on the hub."""


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """What identifies the backbone that routers belong to: its sizes and a hash of its weights.

    The hash covers a sample of the embedding and of every layer's norms, rounded to bfloat16, so
    that a model loaded in float32 and in bfloat16 is the same one. Loading in float16 may round to
    other values; :func:`load_router` then needs ``check_base=False``.
    """
    config: Any = model.config
    layers = attention_layers(model)
    samples: list[Tensor] = [model.get_input_embeddings().weight]  # type: ignore[operator]
    samples += [p for name, p in model.named_parameters() if name.endswith("layernorm.weight")]
    name = str(getattr(config, "_name_or_path", ""))
    return {
        "family": config.model_type,
        "layers": len(layers),
        "kv_heads": config.num_key_value_heads,
        "head_dim": int(layers[0].head_dim),  # type: ignore[arg-type]
        "weights": weights_hash(samples),
        # A hub id says where the model is from; of a local path only the last part means anything.
        "name": name if _HUB_ID.match(name) else Path(name).name,
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


def save_router(
    model: nn.Module, path: str | Path, *, push_to_hub: str | None = None, private: bool = True
) -> Path:
    """Write an elastic model's routers and settings to a directory.

    Parameters
    ----------
    model
        An elastic model with trained routers, or with the :class:`FixedPolicy` of a head table.
    path
        Directory for ``router.safetensors`` and ``router.json``; made if missing.
    push_to_hub
        ``"user/name"`` of a hub repository to upload the two files to.
    private
        Whether a repository that is created is private.

    Returns
    -------
    Path
        The directory.

    Raises
    ------
    ValueError
        If the model is not elastic or runs a policy that has nothing to save.
    """
    state = _state(model)
    tensors = {}
    for index, router in enumerate(routers(model)):
        if not isinstance(router, (AttentionRouter, FixedPolicy)):
            raise ValueError(
                f"model runs the policy {type(router).__name__}; only AttentionRouters and "
                "FixedPolicies are saved."
            )
        for name, tensor in router.state_dict().items():
            tensors[f"layers.{index}.{name}"] = tensor.detach().cpu().contiguous()
    path = write_files(path, tensors, state.config, fingerprint(model))
    if push_to_hub is not None:
        from huggingface_hub import HfApi

        api = HfApi()
        api.create_repo(push_to_hub, private=private, exist_ok=True)
        for name in (WEIGHTS, SETTINGS):
            api.upload_file(path_or_fileobj=path / name, path_in_repo=name, repo_id=push_to_hub)
    return path


def write_files(
    path: str | Path, tensors: dict[str, Tensor], config: ElasticConfig, base_model: dict[str, Any]
) -> Path:
    """Write the two files of :func:`save_router` from what they hold; return the directory.

    Parameters
    ----------
    path
        The directory; made if missing.
    tensors
        ``layers.INDEX.NAME`` with the names of a router's ``state_dict``.
    config
        The settings.
    base_model
        The :func:`fingerprint` of the backbone.
    """
    from safetensors.torch import save

    settings = {
        "format": FORMAT,
        "elasticore": __version__,
        "config": config.to_dict(),
        "base_model": base_model,
    }
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    # Each file appears whole or not at all.
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        Path(scratch, WEIGHTS).write_bytes(save(tensors, metadata={"format": "pt"}))
        Path(scratch, SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, SETTINGS):
            Path(scratch, name).replace(path / name)
    return path


def load_router(
    model: Model, path: str | Path, *, check_base: bool = True, revision: str | None = None
) -> Model:
    """Make ``model`` elastic with the trained routers, or the head table, at ``path``.

    Reads ``router.json`` and ``router.safetensors`` only; never runs code from a hub.

    Parameters
    ----------
    model
        The backbone that the routers were trained on; if it is elastic already, its routers are
        replaced. On failure it is left as it was.
    path
        A directory, or a hub id ``"user/name"``.
    check_base
        Whether to insist on the very weights that the routers were trained on. False allows, say,
        a fine-tuned copy of the same sizes.
    revision
        Branch, tag or commit of a hub repository.

    Raises
    ------
    RouterNotFound
        If ``path`` is no directory with the two files, and the hub has none.
    TypeError
        If ``path`` is no str or Path.
    RouterMismatch
        If the routers belong to another model; the message says in what it differs.
    ValueError
        If a file is damaged or of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _folder(path, revision)
    config, saved = _settings(folder / SETTINGS)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"path {folder / WEIGHTS} is damaged: {error}.") from error

    before = _state(model) if is_elastic(model) else None
    if before is None:
        _check_model(model)
    family_of(model)
    _check_base(saved, fingerprint(model), folder, check_base)
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if match is None:
            raise ValueError(f"path {folder / WEIGHTS} holds an unexpected tensor {name!r}.")
        layers.setdefault(int(match[1]), {})[match[2]] = tensor
    old = None if before is None else (before.config, routers(model))
    if before is not None:
        restore(model)
    try:
        elasticize(model, config)
        made = routers(model)
        if sorted(layers) != list(range(len(made))):
            raise RouterMismatch(
                f"path {folder} holds routers for {len(layers)} layers; model has {len(made)}."
            )
        if all(set(layer) == {"decisions"} for layer in layers.values()):  # a head table
            table = [FixedPolicy(layers[index]["decisions"]) for index in sorted(layers)]
            restore(model)
            elasticize(model, config, policies=table)
            return model
        for index, router in enumerate(made):
            try:
                router.load_state_dict(layers[index])
            except RuntimeError as error:
                raise ValueError(
                    f"path {folder / WEIGHTS} does not fit its own settings: {error}"
                ) from error
    except BaseException:
        if is_elastic(model):
            restore(model)
        if old is not None:
            elasticize(model, old[0], policies=old[1])
        raise
    return model


def _folder(path: str | Path, revision: str | None) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be a str or a Path, got {path!r}.")
    folder = Path(path)
    if not folder.is_dir():
        if not isinstance(path, str) or not _HUB_ID.match(path):
            raise RouterNotFound(f"path {path} is neither a directory nor a hub id user/name.")
        folder = _download(path, revision)
    missing = [name for name in (WEIGHTS, SETTINGS) if not (folder / name).is_file()]
    if missing:
        raise RouterNotFound(f"path {path} has no {' and no '.join(missing)}.")
    return folder


def _download(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(hub_id, revision=revision, allow_patterns=[WEIGHTS, SETTINGS])
        )
    except Exception as error:  # the hub client raises many kinds; all mean the same to the caller
        raise RouterNotFound(
            f"path {hub_id} is no directory, and the hub did not give it: {error}"
        ) from error


def _settings(path: Path) -> tuple[ElasticConfig, dict[str, Any]]:
    """The settings in ``path``, and the fingerprint of the model that the routers belong to."""
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        # The format comes first: a newer one may hold settings that nothing here knows.
        if settings["format"] != FORMAT:
            raise ValueError(
                f"format {settings['format']!r}, but this elasticore reads {FORMAT}; update it"
            )
        saved = dict(settings["base_model"])
        return ElasticConfig.from_dict(settings["config"]), saved
    except KeyError as error:
        raise ValueError(f"path {path} is no router file: {error} is missing.") from error
    except (ValueError, TypeError) as error:
        raise ValueError(f"path {path} is no router file: {error}") from error


def _check_base(saved: dict[str, Any], own: dict[str, Any], folder: Path, strict: bool) -> None:
    sizes = ("family", "layers", "kv_heads", "head_dim")
    wrong = [
        f"{key} {saved.get(key)} (model: {own[key]})" for key in sizes if saved.get(key) != own[key]
    ]
    if wrong:
        raise RouterMismatch(f"path {folder} holds routers of another model: {', '.join(wrong)}.")
    if strict and saved.get("weights") != own["weights"]:
        raise RouterMismatch(
            f"path {folder} holds routers trained on other weights than this model's (they were "
            f"trained on {saved.get('name') or 'a model without a name'}); load that one, or pass "
            "check_base=False to use them all the same."
        )
