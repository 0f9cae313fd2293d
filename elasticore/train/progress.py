"""A progress bar with the figures that matter while routers train."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from transformers import TrainerCallback

__all__ = ["Progress"]


class Progress(TrainerCallback):
    """One line: step, time, loss and Ω_MSR per task; at the end it stays on the screen.

    Parameters
    ----------
    tasks
        The objective's task names.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.bar: Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        if not state.is_world_process_zero:
            return
        self.bar = Bar(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=Console(stderr=True),
        )
        self.bar.start()
        self.line = self.bar.add_task("", total=state.max_steps, figures="")
        self.bar.update(self.line, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.line, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest figures."""
        if self.bar is not None and logs and "penalty" in logs:
            shares = " ".join(
                f"{t} {logs[f'msr/{t}']:.2f}" for t in self.tasks if f"msr/{t}" in logs
            )
            loss = logs["loss"] - logs["penalty"]
            figures = f"loss {loss:.3f}  Ω {shares}"
            if "temperature" in logs:
                figures += f"  τ {logs['temperature']:.2f}"
            self.bar.update(self.line, figures=figures)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()
