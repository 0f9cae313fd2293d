"""Full attention: every key up to the query."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from elasticore.patterns.pattern import HeadMode, Pattern

__all__ = ["Full"]


@dataclass(frozen=True)
class Full(Pattern):
    """Every key up to the query: the paper's FA (Eq. 1)."""

    lane: ClassVar[HeadMode] = HeadMode.FULL
