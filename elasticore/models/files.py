"""A way to attend on disk and on the hub: JSON and safetensors, never code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from elasticore import __version__
from elasticore.errors import RouterNotFound
from elasticore.models.card import CARD, is_card
from elasticore.models.fingerprint import HUB_ID

__all__ = ["read_files", "upload_files", "write_files"]

WEIGHTS, SETTINGS = "router.safetensors", "router.json"
FORMAT = 2
_OLD_MODES = {"fa": {"name": "full"}, "ssa": {"name": "streaming"}, "xa": {"name": "xattention"}}


def write_files(
    path: str | Path,
    way: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    base_model: Mapping[str, Any] | None,
) -> Path:
    """Write the two files of a way to attend; return the directory, made if missing.

    Parameters
    ----------
    path
        The directory. Each file appears whole or not at all.
    way, tensors
        Its settings as JSON values, and the policy's tensors.
    base_model
        The fingerprint of the backbone that it is for, or None.
    """
    from safetensors.torch import save

    settings = {
        "format": FORMAT,
        "elasticore": __version__,
        "way": dict(way),
        "base_model": None if base_model is None else dict(base_model),
    }
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path) as scratch:
        Path(scratch, WEIGHTS).write_bytes(save(held, metadata={"format": "pt"}))
        Path(scratch, SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        for name in (WEIGHTS, SETTINGS):
            Path(scratch, name).replace(path / name)
    return path


def read_files(
    path: str | Path, revision: str | None = None
) -> tuple[Path, dict[str, Any], dict[str, Tensor], dict[str, Any] | None]:
    """Read what :func:`write_files` wrote: the directory, settings, tensors, base model.

    Raises
    ------
    RouterNotFound
        If ``path`` is no directory with the two files, and the hub has none.
    TypeError
        If ``path`` is no str or Path.
    ValueError
        If a file is damaged, holds what is not finite, or is of a newer format.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = _folder(path, revision)
    way, base_model = _settings(folder / SETTINGS)
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise ValueError(f"path {folder / WEIGHTS} is damaged: {error}.") from error
    for name, tensor in tensors.items():
        if not bool(tensor.isfinite().all()):  # a router would decide, but anything
            raise ValueError(f"path {folder / WEIGHTS} is damaged: {name} is not finite.")
    if way.get("policy") is None:  # format 1: the names of the tensors say it
        table = bool(tensors) and all(name.endswith(".decisions") for name in tensors)
        way["policy"] = {"name": "head-table"} if table else way.pop("router")
        way.pop("router", None)
    return folder, way, tensors, base_model


def upload_files(path: Path, repository: str, private: bool) -> None:
    """Upload the two files to the hub, to a repository that is made if missing.

    The card is uploaded where the repository has none, and nothing else in the directory ever is.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    api.create_repo(repository, private=private, exist_ok=True)
    for name in (WEIGHTS, SETTINGS):
        api.upload_file(path_or_fileobj=path / name, path_in_repo=name, repo_id=repository)
    if is_card(path / CARD) and not api.file_exists(repository, CARD):
        api.upload_file(path_or_fileobj=path / CARD, path_in_repo=CARD, repo_id=repository)


def _folder(path: str | Path, revision: str | None) -> Path:
    if not isinstance(path, (str, Path)):
        raise TypeError(f"path must be a str or a Path, got {path!r}.")
    folder = Path(path)
    if not folder.is_dir():
        if not isinstance(path, str) or not HUB_ID.match(path):
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


def _settings(path: Path) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """The settings of a way in ``path``, and the fingerprint of its base model."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        # The format comes first: a newer one may hold settings that nothing here knows.
        if found["format"] == 1:
            return _of_format_1(found["config"]), dict(found["base_model"])
        if found["format"] != FORMAT:
            raise ValueError(
                f"format {found['format']!r}, but this elasticore reads {FORMAT}; update it"
            )
        base_model = found["base_model"]
        return dict(found["way"]), None if base_model is None else dict(base_model)
    except KeyError as error:
        raise ValueError(f"path {path} is no router file: {error} is missing.") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"path {path} is no router file: {error}") from error


def _of_format_1(config: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that files had under ``config``, as those of a way; the policy is open."""
    known = {"mode", "sink", "local", "block_size", "selector", "boundary", "hidden_multiplier"}
    unknown = sorted(set(config) - known - {"sampler", "decode"})
    if unknown:
        raise ValueError(f"config has unknown settings {', '.join(unknown)}")
    names = str(config.get("mode", "fa-ssa")).split("-")
    if len(names) != 2 or not set(names) <= set(_OLD_MODES):
        raise ValueError(f"config has the mode {config.get('mode')!r}")
    patterns = [dict(_OLD_MODES[name]) for name in names]
    for name, pattern in zip(names, patterns, strict=True):
        if name == "ssa":
            pattern |= {"sink": config.get("sink", 128), "local": config.get("local", 2048)}
        elif name == "xa" and config.get("selector"):
            pattern.clear()
            pattern |= config["selector"]
    router = {
        key: config[key] for key in ("boundary", "hidden_multiplier", "sampler") if key in config
    }
    return {
        "router": {"name": "router", **router},
        "retrieval": patterns[0],
        "sparse": patterns[1],
        "block_size": config.get("block_size", 128),
        "decode": config.get("decode", "routed"),
    }
