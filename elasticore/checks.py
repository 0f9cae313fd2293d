"""Checks of plain arguments, with one wording: what it is called, what it got, what it accepts."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

__all__ = ["check_int", "check_number", "check_type", "differences"]


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


def check_type(name: str, value: object, accepted: Any) -> None:
    """Raise ``TypeError`` unless ``value`` is of a type as an annotation gives it.

    Known are bool, int (no bool), float (any number), str, None, dict, list and tuple of those,
    ``Literal``, and unions. Text is no number, and no bool.
    """
    if _is_of(value, accepted):
        return
    if value is None:
        raise TypeError(f"{name} is empty; give {_named(accepted)}, or leave it out.")
    raise TypeError(f"{name} must be {_named(accepted)}, got {value!r}.")


def _is_of(value: object, accepted: Any) -> bool:
    kind, inner = get_origin(accepted), get_args(accepted)
    if accepted is Any:
        return True
    if kind in (Union, types.UnionType):
        return any(_is_of(value, one) for one in inner)
    if kind is Literal:
        return any(value == one and type(value) is type(one) for one in inner)
    if accepted is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is dict:
        return isinstance(value, dict) and all(_is_of(key, inner[0]) for key in value)
    if kind is list:
        return isinstance(value, list) and all(_is_of(one, inner[0]) for one in value)
    if kind is tuple:
        if not isinstance(value, (list, tuple)) or len(value) != len(inner):
            return False
        return all(map(_is_of, value, inner))
    if accepted in (None, type(None)):
        return value is None
    return type(value) is accepted


def _named(accepted: Any) -> str:
    kind, inner = get_origin(accepted), get_args(accepted)
    if kind in (Union, types.UnionType):
        return " or ".join(_named(one) for one in inner if one is not type(None))
    if kind is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if kind is list and inner[0] is str:
        return "a list of texts"
    if kind is tuple:
        return f"a list of {len(inner)} numbers"
    if kind is list:
        return "a list"
    words = {bool: "true or false", int: "an int", float: "a number", str: "text"}
    return "a mapping" if kind is dict else words.get(accepted, str(accepted))


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
