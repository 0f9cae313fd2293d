"""Classes by name: our own, registered ones, and those of packages."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable

import pytest

from elasticore import BlockSelector, MoBA, XAttention
from elasticore.registry import Registry


class Theirs(MoBA):
    pass


class Ours(MoBA):
    pass


@pytest.fixture
def table(monkeypatch: pytest.MonkeyPatch) -> Registry[BlockSelector]:
    """One of our own, one of a package, and a package's that is broken."""

    def broken() -> object:
        raise OSError("no such library")

    loads: dict[str, Callable[[], object]] = {"broken": broken, "theirs": lambda: Theirs}

    class Point(importlib.metadata.EntryPoint):
        def load(self) -> object:
            return loads[self.name]()

    def installed(*, group: str) -> list[importlib.metadata.EntryPoint]:
        return [Point(name, "somewhere:Something", group) for name in loads]

    monkeypatch.setattr(importlib.metadata, "entry_points", installed)
    built_in = {"moba": "elasticore.patterns.moba:MoBA"}
    return Registry("selector", BlockSelector, "selectors", built_in)  # type: ignore[type-abstract]


def test_names_are_ours_then_registered_ones_then_those_of_packages(
    table: Registry[BlockSelector],
) -> None:
    table.register("ours", Ours)
    assert table.names() == ["moba", "ours", "broken", "theirs"]


def test_a_class_has_a_name_and_a_name_has_a_class(table: Registry[BlockSelector]) -> None:
    for name, cls in (("moba", MoBA), ("theirs", Theirs)):
        assert table.get(name) is cls
        assert table.name_of(cls) == name
    with pytest.raises(ValueError, match=r"Ours has no name; call elasticore\.register_selector"):
        table.name_of(Ours)
    with pytest.raises(OSError, match="no such library"):
        table.get("broken")


def test_a_name_is_given_once_unless_replaced(table: Registry[BlockSelector]) -> None:
    table.register("ours", Ours)
    table.register("ours", Ours)  # the same once more
    for name in ("ours", "moba", "theirs"):
        with pytest.raises(ValueError, match=rf"name '{name}' is taken.*replace=True"):
            table.register(name, XAttention)
    table.register("moba", Ours, replace=True)
    assert table.get("moba") is Ours


def test_what_is_no_such_class_is_refused(table: Registry[BlockSelector]) -> None:
    with pytest.raises(TypeError, match="name must be a str, got 3"):
        table.register(3, Ours)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="name must not be empty"):
        table.register("", Ours)
    for wrong in (dict, Ours()):
        with pytest.raises(TypeError, match=r"selector must be a subclass of .*BlockSelector"):
            table.register("mine", wrong)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="selector BlockSelector does not implement select"):
        table.register("mine", BlockSelector)  # type: ignore[type-abstract]
