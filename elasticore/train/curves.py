"""The log of a run, read back: finished, interrupted, or still going."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from elasticore.train.checkpoints import checkpoints

__all__ = [
    "Curves",
    "ending",
    "mean_and_spread",
    "read_curves",
    "smooth",
    "to_json",
    "write_csv",
]

Floats = npt.NDArray[np.float64]

HISTORY, STATE = "history.json", "trainer_state.json"
ACCEPTED = (
    "give the output folder of elasticore train, a checkpoint, its trainer_state.json, a "
    "history.json, or what elasticore plot training --json printed"
)


@dataclass(frozen=True)
class Curves:
    """What one run has logged.

    Attributes
    ----------
    name
        Of the run, for people.
    entries
        One per log, in order of their ``step``; figures by name, ``None`` where not finite.
    targets
        Ω_MSR wanted, ``(low, high)`` per task; empty where not known.
    max_steps
        How long the run was to be; None where not known.
    """

    name: str
    entries: tuple[Mapping[str, Any], ...]
    targets: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    max_steps: int | None = None

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks that occur, in the order of the targets where those are known."""
        seen = dict.fromkeys(
            name.partition("/")[2]
            for entry in self.entries
            for name in entry
            if name.startswith(("msr/", "lambda1/"))
        )
        return tuple([t for t in self.targets if t in seen] + sorted(set(seen) - set(self.targets)))

    @property
    def names(self) -> tuple[str, ...]:
        """The figures that occur, ``step`` first."""
        return tuple(dict.fromkeys(["step", *(name for e in self.entries for name in e)]))

    @property
    def last_step(self) -> int:
        """Of the last entry."""
        return int(self.entries[-1]["step"])

    def series(self, figure: str) -> tuple[Floats, Floats]:
        """Steps and values, float64 ``[entries that hold the figure]``."""
        pairs = [(e["step"], e[figure]) for e in self.entries if e.get(figure) is not None]
        table = np.array(pairs, dtype=np.float64).reshape(-1, 2)
        return table[:, 0], table[:, 1]

    def last(self, figure: str) -> float | None:
        """The latest value; None if there is none."""
        _, values = self.series(figure)
        return float(values[-1]) if len(values) else None

    def every(self, n: int) -> Curves:
        """Every ``n``-th entry, and the last."""
        rest = (len(self.entries) - 1) % n
        return Curves(self.name, self.entries[rest::n], self.targets, self.max_steps)


