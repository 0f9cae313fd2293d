"""Finished evaluations as points of a picture: a score over what it costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from elasticore.eval.analysis.rows import Row
from elasticore.eval.costs import COSTS
from elasticore.eval.report import ALL, read_runs

__all__ = ["METHOD", "SPEEDUP", "Point", "read_points"]

METHOD = "method"
"""As ``x``: the methods themselves, in the order of the runs."""
SPEEDUP = "speedup"
"""As ``x`` or ``y``: by how much the first token comes earlier than with the method ``full``."""


@dataclass(frozen=True)
class Point:
    """One method on one task or group.

    Attributes
    ----------
    method
        Its name; with its run's, if there are several runs.
    task
        Task or group.
    x, y
        What was asked for.
    """

    method: str
    task: str
    x: float | str
    y: float

    def row(self, x: str, y: str) -> Row:
        """As a row of a CSV file, by the names of x and y."""
        row: dict[str, str | int | float] = {"method": self.method, "task": self.task}
        return {**row, y: self.y} if x == METHOD else {**row, x: self.x, y: self.y}


def read_points(
    runs: Sequence[str | Path],
    x: str = "esr",
    y: str = ALL,
    *,
    per_task: bool = False,
    tasks: Sequence[str] = (),
) -> list[Point]:
    """Read the folders of finished evaluations.

    Parameters
    ----------
    runs
        Folders that :func:`~elasticore.eval.evaluate.evaluate` has written.
    x, y
        ``"score"`` or another metric of the tasks, a cost (:data:`~elasticore.eval.costs.COSTS`),
        or ``"speedup"``; x also ``"method"``.
    per_task
        A point for each task. Else for each group or task that is part of no other, such as a
        group for each length.
    tasks
        Patterns of tasks and groups to take instead, such as ``"ruler-*"``.

    Returns
    -------
    list of Point
        By method, then by task. What lacks one of the numbers is left out.

    Raises
    ------
    FileNotFoundError
        If a folder is none, or no method of it is finished.
    ValueError
        If there is no point, or x and y are the same.
    """
    if x == y or y == METHOD:
        raise ValueError(f"x and y must differ, and y be a number, got x={x!r} and y={y!r}.")
    points = []
    for run in runs:
        found = read_runs([run])
        full = [data for _, data in found if data["method"]["kind"] == "full"]
        for name, data in found:
            method = name if len(runs) == 1 else f"{Path(run).name}/{name}"
            for task in _chosen(data, per_task, tasks):
                at = method if x == METHOD else _number(data, full, task, x)
                value = _number(data, full, task, y)
                if at is not None and value is not None:
                    points.append(Point(method, task, at, value))
    if not points:
        raise ValueError(
            f"runs have no task with both x={x!r} and y={y!r}; there are the tasks' scores, "
            f"{', '.join(COSTS)}, and {SPEEDUP} where a run has the method full."
        )
    return points


def _chosen(data: dict[str, Any], per_task: bool, patterns: Sequence[str]) -> list[str]:
    """The tasks or groups of one method to show."""
    names = list(data["scores"])
    if patterns:
        return [n for n in names if any(fnmatchcase(n, pattern) for pattern in patterns)]
    if per_task:
        return [n for n in names if n in data["tasks"]]
    return [n for n in names if n not in data["in_groups"]]


def _number(
    data: dict[str, Any], full: Sequence[dict[str, Any]], task: str, name: str
) -> float | None:
    """A score of a task, or what its samples cost."""
    if name == SPEEDUP:
        return _speedup(data, full, task)
    if name in COSTS:
        cost: float | None = data["costs"][task][ALL][name]
        return cost
    score: float | None = data["scores"][task].get(name)
    return score


def _speedup(data: dict[str, Any], full: Sequence[dict[str, Any]], task: str) -> float | None:
    seconds = "first_token_seconds"
    before = [_number(one, (), task, seconds) for one in full if task in one["costs"]]
    own = _number(data, (), task, seconds)
    return before[0] / own if before and before[0] and own else None
