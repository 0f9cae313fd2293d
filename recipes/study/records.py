"""What a study has scored: a record per way, and rows that compare groups of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any

import numpy as np
from rich.table import Table

from recipes.study.runs import console
from recipes.study.scores import Figures, mean_msr

__all__ = ["FULL", "IN_CHAT", "MAIN", "Record", "label", "show", "summary"]

MAIN = "routers"
"""The group that others are compared with."""
FULL = "full"
"""The group that reads everything."""
IN_CHAT = " in a chat"
"""Ends the name of a group whose prompts end before the start of the answer."""


@dataclass(frozen=True)
class Record:
    """One way, scored.

    Attributes
    ----------
    group, seed
        What it is called without its seed, and that.
    beside
        The group of routers whose mean Ω_MSR it has; its own if it has none to follow.
    length
        Tokens of the samples.
    figures
        As :meth:`Scorer.score` gives them.
    """

    group: str
    seed: int
    beside: str
    length: int
    figures: Figures = field(repr=False)


def summary(records: Sequence[Record], sensitive: Sequence[str]) -> list[dict[str, Any]]:
    """A row per group and length: means over tasks, each counting once, and over seeds.

    ``ahead`` is the routers beside which the group stands minus the group, on sensitive and on
    robust tasks, in percent, and ``error`` the standard error of that: samples are paired, and
    averaged over the seeds.
    """
    rows = []
    groups = dict.fromkeys((r.group, r.beside, r.length) for r in records)
    for group, beside, length in groups:
        own = [r for r in records if (r.group, r.beside, r.length) == (group, beside, length)]
        tasks = list(own[0].figures)
        kinds = {
            "sensitive": [task for task in tasks if task in sensitive],
            "robust": [task for task in tasks if task not in sensitive],
        }
        row: dict[str, Any] = {"group": group, "beside": beside, "length": length}
        row["seeds"] = len(own)
        for kind, among in kinds.items():
            means = [100 * fmean(fmean(r.figures[t]["each"]) for t in among) for r in own]
            row[kind] = round(fmean(means), 2)
            row[f"{kind}_spread"] = round(float(np.std(means)), 2)
            most = FULL + (IN_CHAT if group.endswith(IN_CHAT) else "")
            full = [r for r in records if (r.group, r.length) == (most, length)]
            if full:
                best = 100 * fmean(fmean(full[0].figures[t]["each"]) for t in among)
                row[f"{kind}_of_full"] = round(100 * fmean(means) / best, 1) if best else None
            row[f"msr_{kind}"] = round(fmean(r.figures[t]["msr"] for r in own for t in among), 4)
        row["gap"] = round(row["msr_robust"] - row["msr_sensitive"], 4)
        row["msr"] = round(fmean(mean_msr(r.figures) for r in own), 4)
        row["esr"] = round(fmean(r.figures[t]["esr"] for r in own for t in tasks), 4)
        routers = [r for r in records if (r.group, r.length) == (beside, length)]
        if routers and group != beside:
            row["ahead"], row["error"] = {}, {}
            for kind, among in kinds.items():
                gaps = [_gaps(routers, own, task) for task in among]
                squares = [float(gap.var()) / max(1, len(gap) - 1) for gap in gaps]
                row["ahead"][kind] = round(100 * fmean(float(gap.mean()) for gap in gaps), 2)
                row["error"][kind] = round(100 * sum(squares) ** 0.5 / len(gaps), 2)
        rows.append(row)
    return rows


def label(row: dict[str, Any], length: int) -> str:
    """Of a row among all: its group, and what it has instead of the main share and length."""
    label = str(row["group"])
    if row["beside"] not in (label, MAIN):
        label += f", {row['beside']}"
    return label if row["length"] == length else f"{label}, {row['length']:,} tokens"


def _gaps(routers: Sequence[Record], own: Sequence[Record], task: str) -> Any:
    """How far each sample's score is behind that with routers; means over the seeds."""
    count = min(len(r.figures[task]["each"]) for r in (*routers, *own))
    means = [np.mean([r.figures[task]["each"][:count] for r in one], 0) for one in (routers, own)]
    return means[0] - means[1]


def show(rows: Sequence[dict[str, Any]], length: int) -> None:
    """Print the rows of one length."""
    table = Table(title=f"{length:,} tokens; ahead: routers minus it, ± standard error")
    headings = ("", "beside", "sensitive", "robust", "Ω sensitive", "Ω robust", "Ω", "ahead")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right")
    for row in (row for row in rows if row["length"] == length):
        ahead = ""
        if "ahead" in row:
            ahead = f"{row['ahead']['sensitive']:+.1f} ± {row['error']['sensitive']:.1f}"
        ratios = (f"{row[name]:.2f}" for name in ("msr_sensitive", "msr_robust", "msr"))
        scores = (f"{row[name]:.1f}" for name in ("sensitive", "robust"))
        beside = row["beside"] if row["beside"] != row["group"] else ""
        table.add_row(row["group"], beside, *scores, *ratios, ahead)
    console.print(table)
