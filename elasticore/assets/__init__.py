"""What ships with the package: a tiny backbone that is really trained, and its routers."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

__all__ = ["ROUTERS", "tiny"]


def tiny() -> Path:
    """Directory of the tiny model: ``backbone`` and ``router``."""
    return Path(str(files(__name__) / "tiny"))


ROUTERS = {"tiny": tiny() / "router"}
"""Trained routers in the package, by the name that a user gives."""