def read_curves(path: str | Path) -> list[Curves]:
    """Read what a run has logged so far.

    Parameters
    ----------
    path
        The output folder of a run: its ``history.json``, which is written at every log, or else its
        newest checkpoint. Or a checkpoint, or one of the files; those of :func:`to_json` may hold
        several runs.

    Raises
    ------
    FileNotFoundError
        If there is no such run.
    ValueError
        If there is nothing logged yet, or a file is something else.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"run {path} does not exist; {ACCEPTED}.")
    file = _log_of(path) if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"run {file} is no JSON ({error}); {ACCEPTED}.") from None
    runs = content.get("runs") if isinstance(content, dict) else None
    if isinstance(runs, list) and all(isinstance(run, dict) for run in runs):
        return [_curves(run, str(run.get("name", path)), file) for run in runs]
    return [_curves(content, str(path), file)]


def _log_of(folder: Path) -> Path:
    """The file with the log of a run: of recipes, which know best, or of the Trainer."""
    if (folder / HISTORY).is_file():
        return folder / HISTORY
    if (folder / STATE).is_file():
        return folder / STATE
    for checkpoint in checkpoints(folder):
        if (checkpoint / STATE).is_file():
            return checkpoint / STATE
    raise ValueError(
        f"run {folder} has no {HISTORY} and no checkpoint yet; wait for its first log, or "
        f"{ACCEPTED}."
    )


def _curves(content: Any, name: str, file: Path) -> Curves:
    """Curves of one run from its entries, or from an object that has them and perhaps settings."""
    settings = content if isinstance(content, dict) else {}
    entries = settings.get("history", settings.get("log_history")) if settings else content
    if not isinstance(entries, list) or not all(
        isinstance(e, dict) and "step" in e for e in entries
    ):
        raise ValueError(f"run {file} is no log of a training run; {ACCEPTED}.")
    logged = [entry for entry in entries if "penalty" in entry]
    if not logged:
        raise ValueError(
            f"run {file} holds no figures of routers yet; a run logs them every logging_steps "
            "steps, and only router training does."
        )
    beside = file.parent / {HISTORY: "recipe.json", STATE: "objective.json"}.get(file.name, "")
    if beside.is_file():
        try:
            settings = json.loads(beside.read_text(encoding="utf-8")) | settings
        except (ValueError, TypeError) as error:
            raise ValueError(
                f"run {beside} is damaged: {error}; remove it to go without."
            ) from None
    return Curves(
        name,
        tuple(
            {
                figure: value if math.isfinite(value) else None
                for figure, value in entry.items()
                if isinstance(value, (int, float))
            }
            for entry in sorted(logged, key=lambda entry: entry["step"])
        ),
        {
            task: (target[0], target[1]) if isinstance(target, list) else (target, target)
            for task, target in settings.get("targets", {}).items()
        },
        settings.get("max_steps"),
    )


def smooth(values: Floats) -> Floats:
    """A moving average with Gaussian weights, as wide as a fortieth of the values.

    It does not lag: as much lies before a value as behind it, except at the ends.
    """
    width = max(len(values) / 40, 0.5)
    reach = int(np.ceil(3 * width))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    inner = slice(reach, reach + len(values))
    return np.convolve(values, weights)[inner] / np.convolve(np.ones_like(values), weights)[inner]


def mean_and_spread(
    runs: Sequence[tuple[Floats, Floats]],
) -> tuple[Floats, Floats, Floats]:
    """Mean and standard deviation of several runs, over the steps that all of them have reached.

    A run that logged at other steps is interpolated.

    Parameters
    ----------
    runs
        Steps and values of each, not empty.

    Returns
    -------
    tuple
        Steps, means and standard deviations (0 for one run), float64 of one length.
    """
    first = max(steps[0] for steps, _ in runs)
    last = min(steps[-1] for steps, _ in runs)
    steps = np.unique(np.concatenate([steps for steps, _ in runs]))
    steps = steps[(steps >= first) & (steps <= last)]
    table = np.stack([np.interp(steps, own, values) for own, values in runs])
    spread = table.std(0, ddof=1) if len(runs) > 1 else np.zeros(len(steps))
    return steps, table.mean(0), spread


def ending(runs: Sequence[Curves]) -> dict[str, tuple[float, float]]:
    """The latest value of every figure: mean and standard deviation over the runs that have it."""
    names = dict.fromkeys(name for run in runs for name in run.names)
    found = {name: [v for run in runs if (v := run.last(name)) is not None] for name in names}
    return {
        name: (float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0)
        for name, values in found.items()
        if values
    }


def to_json(runs: Iterable[Curves]) -> dict[str, Any]:
    """The runs as JSON that :func:`read_curves` reads; figures have six digits."""
    return {
        "runs": [
            {
                "name": run.name,
                "targets": {task: list(bounds) for task, bounds in run.targets.items()},
                "max_steps": run.max_steps,
                "history": [{key: _six(value) for key, value in e.items()} for e in run.entries],
            }
            for run in runs
        ]
    }


def _six(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def write_csv(runs: Iterable[Curves], path: Path) -> None:
    """One line per run and log; a figure that a log lacks is empty."""
    runs = list(runs)
    names = dict.fromkeys(name for run in runs for name in run.names)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.DictWriter(file, ["run", *names])
        lines.writeheader()
        for run in runs:
            lines.writerows({"run": run.name, **entry} for entry in run.entries)
