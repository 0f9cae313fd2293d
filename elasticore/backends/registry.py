"""Which engines there are, and how another one joins."""

from __future__ import annotations

from typing import NamedTuple

from elasticore.attention import HybridHeadAttention, Verdict
from elasticore.patterns import HeadMode
from elasticore.registry import Registry

__all__ = ["AUTO", "BACKENDS", "BackendInfo", "BackendTable", "list_backends", "register_backend"]

AUTO = "auto"
"""The name that no backend can have: it chooses one."""

BACKENDS: Registry[HybridHeadAttention] = Registry(
    "backend",
    HybridHeadAttention,  # type: ignore[type-abstract]
    "elasticore.backends",
    {
        "triton": "elasticore.backends.triton:TritonAttention",
        "flashinfer": "elasticore.backends.flashinfer:FlashInferAttention",
        "flex": "elasticore.backends.flex:FlexAttention",
        "serial": "elasticore.backends.serial:SerialAttention",
    },
)
"""Every backend. Ours come first, in the default order, which decides where no times are known; so
without an estimate of their own those that were registered run only if they are named."""

changes = 0
"""Counts up when other backends may be the right ones: whoever remembers a choice asks again."""

instances: dict[str, HybridHeadAttention] = {}
"""The one instance of each backend that has run."""

_unavailable: dict[str, Verdict] = {}


class BackendInfo(NamedTuple):
    """One line of :func:`list_backends`."""

    name: str
    available: bool
    reason: str
    lanes: tuple[str, ...]
    devices: tuple[str, ...]


class BackendTable(list[BackendInfo]):
    """A list of :class:`BackendInfo` that prints as a table."""

    def __repr__(self) -> str:
        rows = [("backend", "available", "lanes", "devices", "reason")]
        rows += [
            (
                b.name,
                "yes" if b.available else "no",
                " ".join(b.lanes),
                " ".join(b.devices),
                b.reason,
            )
            for b in self
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)
        return "\n".join(lines)


def register_backend(
    name: str, backend: type[HybridHeadAttention], *, replace: bool = False
) -> None:
    """Make a backend known under ``name``.

    A package can do the same without being imported, by an entry point in the group
    ``elasticore.backends``.

    Parameters
    ----------
    name
        What :func:`~elasticore.use_backend` is called with.
    backend
        A subclass of :class:`~elasticore.HybridHeadAttention` whose constructor takes no arguments.
    replace
        Whether a name that is taken is given to the new class.

    Raises
    ------
    TypeError, ValueError
        If the name is no string, taken or reserved, or the class is no backend.
    """
    if name == AUTO:
        raise ValueError(f"name must not be {AUTO!r}, which chooses a backend.")
    BACKENDS.register(name, backend, replace=replace)
    instances.pop(name, None)
    forget()


def list_backends() -> BackendTable:
    """Every known backend: name, whether it is available, why not, lanes and devices.

    All are asked afresh, and ``auto`` then chooses afresh: call it after installing one.
    """
    BACKENDS.refresh()
    forget()
    table = BackendTable()
    for name in BACKENDS.names():
        verdict = ask(name)
        if not verdict.ok:
            instances.pop(name, None)  # it was available before
        try:
            cls = BACKENDS.get(name)
            lanes = tuple(mode.name for mode in HeadMode if mode in cls.lanes)
            devices = tuple(cls.devices)
        except Exception:  # a plugin that cannot be imported: the verdict holds the reason
            lanes, devices = (), ()
        table.append(BackendInfo(name, verdict.ok, verdict.reason, lanes, devices))
    return table


def ask(name: str) -> Verdict:
    """Whether a backend is available now."""
    try:
        # Whoever answers with a plain (ok, reason) is understood too.
        return Verdict(*BACKENDS.get(name).available())
    except Exception as error:  # another package may fail in any way; it must not break ours
        return Verdict(
            False,
            f"its package failed to load ({type(error).__name__}: {error}); reinstall it, or "
            "uninstall it if you do not need it.",
        )


def unavailable(name: str) -> Verdict | None:
    """Why a backend is not available; None if it is. Asked once, until :func:`forget`."""
    if name in instances:
        return None
    if name not in _unavailable and not (verdict := ask(name)).ok:
        _unavailable[name] = verdict
    return _unavailable.get(name)


def instance(name: str) -> HybridHeadAttention:
    """The one instance of a backend."""
    if name not in instances:
        instances[name] = BACKENDS.get(name)()
    return instances[name]


def forget() -> None:
    """Let everybody ask and choose again."""
    global changes
    changes += 1
    _unavailable.clear()
