"""The decision of the Attention Router."""

from __future__ import annotations

from collections.abc import Callable

from elasticore.bench.cases import Case, Engine

SUITE = "router"


def test_router(timed: Callable[[Case, Engine], object], case: Case, engine: Engine) -> None:
    timed(case, engine)
