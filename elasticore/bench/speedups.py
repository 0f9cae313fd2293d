"""The picture of the suite ``e2e``: speed-up over full attention (as in Figures 8b and 12b)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elasticore.bench.cases import tokens
from elasticore.bench.e2e import E2eCase
from elasticore.bench.report import Results
from elasticore.bench.run import Record
from elasticore.drawing import pyplot, save

__all__ = ["LAYERS", "Point", "lines", "speedups"]

LAYERS = 32
"""Of the model that the cases have a few layers of."""
FULL = "full attention"
"""The line of the fastest peer."""
_COLOURS = ("#6fa8dc", "#2e6da4", "#1b3f60", "#c0392b", "#8e7cc3", "#5d8a66")


class Point(NamedTuple):
    """One engine at one length.

    Attributes
    ----------
    length
        Tokens.
    speedup
        Time of the fastest peer over the engine's, both as measured.
    seconds
        The engine's time, scaled to :data:`LAYERS` layers.
    """

    length: int
    speedup: float
    seconds: float


def lines(results: Results) -> dict[str, list[Point]]:
    """A line per elastic engine that has sparse heads, by its name, and one for the fastest peer.

    Cases in which no peer was measured are left out.
    """
    found: dict[str, list[Point]] = {}
    for case, records in results:
        if not isinstance(case, E2eCase):
            continue
        peer = min((r for r in records if r.peer and r.ms), key=_ms, default=None)
        if peer is None:
            continue
        rest_ms = peer.details["rest_ms"]
        for record in records:
            if record is peer or (record.ms and record.details.get("msr")):
                scaled = rest_ms + (_ms(record) - rest_ms) * LAYERS / case.layers
                name = FULL if record is peer else record.engine
                point = Point(case.length, _ms(peer) / _ms(record), scaled / 1e3)
                found.setdefault(name, []).append(point)
    return found


def speedups(results: Results, path: Path) -> Path | None:
    """Draw the speed-up over the context length, and the time of a whole model.

    Parameters
    ----------
    results
        Cases of the suite ``e2e``.
    path
        Where the picture goes; its suffix is the format.

    Returns
    -------
    Path or None
        ``path``; None if there is nothing to compare.
    """
    drawn = lines(results)
    full = drawn.pop(FULL, [])
    if not drawn:
        return None
    figure, (ratio, seconds) = pyplot().subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    dashed = {"color": "#444444", "linestyle": "--", "linewidth": 1}
    _draw(ratio, seconds, full, label="unchanged, SDPA's fastest kernel", **dashed)
    for colour, (name, points) in zip(_COLOURS, drawn.items(), strict=False):
        mode, _, share = name.rpartition("-")
        marker = "s" if mode == "xa-ssa" else "o"
        label = f"{mode.upper()}, Ω = {share}"
        _draw(ratio, seconds, points, label=label, color=colour, marker=marker, markersize=4)
    ratio.set_ylabel("speed-up over full attention")
    ratio.set_ylim(bottom=0)
    ratio.legend(fontsize=8)
    seconds.set_ylabel(f"seconds to the first token, scaled to {LAYERS} layers")
    seconds.set_yscale("log")
    for axis in (ratio, seconds):
        axis.set_xscale("log", base=2)
        axis.set_xticks([p.length for p in full], [tokens(p.length) for p in full])
        axis.set_xlabel("context length")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    return save(figure, path, dpi=120)


def _ms(record: Record) -> float:
    assert record.ms is not None
    return record.ms


def _draw(ratio: Any, seconds: Any, points: Sequence[Point], **style: Any) -> None:
    lengths = [point.length for point in points]
    ratio.plot(lengths, [point.speedup for point in points], **style)
    seconds.plot(lengths, [point.seconds for point in points], **style)
