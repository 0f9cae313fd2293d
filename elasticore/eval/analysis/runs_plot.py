"""The picture of finished evaluations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from elasticore.drawing import pyplot, save
from elasticore.eval.analysis.plots import COLOURS
from elasticore.eval.analysis.runs import METHOD, SPEEDUP, Point
from elasticore.eval.report import SHOWN

__all__ = ["runs_picture"]

LENGTH = "prompt_tokens"
MARKERS = "osD^vP*X<>"
SAID = {
    **SHOWN,
    "first_token_seconds": "seconds to the first token",
    LENGTH: "tokens of the prompt",
    SPEEDUP: "first token: speed-up over full",
}


def runs_picture(
    points: Sequence[Point], path: str | Path, *, x: str, y: str, title: str = ""
) -> Path:
    """Draw evaluations: a colour for each method, a marker for each task.

    Points are joined over ``"prompt_tokens"``, where tasks that differ in nothing but the length
    in their names are one line, and over ``"method"``, where each task is one.

    Parameters
    ----------
    points
        What to draw.
    path
        Where the picture goes; its suffix is the format.
    x, y
        What they are.
    title
        Text above.
    """
    plt = pyplot()
    from matplotlib.ticker import NullFormatter, StrMethodFormatter

    joined = x in (METHOD, LENGTH)
    lines: dict[tuple[str, str], list[Point]] = {}
    for point in points:
        method = "" if x == METHOD else point.method
        task = re.sub(r"-\d+(?=-|$)", "", point.task, count=1) if x == LENGTH else point.task
        lines.setdefault((method, task), []).append(point)
    methods, tasks = (list(dict.fromkeys(names)) for names in zip(*lines, strict=True))
    colours = dict(zip(tasks if x == METHOD else methods, COLOURS * len(lines), strict=False))
    markers = dict(zip(tasks, MARKERS * len(lines), strict=False))
    longest = max(len(name) for names in lines for name in names)
    figure, axis = plt.subplots(figsize=(5.2 + 0.07 * longest, 3.8), layout="constrained")

    def draw(
        values: tuple[Sequence[Any], Sequence[Any]], colour: str, marker: str, **about: Any
    ) -> Any:
        return axis.plot(*values, color=colour, marker=marker, markersize=5, **about)[0]

    for (method, task), own in lines.items():
        own = sorted(own, key=lambda point: float(point.x)) if x == LENGTH else own
        draw(
            ([point.x for point in own], [point.y for point in own]),
            colours[task if x == METHOD else method],
            markers[task],
            linestyle="-" if joined else "",
        )
    if x == METHOD:
        plt.setp(axis.get_xticklabels(), rotation=30, ha="right", fontsize=8)
    else:
        axis.set_xlabel(SAID.get(x, x))
    if x == LENGTH:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_ylabel(SAID.get(y, y))
    axis.grid(alpha=0.3)
    keys = []
    if x != METHOD:
        keys += [draw(([], []), colours[name], "s", linestyle="", label=name) for name in methods]
    if len(tasks) > 1:
        own_colours = colours if x == METHOD else dict.fromkeys(tasks, "black")
        keys += [
            draw(([], []), own_colours[name], markers[name], linestyle="", label=name)
            for name in tasks
        ]
    if keys:
        figure.legend(handles=keys, loc="outside right upper", fontsize=8, frameon=False)
    if title:
        axis.set_title(title, fontsize=11)
    return save(figure, Path(path), 150)
