"""How long calls take on each backend, as far as that has been measured.

``costs.json`` holds what ``elasticore bench`` saw, in milliseconds, by the GPU's compute
capability, the kind of call, the backend and the tokens; ``python benchmarks/costs.py`` writes it
from the files in ``benchmarks/results``. Which heads are sparse is known on the device only, so a
figure is the mean over all the shares of sparse heads that were measured.
"""

from __future__ import annotations

import bisect
import functools
import importlib.resources
import json
import math
from collections.abc import Mapping
from typing import TypeAlias

from elasticore.attention import AttentionRequest
from elasticore.machine import capability
from elasticore.patterns import HeadMode

__all__ = ["HEADS", "KV_HEADS", "estimate", "interpolate", "kind"]

HEADS, KV_HEADS = 32, 8
"""Query and KV heads of the calls that were measured, each of one sequence."""

Points: TypeAlias = dict[int, float]
"""Milliseconds by tokens."""


def estimate(backend: str, request: AttentionRequest) -> float | None:
    """Milliseconds that ``request`` takes on ``backend``; None if nothing like it was measured.

    No tensor is read and nothing is run. A request of another batch or other heads is looked up at
    the length of one sequence of ``HEADS`` heads with as much work.
    """
    family, name = capability(request.device), kind(request)
    if family is None or name is None:
        return None
    points = _table().get(family, {}).get(name, {}).get(backend)
    return None if points is None else interpolate(points, _length(request))


def kind(request: AttentionRequest) -> str | None:
    """The measurements that speak for a request, such as ``"prefill-d128"``; None if none may.

    What was measured are calls in 16 bits without gradients, over blocks of 128 tokens. Other calls
    may run on other kernels.
    """
    if request.dtype.itemsize != 2 or request.gradients or request.block_size != 128:
        return None
    selected = HeadMode.SELECTED in request.lanes
    if _decodes(request):
        return None if selected else f"decode-d{request.head_dim}"
    return f"{'selected' if selected else 'prefill'}-d{request.head_dim}"


def interpolate(points: Mapping[int, float], length: float) -> float | None:
    """Milliseconds at ``length``, on straight lines between points in logarithmic scales.

    Below the first point it is that of the first one, as such calls take as long as their launch.
    Beyond the last one it is None.
    """
    lengths = sorted(points)
    place = bisect.bisect_left(lengths, length)
    if place == len(lengths):
        return None
    if place == 0 or lengths[place] == length:
        return points[lengths[place]]
    low, high = lengths[place - 1], lengths[place]
    part = math.log(length / low) / math.log(high / low)
    return math.exp((1 - part) * math.log(points[low]) + part * math.log(points[high]))


def _decodes(request: AttentionRequest) -> bool:
    """Whether every sequence has one query."""
    return request.queries == (request.sequences if request.layout == "packed" else 1)


def _length(request: AttentionRequest) -> float:
    """Tokens of the measured call that does as much work; padding counts as if it were text."""
    sequences, queries, keys = request.sequences, float(request.queries), float(request.keys)
    if request.layout == "packed":
        queries, keys = queries / sequences, keys / sequences
    if _decodes(request):
        return sequences * keys * request.kv_heads / KV_HEADS
    pairs = queries * (keys - queries / 2)
    return math.sqrt(2 * sequences * pairs * request.query_heads / HEADS)


@functools.cache
def _table() -> dict[str, dict[str, dict[str, Points]]]:
    """By capability, kind and backend."""
    text = importlib.resources.files(__package__).joinpath("costs.json").read_text("utf-8")
    return {
        capability: {
            name: {
                backend: {int(length): ms for length, ms in points.items()}
                for backend, points in engines.items()
            }
            for name, engines in kinds.items()
        }
        for capability, kinds in json.loads(text)["milliseconds"].items()
    }
