"""XAttention's choice of blocks."""

from __future__ import annotations

from collections.abc import Callable

from elasticore.bench.cases import Case, Engine

SUITE = "selector"


def test_selector(timed: Callable[[Case, Engine], object], case: Case, engine: Engine) -> None:
    timed(case, engine)
