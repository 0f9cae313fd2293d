"""Patterns by name, so that a configuration file can say which ones a model uses."""

from __future__ import annotations

import dataclasses
from typing import Any

from elasticore.patterns.pattern import Pattern
from elasticore.registry import Registry

__all__ = ["PATTERNS", "pattern_from_dict", "pattern_to_dict", "register_pattern"]

PATTERNS: Registry[Pattern] = Registry(
    "pattern",
    Pattern,
    "elasticore.patterns",
    {
        "full": "elasticore.patterns.full:Full",
        "streaming": "elasticore.patterns.streaming:Streaming",
        "infllm-v2": "elasticore.patterns.infllm:InfLLMV2",
        "moba": "elasticore.patterns.moba:MoBA",
        "nsa-selected": "elasticore.patterns.nsa:NSASelected",
        "trianglemix": "elasticore.patterns.trianglemix:TriangleMix",
        "xattention": "elasticore.patterns.xattention:XAttention",
    },
)
"""Every pattern that a file can name."""


def register_pattern(name: str, cls: type[Pattern]) -> None:
    """Make a pattern known to configuration files under ``name``.

    A package can do the same without being imported, by an entry point in the group
    ``elasticore.patterns``.

    Parameters
    ----------
    name
        The value of ``"name"`` in the file.
    cls
        A dataclass that subclasses :class:`Pattern`, as every :class:`BlockSelector` does; its
        fields are its settings.

    Raises
    ------
    TypeError, ValueError
        If it is no such dataclass, or the name is taken by another class.
    """
    PATTERNS.register(name, _dataclass(cls))


def pattern_to_dict(pattern: Pattern) -> dict[str, Any]:
    """``{"name": ..., settings...}`` of a pattern whose class has a name.

    Raises
    ------
    ValueError
        If it has none.

    Examples
    --------
    >>> import elasticore
    >>> elasticore.pattern_to_dict(elasticore.Streaming(128, 1024))
    {'name': 'streaming', 'sink': 128, 'local': 1024}
    """
    name = PATTERNS.name_of(type(pattern))
    _dataclass(type(pattern))
    return {"name": name, **dataclasses.asdict(pattern)}  # type: ignore[call-overload]


def pattern_from_dict(data: dict[str, Any]) -> Pattern:
    """The pattern that :func:`pattern_to_dict` wrote.

    Raises
    ------
    ValueError
        If its name is unknown, its package cannot be loaded, or it does not take its settings.
    """
    settings = dict(data)
    name = settings.pop("name", None)
    cls = _dataclass(PATTERNS.named(name))
    try:
        return cls(**settings)
    except TypeError as error:
        raise ValueError(f"pattern {name!r} does not take these settings: {error}.") from None


def _dataclass(cls: type[Pattern]) -> type[Pattern]:
    if isinstance(cls, type) and not dataclasses.is_dataclass(cls):
        raise TypeError(f"pattern {cls.__name__} must be a dataclass: its fields are saved.")
    return cls
