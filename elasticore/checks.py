"""Checks of plain arguments, with one wording: what it is called, what it got, what it accepts."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

__all__ = ["check_int", "check_number", "differences"]


def check_int(
    name: str, value: object, least: int | None = None, *, optional: bool = False
) -> None:
    """Raise unless ``value`` is an int (no bool) of at least ``least``, or None if ``optional``."""
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name} must be an int{' or None' * optional}, got {value!r}.")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def check_number(name: str, value: object, low: float = -math.inf, high: float = math.inf) -> None:
    """Raise unless ``value`` is a finite number (no bool) from ``low`` to ``high``."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}.")
    if not math.isfinite(value) or not low <= value <= high:
        accepted = "finite" if low == -math.inf and high == math.inf else f"from {low} to {high}"
        raise ValueError(f"{name} must be {accepted}, got {value}.")


def differences(saved: Mapping[str, Any], own: Mapping[str, Any], within: str = "") -> list[str]:
    """In what ``saved`` settings are not those at hand: ``"sink 128 (now 64)"`` each."""
    found = []
    for name in dict.fromkeys((*own, *(saved if within else ()))):
        was, now = saved.get(name), own.get(name)
        if isinstance(was, Mapping) and isinstance(now, Mapping):
            found += differences(was, now, f"{within}{name}.")
        elif was != now:
            found.append(f"{within}{name} {_short(was)} (now {_short(now)})")
    return found


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
