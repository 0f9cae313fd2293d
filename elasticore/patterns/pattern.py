"""What every pattern is: which key blocks a head may read, and the lane that runs it."""

from __future__ import annotations

from abc import ABC
from enum import IntEnum
from typing import ClassVar

__all__ = ["HeadMode", "Pattern", "check_block_size"]


class HeadMode(IntEnum):
    """The three lanes that a backend implements; every pattern lowers to one of them."""

    FULL = 0
    """Every key up to the query (the paper's FA)."""
    STREAMING = 1
    """Sink blocks and a local window of blocks (the paper's SSA)."""
    SELECTED = 2
    """The key blocks that a selector chose for this input (the paper's XA)."""


class Pattern(ABC):
    """Which key blocks a head may read: a frozen value.

    There are :class:`Full`, :class:`Streaming` and any number of :class:`BlockSelector`.

    Attributes
    ----------
    lane
        What runs a head of this pattern in a backend.
    """

    lane: ClassVar[HeadMode]

    def check(self, block_size: int) -> None:  # noqa: B027 - most patterns accept any block
        """Raise ``ValueError`` if this pattern cannot work with blocks of ``block_size``."""


def check_block_size(block_size: object) -> None:
    """Raise unless ``block_size`` is 16, 32, 64 or 128."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int (tokens), got {block_size!r}.")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size must be 16, 32, 64 or 128 tokens, got {block_size}.")
