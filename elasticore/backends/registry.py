"""Which engines there are, which of them runs, and how another one joins."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar, Token
from dataclasses import dataclass, field
from types import TracebackType
from typing import NamedTuple

from elasticore.attention import AttentionRequest, HybridHeadAttention, Verdict, require
from elasticore.backends import costs
from elasticore.backends.auto import Choice, fastest, reason
from elasticore.errors import UnknownBackend, UnsupportedRequest
from elasticore.plan import HeadMode

__all__ = ["BackendInfo", "backends", "current_backend", "register_backend", "use_backend"]

AUTO = "auto"
ENTRY_POINTS = "elasticore.backends"

# Built-in backends by the place of their class: none is imported before it is asked for. This is
# the default order, which decides where no times are known; those that were registered follow, so
# without an estimate of their own they run only if they are named.
_BUILT_IN = {
    "triton": "elasticore.backends.triton:TritonAttention",
    "flashinfer": "elasticore.backends.flashinfer:FlashInferAttention",
    "flex": "elasticore.backends.flex:FlexAttention",
    "serial": "elasticore.backends.serial:SerialAttention",
}

REMEMBERED = 4096
"""Requests whose choice ``auto`` remembers; a decoding step is a new one, as its keys grow."""

_registered: dict[str, type[HybridHeadAttention]] = {}
_instances: dict[str, HybridHeadAttention] = {}
# What ``auto`` remembers, until the backends are asked afresh or another one is registered.
_chosen: dict[AttentionRequest, Choice] = {}
_unavailable: dict[str, Verdict] = {}
_default: ContextVar[str] = ContextVar("elasticore_backend", default=AUTO)


class BackendInfo(NamedTuple):
    """One line of :func:`backends`."""

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
        What :func:`use_backend` is called with.
    backend
        A subclass of :class:`HybridHeadAttention` whose constructor takes no arguments.
    replace
        Whether a name that is taken is given to the new class.

    Raises
    ------
    TypeError, ValueError
        If the name is no string, taken or reserved, or the class is no backend.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a str, got {name!r}.")
    if not name or name == AUTO:
        raise ValueError(f"name must be neither empty nor {AUTO!r}, got {name!r}.")
    if not (isinstance(backend, type) and issubclass(backend, HybridHeadAttention)):
        raise TypeError(
            f"backend must be a subclass of elasticore.HybridHeadAttention, got {backend!r}."
        )
    if getattr(backend, "__abstractmethods__", None):
        missing = ", ".join(sorted(backend.__abstractmethods__))
        raise TypeError(f"backend {backend.__name__} does not implement {missing}.")
    if not replace and name in _names():
        raise ValueError(f"name {name!r} is taken; choose another or pass replace=True.")
    _registered[name] = backend
    _instances.pop(name, None)
    _forget()


@dataclass
class _Selection:
    """The handle of :func:`use_backend`; leaving it as a context manager restores the choice."""

    name: str
    _token: Token[str] | None = field(default=None, repr=False)

    def __enter__(self) -> _Selection:
        if self._token is None:  # used before: choose again
            self._token = _default.set(self.name)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._token is not None:
            _default.reset(self._token)
            self._token = None


def use_backend(name: str) -> _Selection:
    """Run attention on the backend ``name`` from now on, or inside a ``with`` block.

    The choice belongs to the current context (:mod:`contextvars`): threads and asyncio tasks do
    not see each other's.

    Parameters
    ----------
    name
        A registered backend, or ``"auto"`` for the one that is estimated to be the fastest of those
        that are available and support the call.

    Raises
    ------
    UnknownBackend
        If no backend has that name; the message lists those there are.
    UnsupportedRequest
        If it cannot run on this machine; the message says why and lists what can.

    Examples
    --------
    >>> import elasticore
    >>> with elasticore.use_backend("serial"):
    ...     elasticore.current_backend()
    'serial'
    """
    _check_usable(name)
    return _Selection(name, _default.set(name))


@contextmanager
def using_engine(engine: HybridHeadAttention) -> Iterator[None]:
    """Run attention on an instance that no list shows, inside the ``with`` block.

    For an engine that needs more than its class to be made, such as one that looks at every call
    and hands it on. As with :func:`use_backend`, the choice belongs to the current context.
    """
    name = f"{engine.name}-{id(engine)}"
    _instances[name] = engine
    token = _default.set(name)
    try:
        yield
    finally:
        _default.reset(token)
        del _instances[name]


def current_backend() -> str:
    """The name that :func:`use_backend` set in this context; ``"auto"`` if it was never called."""
    return _default.get()


def backends() -> BackendTable:
    """Every known backend: name, whether it is available, why not, lanes and devices.

    All are asked afresh, and ``auto`` then chooses afresh: call it after installing one.
    """
    _entry_points.cache_clear()
    _forget()
    table = BackendTable()
    for name in _names():
        verdict = _verdict(name)
        if not verdict.ok:
            _instances.pop(name, None)  # it was available before
        try:
            cls = _class(name)
            lanes = tuple(mode.name for mode in HeadMode if mode in cls.lanes)
            devices = tuple(cls.devices)
        except Exception:  # a plugin that cannot be imported: _verdict holds the reason
            lanes, devices = (), ()
        table.append(BackendInfo(name, verdict.ok, verdict.reason, lanes, devices))
    return table


def resolve(name: str | None, request: AttentionRequest) -> HybridHeadAttention:
    """The backend that runs ``request``; see :func:`choose`."""
    return choose(name, request).engine


def choose(name: str | None, request: AttentionRequest) -> Choice:
    """The backend that runs ``request``: ``name``, or the context's choice if None.

    Nothing is read from the device, so which backend runs never depends on which heads are sparse.
    ``"auto"`` asks every backend once per request and remembers the answer.

    Raises
    ------
    UnknownBackend, UnsupportedRequest
        If there is no such backend, or it (with ``"auto"``: every one) cannot do the request.

    Examples
    --------
    >>> from elasticore.backends.typical import example_request
    >>> choose("serial", example_request()).name
    'serial'
    """
    name = _default.get() if name is None else name
    if name == AUTO:
        return _chosen.get(request) or _choose(request)
    backend = _instances.get(name) if isinstance(name, str) else None
    if backend is None:
        _check_usable(name)
        backend = _instance(name)
    require(Verdict(*backend.supports(request)), name)
    return Choice(name, backend)


def _choose(request: AttentionRequest) -> Choice:
    """What ``auto`` takes for a request that it has not seen."""
    estimates: dict[str, float | None] = {}
    refusals = []
    for name in _names():
        if estimates and estimates[fastest(estimates)] is None:
            break  # nobody can take its place: do not even load the others
        verdict = _fits(name, request)
        if verdict.ok:
            estimates[name] = _estimate(name, request)
        else:
            refusals.append(f"{name}: {verdict.reason}")
    if not estimates:
        raise UnsupportedRequest("no backend can do this call: " + "; ".join(refusals))
    best = fastest(estimates)
    choice = Choice(best, _instance(best), reason(best, estimates))
    if len(_chosen) >= REMEMBERED:
        _chosen.clear()
    _chosen[request] = choice
    return choice


def _fits(name: str, request: AttentionRequest) -> Verdict:
    """Whether a backend is available, made for the request's device, and supports it."""
    if name not in _instances:
        if name not in _unavailable and not (verdict := _verdict(name)).ok:
            _unavailable[name] = verdict
        if name in _unavailable:
            return _unavailable[name]
    try:
        backend = _instance(name)
        if request.device.type not in backend.devices:
            # It may still run there when named: Triton's interpreter on a CPU, for one.
            return Verdict(False, f"it is not made for {request.device.type} tensors.")
        return Verdict(*backend.supports(request))
    except Exception as error:
        if name in _BUILT_IN:
            raise
        return Verdict(False, f"it failed to answer ({type(error).__name__}: {error}).")


