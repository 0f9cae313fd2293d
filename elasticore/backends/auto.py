"""How ``auto`` decides between backends that can all do a call, and how it says why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from elasticore.attention import HybridHeadAttention

__all__ = ["Choice", "fastest", "reason"]


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
