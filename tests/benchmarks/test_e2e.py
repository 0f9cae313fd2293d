"""Time to the first token of a whole model with few layers."""

from __future__ import annotations

from collections.abc import Callable

from elasticore.bench.cases import Case, Engine

SUITE = "e2e"


def test_e2e(timed: Callable[[Case, Engine], object], case: Case, engine: Engine) -> None:
    timed(case, engine)