def _forget() -> None:
    """Let ``auto`` ask and choose again."""
    _chosen.clear()
    _unavailable.clear()


def _estimate(name: str, request: AttentionRequest) -> float | None:
    """Milliseconds by the backend's own word, or by what was measured."""
    try:
        own = _instance(name).cost(request)
    except Exception:  # another package's estimate must not break a call: it has none then
        if name in _BUILT_IN:
            raise
        return None
    return costs.estimate(name, request) if own is None else own


def _check_usable(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"backend must be a name (str), got {name!r}.")
    if name == AUTO:
        return
    if name not in _names():
        raise UnknownBackend(f"backend {name!r} is unknown; there are: {_usable()}.")
    verdict = _verdict(name)
    if not verdict.ok:
        raise UnsupportedRequest(
            f"backend {name!r} is not available here: {verdict.reason} Available: {_usable()}."
        )


def _usable() -> str:
    return ", ".join([AUTO, *(name for name in _names() if _verdict(name).ok)])


@functools.cache  # reading every installed package's metadata takes milliseconds
def _entry_points() -> dict[str, importlib.metadata.EntryPoint]:
    return {entry.name: entry for entry in importlib.metadata.entry_points(group=ENTRY_POINTS)}


def _names() -> list[str]:
    return list(dict.fromkeys([*_BUILT_IN, *_registered, *_entry_points()]))


def _class(name: str) -> type[HybridHeadAttention]:
    if name in _registered:
        return _registered[name]
    if name in _BUILT_IN:
        module, _, attribute = _BUILT_IN[name].partition(":")
        found = getattr(importlib.import_module(module), attribute)
    else:
        found = _entry_points()[name].load()
    if not (isinstance(found, type) and issubclass(found, HybridHeadAttention)):
        raise TypeError(f"{found!r} is no subclass of elasticore.HybridHeadAttention.")
    _registered[name] = found
    return found


def _verdict(name: str) -> Verdict:
    try:
        # Whoever answers with a plain (ok, reason) is understood too.
        return Verdict(*_class(name).available())
    except Exception as error:  # another package may fail in any way; it must not break ours
        return Verdict(
            False,
            f"its package failed to load ({type(error).__name__}: {error}); reinstall it, or "
            "uninstall it if you do not need it.",
        )


def _instance(name: str) -> HybridHeadAttention:
    if name not in _instances:
        _instances[name] = _class(name)()
    return _instances[name]
