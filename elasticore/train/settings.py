"""Settings as text: a YAML file, and ``key=value`` that changes what it says."""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

__all__ = ["changed", "read_settings"]


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: 5e-4 is a number, which YAML 1.1 takes for text; keys are unique."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = [name for number, name in enumerate(names) if name in names[:number]]
        if twice:
            raise yaml.MarkedYAMLError(None, None, f"{twice[0]} is there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no YAML, or no mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"config {path} is no file.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8-sig"), _Loader)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"config {path} is no YAML: {_said(error)}") from error
    if not isinstance(data, dict):
        raise ValueError(f"config {path} must be a mapping of settings.")
    return data


def changed(
    data: Mapping[str, Any],
    changes: Sequence[str],
    *,
    defaults: Mapping[str, Any],
    closed: Collection[str] = (),
) -> dict[str, Any]:
    """A copy of ``data`` in which ``changes`` hold.

    Parameters
    ----------
    data
        The settings.
    changes
        ``"key=value"``, with a YAML value. Dots lead into mappings:
        ``elastic.policy.boundary=50``. A later one wins over an earlier one.
    defaults
        Every setting there is, with what holds if ``data`` leaves it out.
    closed
        Settings whose mappings get no new keys.

    Raises
    ------
    ValueError
        If a change is no ``key=value``, or its key leads nowhere; the message names it and says
        what there is.

    Examples
    --------
    >>> changed({"a": {"b": 1}}, ["a.b=2", "c=[1, 5e-4]"], defaults={"a": {}, "c": None})
    {'a': {'b': 2}, 'c': [1, 0.0005]}
    """
    result = copy.deepcopy(dict(data))
    for change in changes:
        key, equals, text = change.partition("=")
        steps = key.strip().split(".")
        if not equals or not all(steps):
            raise ValueError(
                "set takes KEY=VALUE, such as max_steps=100 or elastic.policy.boundary=50, got "
                f"{change!r}."
            )
        try:
            value = yaml.load(text, _Loader)
        except yaml.YAMLError as error:
            raise ValueError(f"set {change}: the value is no YAML: {_said(error)}") from error
        if re.search(r"(^|\s)#", text) and "#" not in str(value):
            raise ValueError(f"set {change}: what follows # is left out of YAML; quote the value.")
        if steps[0] not in defaults:
            raise ValueError(
                f"set {change}: there is no setting {steps[0]}; there are: "
                f"{', '.join(sorted(defaults))}."
            )
        place = result
        if len(steps) > 1:
            place.setdefault(steps[0], copy.deepcopy(defaults[steps[0]]))
        for number, step in enumerate(steps[:-1], 1):
            inner = place.setdefault(step, {})
            if not isinstance(inner, dict):
                raise ValueError(
                    f"set {change}: {'.'.join(steps[:number])} is {inner!r} and has no settings "
                    "of its own."
                )
            place = inner
        if len(steps) > 1 and steps[0] in closed and steps[-1] not in place:
            there = ", ".join(map(str, place)) or "none"
            raise ValueError(
                f"set {change}: {'.'.join(steps[:-1])} has no {steps[-1]}; there are: {there}. "
                f"{steps[0]}={{...}} gives the whole mapping."
            )
        place[steps[-1]] = value
    return result


def _said(error: Exception) -> str:
    """What is wrong and where, in one line."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"{getattr(error, 'problem', None)}, in line {mark.line + 1}, column {mark.column + 1}."
