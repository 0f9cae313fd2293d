"""Which engines there are, and adding one."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

import pytest

from elasticore import (
    AttentionRequest,
    HybridHeadAttention,
    UnknownBackend,
    UnsupportedRequest,
    Verdict,
    current_backend,
    list_backends,
    register_backend,
    use_backend,
)
from elasticore.backends.registry import BACKENDS
from elasticore.backends.serial import SerialAttention
from tests.toys import Absent, Ones, call

pytestmark = pytest.mark.usefixtures("clean_registry")


def entry_points(
    monkeypatch: pytest.MonkeyPatch, **plugins: Callable[[], object]
) -> Callable[[], int]:
    """Pretend that packages with these entry points are installed; returns how often we looked."""

    class Point(importlib.metadata.EntryPoint):
        def load(self) -> object:
            return plugins[self.name]()

    looked = []

    def installed(*, group: str) -> list[importlib.metadata.EntryPoint]:
        looked.append(group)
        assert group == "elasticore.backends"
        return [Point(name, "somewhere:Something", group) for name in plugins]

    monkeypatch.setattr(importlib.metadata, "entry_points", installed)
    BACKENDS.refresh()
    return lambda: len(looked)


# --- register_backend ----------------------------------------------------------------------------


class Unfinished(HybridHeadAttention):
    name = "unfinished"


@pytest.mark.parametrize(
    ("name", "backend", "error", "message"),
    [
        (3, Ones, TypeError, "name must be a str"),
        ("", Ones, ValueError, "name must not be empty"),
        ("auto", Ones, ValueError, "name must not be 'auto'"),
        ("serial", Ones, ValueError, "name 'serial' is taken"),
        ("mine", Ones(), TypeError, "backend must be a subclass"),
        ("mine", dict, TypeError, "backend must be a subclass"),
        ("mine", None, TypeError, "backend must be a subclass"),
        (
            "mine",
            Unfinished,
            TypeError,
            "backend Unfinished does not implement attend, available, supports",
        ),
    ],
)
def test_what_is_no_backend_is_not_registered(
    name: Any, backend: Any, error: type[Exception], message: str
) -> None:
    before = [info.name for info in list_backends()]
    with pytest.raises(error, match=message):
        register_backend(name, backend)
    assert [info.name for info in list_backends()] == before


def test_a_taken_name_is_replaced_only_when_asked() -> None:
    register_backend("mine", Absent)
    with pytest.raises(ValueError, match=r"'mine' is taken.*replace=True"):
        register_backend("mine", Ones)
    with pytest.raises(UnsupportedRequest):
        call("mine")
    register_backend("mine", Ones, replace=True)
    assert bool((call("mine") == 1).all())
    # A class that has already run is replaced too.
    register_backend("mine", SerialAttention, replace=True)
    assert bool((call("mine") == 0).all())


def test_plain_tuples_are_verdicts() -> None:
    class Tuples(Ones):
        @classmethod
        def available(cls) -> Any:
            return True, ""

        def supports(self, request: AttentionRequest) -> Any:
            return False, "not today."

    register_backend("tuples", Tuples)
    with pytest.raises(UnsupportedRequest, match="not today"):
        call("tuples")


# --- Entry points --------------------------------------------------------------------------------


def test_an_entry_point_is_a_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    entry_points(monkeypatch, plugin=lambda: Ones)
    assert "plugin" in [info.name for info in list_backends()]
    with use_backend("plugin"):
        assert bool((call() == 1).all())
    with pytest.raises(ValueError, match="'plugin' is taken"):
        register_backend("plugin", Absent)


def test_an_entry_point_is_not_loaded_before_it_is_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    loaded = []

    def load() -> object:
        loaded.append(1)
        return Ones

    entry_points(monkeypatch, plugin=load)
    call("serial")
    call()  # auto, too: something before it could do the call
    assert loaded == []
    list_backends()
    assert loaded == [1]


def test_entry_points_are_looked_up_once_not_at_every_attention_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looked = entry_points(monkeypatch)
    for _ in range(3):
        call("serial")
    assert looked() <= 1  # not at all for a backend that ran before


def broken_import() -> object:
    raise ImportError("libcuda.so.1: cannot open shared object file")


def not_a_backend() -> object:
    return dict


class Crashing(Ones):
    @classmethod
    def available(cls) -> Verdict:
        raise OSError("driver too old")


class Vague(Ones):
    @classmethod
    def available(cls) -> Any:
        return True  # no (ok, reason)


@pytest.mark.parametrize(
    ("load", "reason"),
    [
        (broken_import, "ImportError: libcuda.so.1"),
        (not_a_backend, "must be a subclass of elasticore.HybridHeadAttention"),
        (lambda: Crashing, "OSError: driver too old"),
        (lambda: Vague, "TypeError"),
    ],
)
def test_a_broken_plugin_is_reported_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], object], reason: str
) -> None:
    entry_points(monkeypatch, plugin=load)
    (info,) = (info for info in list_backends() if info.name == "plugin")
    assert not info.available
    assert reason in info.reason
    assert reason in repr(list_backends())
    with pytest.raises(UnsupportedRequest, match="'plugin' is not available here"):
        use_backend("plugin")
    with pytest.raises(UnknownBackend):
        use_backend("nobody")
    assert bool((call() == 0).all())
    assert current_backend() == "auto"


# --- list_backends() ------------------------------------------------------------------------------


def test_backends_say_what_they_are() -> None:
    register_backend("ones", Ones)
    table = {info.name: info for info in list_backends()}
    assert table["serial"] == (
        "serial",
        True,
        "",
        ("FULL", "STREAMING", "SELECTED"),
        ("cpu", "cuda"),
    )
    assert table["ones"] == ("ones", True, "", ("FULL",), ("cpu",))


def test_backends_print_as_a_table_with_reasons() -> None:
    register_backend("absent", Absent)
    lines = repr(list_backends()).splitlines()
    assert lines[0].split() == ["backend", "available", "lanes", "devices", "reason"]
    (serial,) = (line for line in lines if line.startswith("serial "))
    (absent,) = (line for line in lines if line.startswith("absent "))
    assert serial.split() == ["serial", "yes", "FULL", "STREAMING", "SELECTED", "cpu", "cuda"]
    assert absent.split()[:2] == ["absent", "no"]
    assert absent.endswith("package 'absent' is not installed; pip install absent.")
    # Columns line up.
    assert serial.index("yes") == absent.index("no") == lines[0].index("available")
