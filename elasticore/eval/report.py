"""Finished evaluations side by side, as a table for people, papers and spreadsheets."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticore.eval.evaluate import METRICS, SETTINGS

__all__ = ["FORMATS", "Report", "read_report"]

FORMATS = ("csv", "markdown", "latex")
COSTS = {"msr": "Ω_MSR", "esr": "Ω_ESR", "first_token_seconds": "first token, s"}
_LATEX = {"Ω_MSR": r"$\Omega_\mathrm{MSR}$", "Ω_ESR": r"$\Omega_\mathrm{ESR}$"}


@dataclass(frozen=True)
class Report:
    """A row for each method of each run.

    Attributes
    ----------
    columns
        The headings; the first is the method's.
    rows
        A name and numbers; None where a method was not measured.
    """

    columns: tuple[str, ...]
    rows: tuple[tuple[Any, ...], ...]

    def as_text(self, kind: str) -> str:
        """The table as ``"csv"``, ``"markdown"`` or ``"latex"`` (with booktabs).

        Raises
        ------
        ValueError
            If ``kind`` is another.
        """
        if kind == "csv":
            file = io.StringIO()
            csv.writer(file).writerows([self.columns, *self.rows])
            return file.getvalue()
        cells = [[row[0], *map(number, row[1:])] for row in self.rows]
        if kind == "markdown":
            rule = ["---", *["--:"] * (len(self.columns) - 1)]
            lines = [list(self.columns), rule, *cells]
            return "".join(f"| {' | '.join(line)} |\n" for line in lines)
        if kind == "latex":
            head = [_LATEX.get(name, _escaped(name)) for name in self.columns]
            body = [[_escaped(row[0]), *row[1:]] for row in cells]
            return "\n".join(
                [
                    rf"\begin{{tabular}}{{l{'r' * (len(head) - 1)}}}",
                    r"\toprule",
                    " & ".join(head) + r" \\",
                    r"\midrule",
                    *(" & ".join(line) + r" \\" for line in body),
                    r"\bottomrule",
                    r"\end{tabular}",
                    "",
                ]
            )
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}.")


def number(value: float | None) -> str:
    """As it is shown: four digits, or a dash."""
    return "–" if value is None or value != value else f"{value:.4g}"


def read_report(
    runs: Sequence[str | Path], metric: str = "score", groups_only: bool = False
) -> Report:
    """Read the folders of finished evaluations.

    Parameters
    ----------
    runs
        Folders that :func:`~elasticore.eval.evaluate.evaluate` has written.
    metric
        Which of a task's numbers.
    groups_only
        Leave out the tasks of a group.

    Raises
    ------
    FileNotFoundError
        If a folder is none, or no method of it is finished.
    """
    found: list[tuple[str, dict[str, Any]]] = []
    for run in map(Path, runs):
        if not (run / SETTINGS).is_file():
            raise FileNotFoundError(f"run {run} is no folder of `elasticore eval`.")
        files = sorted(run.glob(f"*/{METRICS}"), key=lambda file: file.stat().st_mtime)
        if not files:
            raise FileNotFoundError(
                f"run {run} has no finished method; start the same `elasticore eval` again to "
                "finish it."
            )
        for file in files:
            name = file.parent.name if len(runs) == 1 else f"{run.name}/{file.parent.name}"
            found.append((name, json.loads(file.read_text(encoding="utf-8"))))
    scores = [{n: one.get(metric) for n, one in data["scores"].items()} for _, data in found]
    names = list(dict.fromkeys(n for one in scores for n in one if one[n] is not None))
    if groups_only:
        tasks = {task for _, data in found for task in data["tasks"]}
        names = [n for n in names if n not in tasks]
    if not names:
        raise ValueError(f"metric {metric!r} is in none of the runs; such as score.")
    rows = [
        (name, *(one.get(column) for column in names), *_costs(data["tasks"]))
        for (name, data), one in zip(found, scores, strict=True)
    ]
    return Report(("method", *names, *COSTS.values()), tuple(rows))


def _costs(tasks: dict[str, dict[str, float | None]]) -> list[float | None]:
    """Means over all samples of all tasks."""
    found: list[float | None] = []
    for name in COSTS:
        known = [(t["samples"], t[name]) for t in tasks.values() if t[name] is not None]
        total = sum(count or 0 for count, _ in known)
        found.append(sum((n or 0) * (v or 0) for n, v in known) / total if total else None)
    return found


def _escaped(text: str) -> str:
    for mark in "_%&#$":
        text = text.replace(mark, f"\\{mark}")
    return text
