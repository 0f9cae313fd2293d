"""Prefill of one layer: FULL, STREAMING and SELECTED heads in one call."""

from __future__ import annotations

from collections.abc import Callable

from elasticore.bench.cases import Case, Engine

SUITE = "attention"


def test_attention(timed: Callable[[Case, Engine], object], case: Case, engine: Engine) -> None:
    timed(case, engine)
