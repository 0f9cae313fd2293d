"""Finished evaluations side by side, as a table for people, papers and spreadsheets."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from elasticore.eval.evaluate import METRICS, SETTINGS

__all__ = ["FORMATS", "Report", "number", "read_report", "read_runs"]

FORMATS = ("csv", "markdown", "latex")
ALL = "score"
"""The part that all samples of a task belong to."""
SHOWN = {
    "msr": "Ω_MSR",
    "esr": "Ω_ESR",
    "esr_last_query": "Ω_ESR, last query",
    "first_token_seconds": "first token, s",
    "tokens_per_second": "tokens/s",
    "peak_gb": "GB",
}
ALWAYS = ("msr", "esr", "first_token_seconds")
"""Costs that every table ends with, as means over all samples."""


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
            head = [_headed(name) for name in self.columns]
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
    runs: Sequence[str | Path],
    metrics: Sequence[str] = (ALL,),
    groups_only: bool = False,
    part: str = ALL,
) -> Report:
    """Read the folders of finished evaluations.

    Parameters
    ----------
    runs
        Folders that :func:`~elasticore.eval.evaluate.evaluate` has written.
    metrics
        Which numbers of every task: ``"score"``, another score such as ``"answered"``, or a cost
        such as ``"msr"`` (:data:`~elasticore.eval.costs.COSTS`).
    groups_only
        Leave out the tasks of a group.
    part
        Which samples: all, or a part with a score of its own, such as ``"8k+"`` or ``"hard"``.

    Raises
    ------
    FileNotFoundError
        If a folder is none, or no method of it is finished.
    ValueError
        If no run has these numbers.
    """
    found = read_runs(runs)
    cells = [_cells(data, metrics, part) for _, data in found]
    names = list(dict.fromkeys(name for one in cells for name in one))
    if groups_only:
        parts = {task for _, data in found for task in data["tasks"] if task in data["in_groups"]}
        names = [name for name in names if name[0] not in parts]
    if not names:
        raise ValueError(
            f"metric {', '.join(metrics)} of part {part!r} is in none of the runs; metrics are "
            "such as score, msr and first_token_seconds, parts such as 8k+ and hard."
        )
    rows = [
        (method, *(one.get(name) for name in names), *_means(data, part))
        for (method, data), one in zip(found, cells, strict=True)
    ]
    headings = (
        task if metric == ALL else f"{task} {SHOWN.get(metric, metric)}" for task, metric in names
    )
    return Report(("method", *headings, *(SHOWN[name] for name in ALWAYS)), tuple(rows))


def read_runs(runs: Sequence[str | Path]) -> list[tuple[str, dict[str, Any]]]:
    """Name and ``metrics.json`` of every finished method; the name has its run's if several.

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
            try:
                data = json.loads(file.read_text(encoding="utf-8"))
                if not {"scores", "costs", "tasks", "in_groups"} <= set(data):
                    raise ValueError("it lacks scores or costs")
            except (ValueError, TypeError) as error:
                raise ValueError(
                    f"{file} is damaged: {error}; start the same `elasticore eval` again."
                ) from error
            found.append((name, data))
    return found


def _cells(
    data: dict[str, Any], metrics: Sequence[str], part: str
) -> dict[tuple[str, str], float | None]:
    """The numbers of a method by task, or group, and metric."""
    found: dict[tuple[str, str], float | None] = {}
    for task, scores in data["scores"].items():
        costs = data["costs"][task].get(part, {})
        numbers = {**(scores if part == ALL else {}), **costs, ALL: scores.get(part)}
        found |= {(task, m): numbers[m] for m in metrics if numbers.get(m) is not None}
    return found


def _means(data: dict[str, Any], part: str) -> list[float | None]:
    """What every table ends with, over the samples of all tasks."""
    costs = [data["costs"][task].get(part, {}) for task in data["tasks"]]
    found: list[float | None] = []
    for name in ALWAYS:
        known = [(c["samples"], c[name]) for c in costs if c.get(name) is not None]
        total = sum(samples for samples, _ in known)
        found.append(sum(n * value for n, value in known) / total if total else None)
    return found


def _headed(text: str) -> str:
    return re.sub(r"Ω\\_(\w+)", r"$\\Omega_\\mathrm{\1}$", _escaped(text))


def _escaped(text: str) -> str:
    for mark in "_%&#$":
        text = text.replace(mark, f"\\{mark}")
    return text
