"""How the sampling temperature falls over a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from typing import ClassVar, Literal

__all__ = [
    "TEMPERATURE_SCHEDULES",
    "CosineTemperature",
    "ExponentialTemperature",
    "temperature_schedule",
]


@dataclass(frozen=True)
class CosineTemperature:
    """Half a cosine from ``start`` to ``end`` over the first part of the run, then ``end``.

    ``τ(step) = end + (start - end) * (1 + cos(π step / n)) / 2`` for ``step < n``, with
    ``n = ceil(fraction * max_steps)``. The defaults are those of the official training run.

    Parameters
    ----------
    start, end
        Temperatures, both finite and above 0.
    fraction
        Share of the run, from 0 to 1, over which the temperature falls.
    """

    name: ClassVar[str] = "cosine"
    start: float = 1.5
    end: float = 1.0
    fraction: float = 0.6

    def __post_init__(self) -> None:
        _check_temperatures(self.start, self.end)
        if not 0 <= self.fraction <= 1:
            raise ValueError(f"fraction must be from 0 to 1, got {self.fraction!r}.")

    def __call__(self, step: int, max_steps: int) -> float:
        """Temperature at ``step`` (optimizer steps done so far, from 0) of ``max_steps``."""
        _check_steps(step, max_steps)
        # In decimals, as written: floats would make ceil(0.07 * 100) eight.
        steps = math.ceil(Fraction(str(self.fraction)) * max_steps)
        if step >= steps:
            return self.end
        return self.end + (self.start - self.end) * (1 + math.cos(math.pi * step / steps)) / 2


@dataclass(frozen=True)
class ExponentialTemperature:
    """``max(end, start * exp(-rate * p))`` (Eq. 14).

    Parameters
    ----------
    start, end
        τ_init and τ_min, both finite and above 0. The paper gives no numbers; the defaults are the
        official run's.
    rate
        The decay rate r, at least 0; 0.6 in the paper.
    unit
        What p counts. ``"progress"``: ``step / max_steps``, from 0 to 1; with the defaults the
        temperature reaches ``end`` at ln(1.5) / 0.6 = 67.6 % of the run. ``"step"``: steps, as the
        paper's text has it; at its rate the temperature is at ``end`` from the first step on, so
        it wants a far smaller rate.
    """

    name: ClassVar[str] = "exponential"
    start: float = 1.5
    end: float = 1.0
    rate: float = 0.6
    unit: Literal["progress", "step"] = "progress"

    def __post_init__(self) -> None:
        _check_temperatures(self.start, self.end)
        if not (math.isfinite(self.rate) and self.rate >= 0):
            raise ValueError(f"rate must be finite and at least 0, got {self.rate!r}.")
        if self.unit not in ("progress", "step"):
            raise ValueError(f"unit must be 'progress' or 'step', got {self.unit!r}.")

    def __call__(self, step: int, max_steps: int) -> float:
        """Temperature at ``step`` (optimizer steps done so far, from 0) of ``max_steps``."""
        _check_steps(step, max_steps)
        p = step / max_steps if self.unit == "progress" else step
        return max(self.end, self.start * math.exp(-self.rate * p))


TEMPERATURE_SCHEDULES = {
    schedule.name: schedule for schedule in (CosineTemperature, ExponentialTemperature)
}
"""The schedules by name."""


def temperature_schedule(
    name: str, **options: float | str
) -> CosineTemperature | ExponentialTemperature:
    """Make the schedule called ``name``, ``"cosine"`` or ``"exponential"``.

    ``temperature_schedule(s.name, **dataclasses.asdict(s)) == s``, so a name and a JSON object
    describe a schedule.

    Raises
    ------
    ValueError
        On an unknown name.
    TypeError
        On an option that the schedule does not have.
    """
    if name not in TEMPERATURE_SCHEDULES:
        raise ValueError(f"name must be one of {sorted(TEMPERATURE_SCHEDULES)}, got {name!r}.")
    return TEMPERATURE_SCHEDULES[name](**options)  # type: ignore[arg-type]


def _check_temperatures(start: float, end: float) -> None:
    for name, value in (("start", start), ("end", end)):
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{name} must be finite and above 0, got {value!r}.")
    if start < end:
        raise ValueError(f"start must be at least end, got start={start!r} and end={end!r}.")


def _check_steps(step: int, max_steps: int) -> None:
    if max_steps < 1:
        raise ValueError(f"max_steps must be at least 1, got {max_steps!r}.")
    if step < 0:
        raise ValueError(f"step must be at least 0, got {step!r}.")
