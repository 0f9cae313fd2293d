"""The paper's Figure 13: how a training run went."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np

from elasticore.drawing import pyplot, save
from elasticore.train.curves import Curves, Floats, mean_and_spread, smooth

__all__ = ["training_picture"]

# Okabe and Ito's colours, told apart by colour-blind readers; their yellow is too pale for a line.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PLAIN = "#333333"
STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "grid.linewidth": 0.5,
    "lines.linewidth": 1.3,
    "pdf.fonttype": 42,  # text that a publisher can search and replace
    "svg.fonttype": "none",
}
DASH = 4.0

Styles = Mapping[str, Mapping[str, Any]]
Targets = Mapping[str, tuple[float, float]]


def training_picture(runs: Sequence[Curves], path: str | Path) -> Path:
    """Draw losses, Ω_MSR, multipliers, entropy and temperature over the steps of a run.

    Faint points are what was logged; lines are a moving average of it (:func:`smooth`), except
    where nothing is noisy. Dashed lines and bands are targets. Several runs are drawn as their mean
    and its standard deviation. Panels of figures that were not logged are left out.

    Parameters
    ----------
    runs
        One run, or several of the same settings with other seeds.
    path
        Where the picture goes; its suffix is the format.

    Returns
    -------
    Path
        ``path``.

    Raises
    ------
    ValueError
        If there is no run, or runs have different targets for a task.
    ImportError
        If there is no matplotlib.
    """
    plt = pyplot()
    targets = common_targets(runs)
    tasks = list(dict.fromkeys(task for run in runs for task in run.tasks))
    styles = {
        task: {"color": colour, "linestyle": "-" if i < len(COLOURS) else (0, (5, 1))}
        for i, (task, colour) in enumerate(zip(tasks, cycle(COLOURS), strict=False))
    }
    panels = _panels(runs)
    cells = len(panels) + 1  # the last one is for the legend
    columns = cells if cells <= 4 else -(-cells // 2)
    rows = -(-cells // columns)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            rows,
            columns,
            figsize=(1.85 * columns, 0.2 + 1.6 * rows),
            squeeze=False,
            sharex=True,
            layout="constrained",
        )
        for index, (axis, (title, draw)) in enumerate(zip(axes.flat, panels, strict=False)):
            axis.set_title(f"({'abcdefg'[index]}) {title}")
            draw(axis, styles, targets)
            axis.tick_params(labelbottom=True)
            if index >= len(panels) - columns:  # no panel below
                axis.set_xlabel("step")
        axes[0][0].set_xlim(0, max(run.last_step for run in runs) * 1.02)
        for axis in axes.flat[len(panels) :]:
            axis.set_axis_off()
        axes.flat[len(panels)].legend(
            handles=_legend(plt, styles, targets, runs), loc="center left", frameon=False
        )
        return save(figure, Path(path), dpi=220)


def common_targets(runs: Sequence[Curves]) -> dict[str, tuple[float, float]]:
    """The targets of all runs; ``ValueError`` if they differ, or there is no run."""
    if not runs:
        raise ValueError("runs must hold at least one run.")
    targets: dict[str, tuple[float, float]] = {}
    for run in runs:
        for task, bounds in run.targets.items():
            if targets.setdefault(task, bounds) != bounds:
                raise ValueError(
                    f"runs {runs[0].name} and {run.name} have different targets for {task}, "
                    f"{targets[task]} and {bounds}; their mean says nothing, so draw each alone."
                )
    return targets


def _panels(runs: Sequence[Curves]) -> list[tuple[str, Callable[..., None]]]:
    """Title and drawing of each panel for which something was logged."""
    there = {name.partition("/")[0] for run in runs for name in run.names}

    def one(figure: str) -> Callable[..., None]:
        def draw(axis: Any, styles: Styles, targets: Targets) -> None:
            _curve(axis, runs, figure, noisy=True, color=PLAIN)

        return draw

    def per_task(figure: str, noisy: bool) -> Callable[..., None]:
        def draw(axis: Any, styles: Styles, targets: Targets) -> None:
            for task, style in styles.items():
                _curve(axis, runs, f"{figure}/{task}", noisy=noisy, **style)
            if figure == "msr":
                _targets(axis, styles, targets)
                axis.set_ylim(-0.02, 1.04)

        return draw

    def entropy(axis: Any, styles: Styles, targets: Targets) -> None:
        _entropy(axis, runs)

    def temperature(axis: Any, styles: Styles, targets: Targets) -> None:
        _curve(axis, runs, "temperature", noisy=False, color=PLAIN)

    panels = [
        ("lm_loss", "LM loss", one("lm_loss")),
        ("distillation", "Distillation loss", one("distillation")),
        ("penalty", "Regularisation loss", one("penalty")),
        ("msr", "Ω$_{\\mathrm{MSR}}$", per_task("msr", noisy=True)),
        ("entropy", "Entropy (nats)", entropy),
        ("lambda1", "λ$_1$", per_task("lambda1", noisy=False)),
        ("lambda2", "λ$_2$", per_task("lambda2", noisy=False)),
        ("temperature", "Temperature τ", temperature),
    ]
    return [(title, draw) for figure, title, draw in panels if figure in there]


def _curve(axis: Any, runs: Sequence[Curves], figure: str, *, noisy: bool, **style: Any) -> None:
    """The line of a figure: over its points for one run, in its spread for several."""
    series = [found for run in runs if len((found := run.series(figure))[0])]
    if not series:
        return
    steps, mean, spread = mean_and_spread(series)
    line = smooth(mean) if noisy else mean
    if len(series) > 1:
        wide = smooth(spread) if noisy else spread
        axis.fill_between(steps, line - wide, line + wide, color=style["color"], alpha=0.18, lw=0)
    elif noisy:
        axis.plot(steps, mean, ".", color=style["color"], alpha=0.35, markersize=3, mew=0)
    axis.plot(steps, line, **style)


def _targets(axis: Any, styles: Styles, targets: Targets) -> None:
    """A dashed line or a band per target; tasks of one target take turns in its dashes."""
    sharing: dict[tuple[float, float], list[str]] = {}
    for task in styles:
        if task in targets:
            sharing.setdefault(targets[task], []).append(task)
    for (low, high), tasks in sharing.items():
        for place, task in enumerate(tasks):
            colour = styles[task]["color"]
            gap = DASH * max(len(tasks) - 1, 0.7)
            for bound in {low, high}:
                axis.axhline(bound, color=colour, lw=0.9, ls=(-DASH * place, (DASH, gap)))
            if low < high:
                axis.axhspan(low, high, color=colour, alpha=0.08 / len(tasks), lw=0)


def _entropy(axis: Any, runs: Sequence[Curves]) -> None:
    """The mean, for one run in the range of its layers."""
    table = _layers(runs)
    if table is not None:
        steps, layers = table
        axis.fill_between(steps, layers.min(0), layers.max(0), color=PLAIN, alpha=0.15, lw=0)
    _curve(axis, runs, "entropy", noisy=True, color=PLAIN)
    axis.set_ylim(0, 1.04 * math.log(2))


def _layers(runs: Sequence[Curves]) -> tuple[Floats, Floats] | None:
    """Steps and the entropy ``[layers, steps]`` of a single run."""
    names = [name for name in runs[0].names if name.startswith("entropy/")]
    if len(runs) > 1 or not names:
        return None
    series = [runs[0].series(name) for name in names]
    return series[0][0], np.stack([values for _, values in series])


def _legend(plt: Any, styles: Styles, targets: Targets, runs: Sequence[Curves]) -> list[Any]:
    """Tasks, and what dashes, points and areas are."""
    handles = [plt.Line2D([], [], label=task, **style) for task, style in styles.items()]
    if any(task in targets for task in styles):
        dashes = {"color": "#777777", "lw": 0.9, "ls": (0, (DASH, 0.7 * DASH))}
        handles.append(plt.Line2D([], [], label="target", **dashes))
    area = {"color": PLAIN, "alpha": 0.18, "lw": 0}
    if len(runs) > 1:
        area["label"] = f"mean ± standard\ndeviation of {len(runs)} runs"
        handles.append(plt.Rectangle((0, 0), 1, 1, **area))
        return handles
    points = {"color": PLAIN, "alpha": 0.35, "marker": ".", "ls": "", "markersize": 4, "mew": 0}
    handles.append(plt.Line2D([], [], label="as logged", **points))
    if _layers(runs) is not None:
        area["label"] = "lowest to\nhighest layer"
        handles.append(plt.Rectangle((0, 0), 1, 1, **area))
    return handles
