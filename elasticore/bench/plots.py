"""Pictures of a run: how times grow with the length, and bars beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from elasticore.bench.cases import Case, tokens
from elasticore.bench.e2e import E2eCase
from elasticore.bench.report import Results
from elasticore.bench.run import Record
from elasticore.bench.speedups import speedups
from elasticore.drawing import pyplot, save

__all__ = ["picture"]

_COLOURS = (
    *("#c0392b", "#e59866", "#2e6da4", "#6fa8dc", "#5d8a66", "#9bbf9b"),
    *("#8e7cc3", "#999999", "#7a1f16", "#f5cba7", "#1b3f60", "#d4ac0d"),
)
_DENSE: dict[str, Any] = {"color": "#444444", "linestyle": "--", "linewidth": 1}


def picture(results: Results, suite: str, path: Path) -> Path | None:
    """Draw one suite; of whole models, their speed-up (:func:`speedups`).

    The others have a row of curves and a row of bars per family, a column per share of heads.
    Curves are milliseconds over tokens; a dashed one is the fastest peer that reads everything.
    Bars are the suite's rate: TFLOP/s of useful pairs, GB/s, or milliseconds.

    Parameters
    ----------
    results
        Every case and its records, with ratios.
    path
        Where the picture goes; its suffix is the format.

    Returns
    -------
    Path or None
        ``path``; None if nothing of the suite was measured.
    """
    plt = pyplot()
    measured = [
        (case, [record for record in records if record.ms])
        for case, records in results
        if case.suite == suite and any(record.ms for record in records)
    ]
    if not measured:
        return None
    if suite == E2eCase.suite:
        return speedups(measured, path)
    names = list(dict.fromkeys(r.engine for _, records in measured for r in records))
    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}
    families = {
        family: {
            share: [pair for pair in pairs if pair[0].share == share]
            for share in dict.fromkeys(case.share for case, _ in pairs)
        }
        for family, pairs in (
            (family, list(group)) for family, group in groupby(measured, lambda p: p[0].family)
        )
    }
    columns = max(len(shares) for shares in families.values())
    figure, axes = plt.subplots(
        2 * len(families),
        columns,
        figsize=(1 + 3.4 * columns, 5.2 * len(families) + 0.6),
        squeeze=False,
        layout="constrained",
    )
    for axis in axes.flat:
        axis.set_visible(False)
    for row, (family, shares) in enumerate(families.items()):
        for column, (share, pairs) in enumerate(shares.items()):
            curves, bars = axes[2 * row][column], axes[2 * row + 1][column]
            _curves(curves, pairs, colours)
            _bars(bars, pairs, colours)
            title = family if share is None else f"{family}, {share:.0%} sparse"
            curves.set_title(title, fontsize=9)
    handles: list[Any] = [plt.Rectangle((0, 0), 1, 1, color=c) for c in colours.values()]
    if any(_dense_ms(records) for _, records in measured):
        handles.append(plt.Line2D([], [], **_DENSE))
        names.append("fastest that reads everything")
    figure.legend(handles, names, loc="outside lower center", ncols=min(len(names), 4), fontsize=8)
    return save(figure, path, dpi=110)


def _curves(axis: Any, pairs: Sequence[tuple[Case, list[Record]]], colours: dict[str, str]) -> None:
    """Milliseconds over tokens, both logarithmic."""
    axis.set_visible(True)
    for name, colour in colours.items():
        points = [(case.length, r.ms) for case, rs in pairs for r in rs if r.engine == name]
        if points:
            axis.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=3)
    dense = [(case.length, ms) for case, rs in pairs if (ms := _dense_ms(rs))]
    if dense:
        axis.plot(*zip(*dense, strict=True), **_DENSE)
    lengths = sorted({case.length for case, _ in pairs})
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(lengths, [tokens(length) for length in lengths], fontsize=8)
    axis.set_ylabel("ms", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.minorticks_off()
    axis.grid(alpha=0.3)


def _dense_ms(records: Sequence[Record]) -> float | None:
    """Time of the fastest peer that was measured with all heads FULL, from a record's ratios."""
    here = {record.engine for record in records}
    first = records[0]
    outside = [ratio for name, ratio in first.ratios.items() if name not in here]
    return min(outside) * first.ms if outside and first.ms else None


def _bars(axis: Any, pairs: Sequence[tuple[Case, list[Record]]], colours: dict[str, str]) -> None:
    """The suite's rate: a group of bars per length, a bar per engine."""
    axis.set_visible(True)
    unit = pairs[0][0].unit
    for position, (_, records) in enumerate(pairs):
        width = 0.85 / len(records)
        for index, record in enumerate(records):
            height = {"TFLOP/s": record.tflops, "GB/s": record.gb_s}.get(unit, record.ms)
            left = position + (index - len(records) / 2) * width
            axis.bar(left, height or 0, width, align="edge", color=colours[record.engine])
    axis.set_xticks(range(len(pairs)), [tokens(case.length) for case, _ in pairs], fontsize=8)
    axis.set_xlabel("tokens", fontsize=8)
    axis.set_ylabel(unit, fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(axis="y", alpha=0.3)
    axis.set_axisbelow(True)
