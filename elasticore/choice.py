"""Which backend runs a call: the one that is named, or the one estimated to be the fastest."""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Hashable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import NamedTuple

import torch
from torch import Tensor

from elasticore.attention import AttentionRequest, HybridHeadAttention, Verdict, require
from elasticore.backends import costs, registry
from elasticore.backends.registry import AUTO, BACKENDS
from elasticore.errors import UnknownBackend, UnsupportedRequest
from elasticore.layout import SequenceLayout
from elasticore.pages import Pages
from elasticore.plan import HeadPlan
from elasticore.preconditions import check_call, check_paged

__all__ = ["Choice", "choose", "current_backend", "run", "run_paged", "use_backend", "using_engine"]

REMEMBERED = 4096
"""Requests whose choice ``auto`` remembers; a decoding step is a new one, as its keys grow."""

# What ``auto`` remembers, and of which state of the registry.
_chosen: dict[AttentionRequest, Choice] = {}
_chosen_at = -1

# The backend, layout and scale of dense calls, by all that they follow from.
_prepared: dict[Hashable, tuple[str, SequenceLayout, float]] = {}

_numbers = itertools.count()

# The names that the with blocks around the current code have chosen.
_context: ContextVar[tuple[str, ...]] = ContextVar("elasticore_backend", default=())

# The process-wide choices, the latest last, each with its handle as long as that is held.
_process: list[tuple[str, weakref.ref[_Selection]]] = []
_lock = threading.Lock()


class _Selection:
    """The handle of :func:`use_backend`: as a context manager, it makes the choice the context's.

    Python does not say whether a ``with`` follows, so the call has chosen for the process, and
    entering takes that back.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        with _lock:
            # Who is not held can never enter: what lies before the last such is hidden for good.
            gone = [at for at, (_, handle) in enumerate(_process) if handle() is None]
            del _process[: gone[-1] if gone else 0]
            _process.append((name, weakref.ref(self)))

    def __enter__(self) -> _Selection:
        with _lock:
            _process[:] = [entry for entry in _process if entry[1]() is not self]
        _context.set((*_context.get(), self.name))
        return self

    def __exit__(self, *error: object) -> None:
        _context.set(_context.get()[:-1])


def use_backend(name: str) -> _Selection:
    """Run attention on the backend ``name``: in the whole process, or inside a ``with`` block.

    As a plain call it holds for every thread, those that run already among them, until the next
    one. In a ``with`` statement it holds for the block's context (:mod:`contextvars`), where it
    wins over the process's: other threads and asyncio tasks do not see it, except for tasks that
    are created inside the block.

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
    return _Selection(name)


@contextmanager
def using_engine(engine: HybridHeadAttention) -> Iterator[None]:
    """Run attention on an instance that no list shows, inside the ``with`` block.

    For an engine that needs more than its class to be made, such as one that looks at every call
    and hands it on. The choice belongs to the current context.
    """
    name = f"{engine.name}-{next(_numbers)}"  # no other engine ever has it
    registry.instances[name] = engine
    before = _context.get()
    _context.set((*before, name))
    try:
        yield
    finally:
        _context.set(before)
        del registry.instances[name]


def current_backend() -> str:
    """The name that holds here: of the innermost ``with use_backend(...)``, or of the process.

    ``"auto"`` if :func:`use_backend` was never called.
    """
    if names := _context.get():
        return names[-1]
    chosen = _process[-1:]  # one step, as another thread may take the last one away
    return chosen[0][0] if chosen else AUTO


class Choice(NamedTuple):
    """What runs a call.

    Attributes
    ----------
    name
        The backend's name, as :func:`elasticore.use_backend` takes it.
    engine
        The backend.
    reason
        Why ``auto`` took it; empty where it was named.
    """

    name: str
    engine: HybridHeadAttention
    reason: str = ""


