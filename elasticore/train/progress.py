"""A progress bar with the figures that matter while routers train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text
from transformers import TrainerCallback

__all__ = ["Progress"]


class _Bar(Bar):
    """A bar with a line of text below it, which may be long."""

    figures = ""

    def get_renderables(self) -> Iterator[RenderableType]:
        yield from super().get_renderables()
        yield Text(self.figures)


class Progress(TrainerCallback):
    """Step, time, loss, Ω_MSR per task, entropy and speed; at the end it stays on the screen.

    λ and τ change slowly or as planned; they are in the log. Where standard error is no terminal,
    as in a job's log file, every log is a line.

    Parameters
    ----------
    tasks
        The objective's task names.
    """

    def __init__(self, tasks: Sequence[str]) -> None:
        self.tasks = tuple(tasks)
        self.bar: _Bar | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the bar."""
        if not state.is_world_process_zero:
            return
        self.console = Console(stderr=True)
        self.bar = _Bar(
            TextColumn("training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self.bar.start()
        self.line = self.bar.add_task("", total=state.max_steps)
        self.bar.update(self.line, completed=state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        if self.bar is not None:
            self.bar.update(self.line, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the latest figures."""
        if self.bar is not None and logs and "penalty" in logs:
            self.bar.figures = self._figures(logs)
            if self.bar.disable:
                step = f"step {state.global_step}/{state.max_steps}"
                self.console.print(Text(f"{step}  {self.bar.figures}"), soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar."""
        if self.bar is not None:
            self.bar.stop()

    def _figures(self, logs: Mapping[str, float]) -> str:
        shares = " ".join(f"{t} {logs[f'msr/{t}']:.2f}" for t in self.tasks if f"msr/{t}" in logs)
        figures = f"loss {logs['loss'] - logs['penalty']:.3f}  Ω {shares}"
        if "entropy" in logs:
            figures += f"  entropy {logs['entropy']:.2f}"
        figures += f"  {logs['tokens_per_second']:,.0f} tokens/s"
        if "peak_memory_gb" in logs:
            figures += f"  {logs['peak_memory_gb']:.1f} GB"
        return figures
