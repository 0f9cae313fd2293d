"""Choosing an engine, asking which there are, and adding one."""

from __future__ import annotations

import asyncio
import importlib.metadata
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import elasticore
from elasticore import (
    AttentionRequest,
    HeadMode,
    HeadPlan,
    HybridHeadAttention,
    UnknownBackend,
    UnsupportedRequest,
    Verdict,
    current_backend,
    hybrid_head_attention,
    register_backend,
    use_backend,
)
from elasticore.backends import registry
from elasticore.backends.registry import backends
from elasticore.backends.serial import SerialAttention

pytestmark = pytest.mark.usefixtures("clean_registry")


class Ones(HybridHeadAttention):
    """A backend whose every output is one, to see that it ran."""

    name = "ones"
    lanes = frozenset({HeadMode.FULL})
    devices = ("cpu",)

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        return Verdict(request.head_dim == 16, "head_dim must be 16.")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, **_: Any) -> Tensor:
        return torch.ones_like(q)


class Absent(Ones):
    """A backend whose engine is not installed."""

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(False, "package 'absent' is not installed; pip install absent.")


def call(backend: str | None = None, dim: int = 16) -> Tensor:
    q = torch.zeros(1, 2, 4, dim)
    plan = HeadPlan(torch.zeros(1, 2, dtype=torch.int8))
    return hybrid_head_attention(q, q, q, plan, backend=backend)


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
    registry._entry_points.cache_clear()
    return lambda: len(looked)


# --- use_backend ---------------------------------------------------------------------------------


def test_the_default_is_auto_and_runs_without_any_setup() -> None:
    assert current_backend() == "auto"
    assert torch.equal(call(), torch.zeros(1, 2, 4, 16))


def test_a_call_chooses_from_now_on() -> None:
    register_backend("ones", Ones)
    use_backend("ones")
    assert current_backend() == "ones"
    assert bool((call() == 1).all())
    use_backend("auto")
    assert bool((call() == 0).all())


def test_a_with_block_restores_what_was_there_before() -> None:
    register_backend("ones", Ones)
    use_backend("serial")
    with use_backend("ones"):
        assert current_backend() == "ones"
        with use_backend("auto"):
            assert current_backend() == "auto"
        assert current_backend() == "ones"
    assert current_backend() == "serial"


def test_an_exception_in_the_block_restores_too() -> None:
    with pytest.raises(KeyError), use_backend("serial"):
        raise KeyError
    assert current_backend() == "auto"


def test_a_handle_can_be_used_again() -> None:
    handle = use_backend("serial")
    for _ in range(2):
        with handle:
            assert current_backend() == "serial"
        assert current_backend() == "auto"


def test_the_backend_argument_is_for_one_call() -> None:
    register_backend("ones", Ones)
    with use_backend("serial"):
        assert bool((call("ones") == 1).all())
        assert current_backend() == "serial"
        assert bool((call() == 0).all())


