"""Selectors by name, so that a configuration file can say which one a model uses."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
from typing import Any

from elasticore.patterns.infllm import InfLLMV2
from elasticore.patterns.moba import MoBA
from elasticore.patterns.nsa import NSASelected
from elasticore.patterns.selector import BlockSelector
from elasticore.patterns.trianglemix import TriangleMix
from elasticore.patterns.xattention import XAttention

__all__ = ["register_selector", "selector_from_dict", "selector_to_dict"]

ENTRY_POINTS = "elasticore.selectors"

_SELECTORS: dict[str, type[BlockSelector]] = {
    "infllm-v2": InfLLMV2,
    "moba": MoBA,
    "nsa-selected": NSASelected,
    "trianglemix": TriangleMix,
    "xattention": XAttention,
}


def register_selector(name: str, selector: type[BlockSelector]) -> None:
    """Make a selector known to configuration files under ``name``.

    A package can do the same without being imported, by an entry point in the group
    ``elasticore.selectors``.

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
    for name in _names():
        try:
            found = type(selector) is _class(name)
        except Exception:  # another package that is broken: not the one of this selector
            continue
        if found:
            return {"name": name, **dataclasses.asdict(selector)}  # type: ignore[call-overload]
    raise ValueError(
        f"selector {type(selector).__name__} has no name; call elasticore.register_selector first."
    )


def selector_from_dict(data: dict[str, Any]) -> BlockSelector:
    """The selector that :func:`selector_to_dict` wrote."""
    settings = dict(data)
    name = settings.pop("name", None)
    if name not in _names():
        raise ValueError(f"selector {name!r} is unknown; there are: {', '.join(_names())}.")
    try:
        selector = _class(name)
    except Exception as error:
        raise ValueError(
            f"selector {name!r}: its package failed to load ({type(error).__name__}: {error})."
        ) from error
    try:
        return selector(**settings)
    except TypeError as error:
        raise ValueError(f"selector {name!r} does not take these settings: {error}.") from None


@functools.cache
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _names() -> list[str]:
    return list(dict.fromkeys([*_SELECTORS, *_entry_points()]))


def _class(name: str) -> type[BlockSelector]:
    if name not in _SELECTORS:
        register_selector(name, _entry_points()[name].load())
    return _SELECTORS[name]
