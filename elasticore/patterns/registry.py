"""Selectors by name, so that a configuration file can say which one a model uses."""

from __future__ import annotations

import dataclasses
from typing import Any

from elasticore.patterns.selector import BlockSelector
from elasticore.patterns.xattention import XAttention

__all__ = ["register_selector", "selector_from_dict", "selector_to_dict"]

_SELECTORS: dict[str, type[BlockSelector]] = {"xattention": XAttention}


def register_selector(name: str, selector: type[BlockSelector]) -> None:
    """Make a selector known to configuration files under ``name``.

    Parameters
    ----------
    name
        The value of ``"name"`` in the file.
    selector
        A dataclass that subclasses :class:`BlockSelector`; its fields are its settings.

    Raises
    ------
    TypeError, ValueError
        If it is no such dataclass, or the name is taken by another class.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty str, got {name!r}.")
    if not (isinstance(selector, type) and issubclass(selector, BlockSelector)):
        raise TypeError(f"selector must be a subclass of BlockSelector, got {selector!r}.")
    if not dataclasses.is_dataclass(selector):
        raise TypeError(f"selector {selector.__name__} must be a dataclass: its fields are saved.")
    if _SELECTORS.get(name, selector) is not selector:
        raise ValueError(f"name {name!r} is taken by {_SELECTORS[name].__name__}.")
    _SELECTORS[name] = selector


def selector_to_dict(selector: BlockSelector) -> dict[str, Any]:
    """``{"name": ..., settings...}`` of a registered selector."""
    for name, cls in _SELECTORS.items():
        if type(selector) is cls:
            return {"name": name, **dataclasses.asdict(selector)}  # type: ignore[call-overload]
    raise ValueError(
        f"selector {type(selector).__name__} has no name; call elasticore.register_selector first."
    )


def selector_from_dict(data: dict[str, Any]) -> BlockSelector:
    """The selector that :func:`selector_to_dict` wrote."""
    settings = dict(data)
    name = settings.pop("name", None)
    if name not in _SELECTORS:
        raise ValueError(f"selector {name!r} is unknown; there are: {', '.join(_SELECTORS)}.")
    try:
        return _SELECTORS[name](**settings)
    except TypeError as error:
        raise ValueError(f"selector {name!r} does not take these settings: {error}.") from None