def test_threads_do_not_see_each_others_choice() -> None:
    register_backend("ones", Ones)
    chosen, seen = threading.Barrier(2), {}

    def work(name: str | None) -> None:
        if name is not None:
            use_backend(name)
        chosen.wait(timeout=30)  # both have chosen before either looks
        seen[name] = (current_backend(), float(call().max()))

    use_backend("serial")
    threads = [threading.Thread(target=work, args=(name,)) for name in ("ones", "serial")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert seen == {"ones": ("ones", 1.0), "serial": ("serial", 0.0)}
    assert current_backend() == "serial"


def test_asyncio_tasks_do_not_see_each_others_choice() -> None:
    register_backend("ones", Ones)

    async def work(name: str) -> str:
        use_backend(name)
        await asyncio.sleep(0)  # the other task runs and chooses
        return current_backend()

    async def main() -> list[str]:
        seen = await asyncio.gather(work("ones"), work("serial"))
        return [*seen, current_backend()]

    with use_backend("auto"):
        assert asyncio.run(main()) == ["ones", "serial", "auto"]
        assert current_backend() == "auto"


# --- Names that do not work ----------------------------------------------------------------------


@pytest.mark.parametrize("choose", [use_backend, call])
def test_an_unknown_name_raises_at_once_with_the_names_there_are(
    choose: Callable[[str], object],
) -> None:
    register_backend("ones", Ones)
    register_backend("absent", Absent)
    with pytest.raises(UnknownBackend, match=r"'tritn' is unknown.*auto,.*serial.*ones") as caught:
        choose("tritn")
    assert isinstance(caught.value, ValueError)
    assert "absent" not in str(caught.value), "only what can be used here"
    assert current_backend() == "auto"


@pytest.mark.parametrize("choose", [use_backend, call])
def test_an_unavailable_backend_raises_at_once_with_its_reason(
    choose: Callable[[str], object],
) -> None:
    register_backend("absent", Absent)
    with pytest.raises(UnsupportedRequest, match=r"pip install absent\. Available: auto, .*serial"):
        choose("absent")
    assert current_backend() == "auto"


@pytest.mark.parametrize("name", [None, 3, b"serial", SerialAttention])
def test_a_name_is_a_string(name: Any) -> None:
    with pytest.raises(TypeError, match="backend must be a name"):
        use_backend(name)
    assert current_backend() == "auto"


def test_a_chosen_backend_never_falls_back() -> None:
    register_backend("ones", Ones)
    with pytest.raises(UnsupportedRequest, match=r"'ones' cannot do this call: head_dim must be"):
        call("ones", dim=32)
    with use_backend("ones"), pytest.raises(UnsupportedRequest, match="head_dim must be 16"):
        call(dim=32)
    assert bool((call(dim=32) == 0).all()), "auto finds another"


def test_auto_refuses_with_everybodys_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: SerialAttention, request: AttentionRequest) -> Verdict:
        return Verdict(False, "not today.")

    monkeypatch.setattr(SerialAttention, "supports", refuse)
    register_backend("ones", Ones)
    register_backend("absent", Absent)
    with pytest.raises(UnsupportedRequest, match="no backend can do this call") as caught:
        call(dim=32)
    message = str(caught.value)
    for reason in ("serial: not today.", "ones: head_dim must be 16.", "absent: package 'absent'"):
        assert reason in message
    assert bool((call() == 1).all()), "the next call is tried afresh"


# --- register_backend ----------------------------------------------------------------------------


class Unfinished(HybridHeadAttention):
    name = "unfinished"


@pytest.mark.parametrize(
    ("name", "backend", "error", "message"),
    [
        (3, Ones, TypeError, "name must be a str"),
        ("", Ones, ValueError, "name must be neither empty"),
        ("auto", Ones, ValueError, "name must be neither empty nor 'auto'"),
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
    before = [info.name for info in backends()]
    with pytest.raises(error, match=message):
        register_backend(name, backend)
    assert [info.name for info in backends()] == before


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
    assert "plugin" in [info.name for info in backends()]
    with use_backend("plugin"):
        assert bool((call() == 1).all())
    with pytest.raises(ValueError, match="'plugin' is taken"):
        register_backend("plugin", Ones)


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
    backends()
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
        (not_a_backend, "is no subclass of elasticore.HybridHeadAttention"),
        (lambda: Crashing, "OSError: driver too old"),
        (lambda: Vague, "TypeError"),
    ],
)
def test_a_broken_plugin_is_reported_and_breaks_nothing(
    monkeypatch: pytest.MonkeyPatch, load: Callable[[], object], reason: str
) -> None:
    entry_points(monkeypatch, plugin=load)
    (info,) = (info for info in backends() if info.name == "plugin")
    assert not info.available
    assert reason in info.reason
    assert reason in repr(backends())
    with pytest.raises(UnsupportedRequest, match="'plugin' is not available here"):
        use_backend("plugin")
    with pytest.raises(UnknownBackend):
        use_backend("nobody")
    assert bool((call() == 0).all())
    assert current_backend() == "auto"


# --- backends() ----------------------------------------------------------------------------------


def test_the_package_of_the_engines_is_the_table_too() -> None:
    # The submodule of the same name is an attribute of elasticore from its first import on.
    assert elasticore.backends() == backends()
    assert elasticore.backends.registry is registry


def test_backends_say_what_they_are() -> None:
    register_backend("ones", Ones)
    table = {info.name: info for info in backends()}
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
    lines = repr(elasticore.backends()).splitlines()
    assert lines[0].split() == ["backend", "available", "lanes", "devices", "reason"]
    (serial,) = (line for line in lines if line.startswith("serial "))
    (absent,) = (line for line in lines if line.startswith("absent "))
    assert serial.split() == ["serial", "yes", "FULL", "STREAMING", "SELECTED", "cpu", "cuda"]
    assert absent.split()[:2] == ["absent", "no"]
    assert absent.endswith("package 'absent' is not installed; pip install absent.")
    # Columns line up.
    assert serial.index("yes") == absent.index("no") == lines[0].index("available")