def choose(name: str | None, request: AttentionRequest, *, paged: bool = False) -> Choice:
    """The backend that runs ``request``: ``name``, or :func:`current_backend` if None.

    Nothing is read from the device, so which backend runs never depends on which heads are sparse.
    ``"auto"`` asks every backend once per request and remembers the answer; of those that read
    ``paged`` keys and values it takes the first in the default order.

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
    name = current_backend() if name is None else name
    if name == AUTO:
        return _choose_paged(request) if paged else _choose(request)
    engine = registry.instances.get(name) if isinstance(name, str) else None
    if engine is None:
        _check_usable(name)
        engine = registry.instance(name)
    ask = engine.supports_pages if paged else engine.supports
    require(Verdict(*ask(request)), name)
    return Choice(name, engine)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """Check a call and run it on the backend that is chosen for it.

    See :func:`~elasticore.hybrid_head_attention`. What follows from the forms of the tensors alone
    is remembered, as the layers of a model make the same call one after the other.
    """
    backend = current_backend() if backend is None else backend
    key, known = None, None
    if isinstance(plan, HeadPlan) and all(isinstance(x, Tensor) for x in (q, k, v)):
        key = _key(q, k, v, plan, layout, scale, backend)
        known = None if key is None else _prepared.get(key)
    if known is None:
        layout, scale = check_call(q, k, v, plan, layout, scale)
        known = choose(backend, AttentionRequest.of(q, k, v, plan, layout)).name, layout, scale
        if key is not None:
            if len(_prepared) >= REMEMBERED:
                _prepared.clear()
            _prepared[key] = known
    name, layout, scale = known
    engine = registry.instance(name)
    if not torch.is_autocast_enabled(q.device.type):
        return engine.attend(q, k, v, plan, layout=layout, scale=scale)
    # Autocast would change the dtype of the output and, through the scores, the blocks selected.
    with torch.autocast(q.device.type, enabled=False):
        return engine.attend(q, k, v, plan, layout=layout, scale=scale)


def run_paged(
    q: Tensor,
    pages: Pages,
    plan: HeadPlan,
    layout: SequenceLayout | None,
    scale: float | None,
    backend: str | None,
) -> Tensor:
    """Check a call over pages and run it; see :func:`~elasticore.paged_attention`."""
    layout, scale = check_paged(q, pages, plan, layout, scale)
    request = AttentionRequest.of_pages(q, pages, plan, layout)
    engine = choose(backend, request, paged=True).engine
    with torch.autocast(q.device.type, enabled=False):
        return engine.attend_pages(q, pages, plan, layout=layout, scale=scale)


def _key(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: HeadPlan,
    layout: SequenceLayout | None,
    scale: float | None,
    backend: str,
) -> Hashable | None:
    """All that the check and the choice of a dense call read; None for any other call."""
    if layout is not None and (not isinstance(layout, SequenceLayout) or layout.kind != "dense"):
        return None  # what its tensors hold is checked at every call
    if scale is not None and type(scale) is not float:
        return None
    decisions, gate, gradients = plan.decisions, plan.gate, None
    if torch.is_grad_enabled():
        wanted = gate is not None and gate.requires_grad
        gradients = q.requires_grad, k.requires_grad, v.requires_grad, wanted
    return (
        (q.shape, q.stride(), q.dtype, q.device),
        (k.shape, k.stride(), k.dtype, k.device),
        (v.shape, v.stride(), v.dtype, v.device),
        (decisions.shape, decisions.device, plan.lanes, plan.block_size),
        (scale, gradients, backend, registry.changes),
    )


def fastest(costs: Mapping[str, float | None]) -> str:
    """The backend to take, out of those that can do a call.

    The first one, unless another is known to be faster: a backend takes the place of one before it
    only if both have an estimate and its own is lower.

    Parameters
    ----------
    costs
        Milliseconds by backend, in the default order; None where nobody knows.
    """
    names = iter(costs)
    best = next(names)
    for name in names:
        least, cost = costs[best], costs[name]
        if least is not None and cost is not None and cost < least:
            best = name
    return best


def reason(best: str, costs: Mapping[str, float | None]) -> str:
    """Why ``best`` is the one, in a few words; ``costs`` as for :func:`fastest`."""
    if costs[best] is None:
        return "the first in the default order that can do it; there are no times to compare"
    others = [(name, cost) for name, cost in costs.items() if name != best]
    if not others:
        return "no other backend can do it"
    listed = [f"{name} {'unknown' if cost is None else f'{cost:.2g}'}" for name, cost in others]
    return f"estimated at {costs[best]:.2g} ms; {', '.join(listed)}"


def _choose(request: AttentionRequest) -> Choice:
    """What ``auto`` takes, or took for the same request."""
    global _chosen_at
    if _chosen_at != registry.changes:
        _chosen.clear()
        _chosen_at = registry.changes
    if (known := _chosen.get(request)) is not None:
        return known
    estimates: dict[str, float | None] = {}
    refusals = []
    for name in BACKENDS.names():
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
    choice = Choice(best, registry.instance(best), reason(best, estimates))
    if len(_chosen) >= REMEMBERED:
        _chosen.clear()
    _chosen[request] = choice
    return choice


def _choose_paged(request: AttentionRequest) -> Choice:
    refusals = []
    for name in BACKENDS.names():
        verdict = _fits(name, request, paged=True)
        if verdict.ok:
            first = "the first in the default order that reads pages"
            return Choice(name, registry.instance(name), first)
        refusals.append(f"{name}: {verdict.reason}")
    raise UnsupportedRequest("no backend can do this call: " + "; ".join(refusals))


def _fits(name: str, request: AttentionRequest, paged: bool = False) -> Verdict:
    """Whether a backend is available, made for the request's device, and supports it."""
    if (refused := registry.unavailable(name)) is not None:
        return refused
    try:
        backend = registry.instance(name)
        if request.device.type not in backend.devices:
            # It may still run there when named: Triton's interpreter on a CPU, for one.
            return Verdict(False, f"it is not made for {request.device.type} tensors.")
        ask = backend.supports_pages if paged else backend.supports
        return Verdict(*ask(request))
    except Exception as error:
        if name in BACKENDS.built_in:
            raise
        return Verdict(False, f"it failed to answer ({type(error).__name__}: {error}).")


def _estimate(name: str, request: AttentionRequest) -> float | None:
    """Milliseconds by the backend's own word, or by what was measured."""
    try:
        own = registry.instance(name).cost(request)
    except Exception:  # another package's estimate must not break a call: it has none then
        if name in BACKENDS.built_in:
            raise
        return None
    return costs.estimate(name, request) if own is None else own


def _check_usable(name: object) -> None:
    if not isinstance(name, str):
        raise TypeError(f"backend must be a name (str), got {name!r}.")
    if name == AUTO:
        return
    if name not in BACKENDS.names():
        raise UnknownBackend(f"backend {name!r} is unknown; there are: {_usable()}.")
    if not (verdict := registry.ask(name)).ok:
        raise UnsupportedRequest(
            f"backend {name!r} is not available here: {verdict.reason} Available: {_usable()}."
        )


def _usable() -> str:
    return ", ".join([AUTO, *(name for name in BACKENDS.names() if registry.ask(name).ok)])
