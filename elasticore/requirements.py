"""The oldest releases that elasticore works with, checked where they are first used.

pip sees to them when it installs elasticore; what was installed later may be older.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re

from elasticore.errors import OutdatedPackage

__all__ = ["OLDEST", "check_packages", "is_older", "oldest"]

OLDEST: dict[str, tuple[int, ...]] = {
    "torch": (2, 11),
    "transformers": (5, 17),
    "safetensors": (0, 6),
    "numpy": (1, 26),
    "triton": (3, 6),
    "flashinfer-python": (0, 6, 8),  # its plans know no limit on requests
}
"""As in ``pyproject.toml``: a checkout that is not installed knows nothing of that file."""


def check_packages(*packages: str) -> None:
    """Raise unless the installed ``packages`` are new enough; importing none of them.

    Raises
    ------
    OutdatedPackage
        If one is too old. One that is missing, or has no metadata, is left to its import.
    """
    for package in packages:
        _check(package)


def is_older(package: str, version: str) -> bool:
    """Whether ``version`` of a package is older than what is needed, by its numbers alone."""
    wanted = OLDEST[package]
    return tuple(map(int, re.findall(r"\d+", version)[: len(wanted)])) < wanted


def oldest(package: str) -> str:
    """The oldest version of a package that will do."""
    return ".".join(map(str, OLDEST[package]))


@functools.cache  # reading a package's metadata takes milliseconds
def _check(package: str) -> None:
    try:
        found: str | None = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return
    if found and is_older(package, found):
        wanted = oldest(package)
        raise OutdatedPackage(
            f"{package} {found} is too old: elasticore needs {wanted} or newer; "
            f"pip install --upgrade '{package}>={wanted}'."
        )
