"""Models by name: a tiny one that ships with the package, and a real one that can be fetched."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

from elasticore.assets.fetched import smollm2

__all__ = ["BACKBONES", "ROUTERS", "backbone_path", "tiny"]


def tiny() -> Path:
    """Directory of the tiny model, which was trained for this package: ``backbone``, ``router``."""
    return Path(str(files(__name__) / "tiny"))


BACKBONES = {"tiny": lambda: tiny() / "backbone", "smollm2": smollm2}
"""Where backbones are, by the name that a user gives."""

ROUTERS = {"tiny": tiny() / "router"}
"""Trained routers in the package, by the name that a user gives."""


def backbone_path(name: str) -> str:
    """The directory of a backbone with a name of ours; any other name as it is.

    Raises
    ------
    FileNotFoundError
        If it is one that was not fetched; the message says how to.
    """
    return str(BACKBONES[name]()) if name in BACKBONES else name
