"""One new token on a filled cache."""

from __future__ import annotations

from collections.abc import Callable

from elasticore.bench.cases import Case, Engine

SUITE = "decode"


def test_decode(timed: Callable[[Case, Engine], object], case: Case, engine: Engine) -> None:
    timed(case, engine)
