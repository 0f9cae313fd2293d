"""Trainings: several at once, each a process of its own, resumed where they are.

A small model leaves most of a GPU idle, which waits for launches; so a few trainings share it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors.torch import load_file
from torch import Tensor

from elasticore.train.baselines import GATES
from elasticore.train.curves import HISTORY
from elasticore.train.recipe import Recipe, parts_of

__all__ = ["Failure", "Run", "Trainings", "at_once", "console", "gate_scores"]

console = Console(stderr=True)

ROOT = Path(__file__).resolve().parents[2]
LOG, SECONDS = "log.txt", "seconds.json"
TAIL = 15  # lines of the log that a failure shows
FREE = ("workers",)
"""Settings that say how fast, not what: a finished run with others is the same."""


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes
    ----------
    group
        What it is called without its seed: runs of a group differ in nothing else.
    seed
        Of the routers' start, the data's order and the noise.
    changes
        ``key=value`` each, what differs from the recipe.
    """

    group: str
    seed: int = 0
    changes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of its folder."""
        return f"{self.group}-s{self.seed}"


class Failure(NamedTuple):
    """A training that ended with an error."""

    name: str
    code: int
    log: str


@dataclass
class Trainings:
    """Where runs are, and how they are made.

    Parameters
    ----------
    folder
        Holds a folder per run.
    config
        The recipe that all start from.
    common
        Changes of all runs.
    parallel
        How many train at the same time.
    """

    folder: Path
    config: Path
    common: tuple[str, ...] = ()
    parallel: int = 1
    failures: list[Failure] = field(default_factory=list)
    _started: int = 0

    @classmethod
    def of(
        cls,
        folder: Path,
        config: Path,
        changes: Sequence[str] = (),
        *,
        max_steps: int | None = None,
        parallel: int | None = None,
    ) -> Trainings:
        """With changes that make many short runs cheap: what they save, log and start.

        Parameters
        ----------
        folder, config, changes
            See the class.
        max_steps
            Instead of the recipe's.
        parallel
            See the class; by default four on a GPU, fewer with few cores, and one on a CPU.
        """
        cores = os.cpu_count() or 1
        if parallel is None:
            parallel = max(1, min(4, cores // 4)) if torch.cuda.is_available() else 1
        if max_steps is not None:
            changes = (*changes, f"max_steps={max_steps}")
        recipe = Recipe.load(config, changes)
        common = (
            *changes,
            f"save_steps={max(1, recipe.max_steps // 4)}",
            "keep=1",
            "report_to=[]",
            f"workers={min(recipe.workers, max(1, cores // parallel - 1))}",
        )
        return cls(folder, config, common, parallel)

    def path(self, run: Run) -> Path:
        """The folder of a run."""
        return self.folder / run.name

    def recipe(self, run: Run) -> Recipe:
        """What a run trains."""
        return Recipe.load(self.config, (*self.common, *run.changes), seed=run.seed)

    def done(self, run: Run) -> bool:
        """Whether a run is there, finished.

        Raises
        ------
        ValueError
            If its folder holds one of other settings.
        """
        made = self.path(run) / "recipe.json"
        if not made.is_file():
            return False
        there = json.loads(made.read_text(encoding="utf-8"))
        wanted = json.loads(json.dumps(dataclasses.asdict(self.recipe(run))))
        other = sorted(k for k in wanted.keys() | there if wanted.get(k) != there.get(k))
        if set(other) - set(FREE):
            raise ValueError(
                f"runs: {self.path(run)} was made with other {', '.join(other)}; delete it, or "
                "name another folder."
            )
        return (self.path(run) / "router" / "router.json").is_file()

    def seconds(self, run: Run) -> float:
        """How long a finished run took, startup included; all its parts if it was resumed."""
        return float(json.loads((self.path(run) / SECONDS).read_text(encoding="utf-8")))

    def train(
        self, runs: Sequence[Run], then: Callable[[Run], Iterable[Run]] = lambda run: ()
    ) -> list[Run]:
        """Train what is not done; return the runs that are there now.

        A run that fails is shown with the end of its log and kept in ``failures``; the others go
        on. What is interrupted goes on from its last checkpoint the next time.

        Parameters
        ----------
        runs
            In the order in which they start.
        then
            Asked about every run that is done for those that had to wait for it, which are next.
        """
        for run in runs:  # a setting that is wrong: said before anything starts
            parts_of(self.recipe(run))
            self.done(run)
        waiting, finished = deque(dict.fromkeys(runs)), []  # one that is given twice trains once
        active: dict[Run, _Process] = {}

        def finish(run: Run) -> None:
            finished.append(run)
            waiting.extendleft(reversed(list(then(run))))

        try:
            with _bars() as bars:
                total = bars.add_task("trainings", total=len(waiting))
                while waiting or active:
                    while waiting and len(active) < self.parallel:
                        run = waiting.popleft()
                        if self.done(run):
                            finish(run)
                        else:
                            active[run] = self._start(run, bars)
                    for run, process in list(active.items()):
                        code = process.look(bars)
                        if code is not None:
                            del active[run]
                            if self._ended(run, process, code):
                                finish(run)
                    left = len(waiting) + len(active)
                    bars.update(total, completed=len(finished), total=len(finished) + left)
                    time.sleep(0.1)
        finally:
            for run, process in active.items():
                process.stop()
                self._note(run, process)
        return finished

    def _start(self, run: Run, bars: Progress) -> _Process:
        folder = self.path(run)
        folder.mkdir(parents=True, exist_ok=True)
        changes = [word for change in (*self.common, *run.changes) for word in ("--set", change)]
        command = [
            *(sys.executable, "-m", "elasticore", "train", "--resume", "auto"),
            *("--config", str(self.config.resolve()), "--output", str(folder.resolve())),
            *("--seed", str(run.seed), *changes),
        ]
        threads = max(1, (os.cpu_count() or 1) // self.parallel)
        environment = {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}
        environment |= _one_gpu(self._started)
        self._started += 1
        log = (folder / LOG).open("ab")
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        bar = bars.add_task(run.name, total=self.recipe(run).max_steps)
        return _Process(process, log, folder, bar)

    def _ended(self, run: Run, process: _Process, code: int) -> bool:
        """Say how a run ended; return whether it is done."""
        seconds = self._note(run, process)
        process.log.close()
        if code == 0 and self.done(run):
            console.print(f"{run.name}: trained in {seconds:.0f} s", highlight=False)
            return True
        text = (self.path(run) / LOG).read_text(encoding="utf-8", errors="replace")
        tail = "\n".join(text.splitlines()[-TAIL:])
        self.failures.append(Failure(run.name, code, tail))
        console.print(f"[red]{run.name}: ended with code {code}[/]; its log ends with")
        console.print(tail, markup=False, highlight=False)
        return False

    def _note(self, run: Run, process: _Process) -> float:
        """Add up how long a run has taken."""
        before = self.seconds(run) if (self.path(run) / SECONDS).is_file() else 0.0
        seconds = before + time.perf_counter() - process.since
        (self.path(run) / SECONDS).write_text(json.dumps(round(seconds, 1)), encoding="utf-8")
        return seconds


@dataclass(eq=False)
class _Process:
    """A training under way."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]
    folder: Path
    bar: Any
    since: float = field(default_factory=time.perf_counter)

    def look(self, bars: Progress) -> int | None:
        """Move the bar; the exit code if it has ended."""
        code = self.process.poll()
        bars.update(self.bar, completed=self.step(), visible=code is None)
        return code

    def step(self) -> int:
        """The last one logged."""
        history = self.folder / HISTORY
        entries = json.loads(history.read_text(encoding="utf-8")) if history.is_file() else []
        return int(entries[-1]["step"]) if entries else 0

    def stop(self) -> None:
        """End it, with its workers; its checkpoints stay."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def at_once(commands: Mapping[str, Sequence[str]], folder: Path, parallel: int) -> None:
    """Run commands, ``parallel`` at a time; what one prints goes to ``NAME.log`` in ``folder``.

    One that fails is shown with the end of its log, and the others go on.
    """
    folder.mkdir(parents=True, exist_ok=True)
    waiting, active = deque(commands), {}
    started = 0
    try:
        with _bars() as bars:
            bar = bars.add_task("parts", total=len(commands))
            while waiting or active:
                while waiting and len(active) < parallel:
                    name = waiting.popleft()
                    with (folder / f"{name}.log").open("wb") as log:
                        active[name] = subprocess.Popen(
                            commands[name],
                            cwd=ROOT,
                            env=_one_gpu(started),
                            stdin=subprocess.DEVNULL,
                            stdout=log,
                            stderr=subprocess.STDOUT,
                        )
                    started += 1
                for name, process in list(active.items()):
                    if process.poll() is None:
                        continue
                    del active[name]
                    bars.advance(bar)
                    if process.returncode:
                        text = (folder / f"{name}.log").read_text("utf-8", errors="replace")
                        console.print(f"[red]{name}: ended with code {process.returncode}[/]")
                        console.print("\n".join(text.splitlines()[-TAIL:]), markup=False)
                time.sleep(0.1)
    finally:
        for process in active.values():
            process.terminate()


def _one_gpu(number: int) -> dict[str, str]:
    """The environment of a process that takes one of the GPUs: they take turns."""
    environment = dict(os.environ)
    if torch.cuda.device_count() > 1:
        there = [str(index) for index in range(torch.cuda.device_count())]
        there = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(there)).split(",")
        environment["CUDA_VISIBLE_DEVICES"] = there[number % len(there)]
    return environment


def _bars() -> Progress:
    columns = [TextColumn("{task.description}"), BarColumn(bar_width=20), MofNCompleteColumn()]
    return Progress(*columns, TimeElapsedColumn(), console=console, transient=True)


def gate_scores(run: Path) -> Tensor:
    """What a trained static method ranks heads by, float32 ``[layers, kv_heads]``.

    Raises
    ------
    FileNotFoundError
        If the run has kept no checkpoint.
    """
    # The file alone counts: what a finished run kept beside it to go on from may be gone.
    found = sorted(run.glob(f"checkpoint-*/{GATES}"), key=lambda file: int(file.parent.name[11:]))
    if not found:
        raise FileNotFoundError(f"run {run} has no checkpoint, which holds its gates.")
    gates = load_file(found[-1])
    return torch.stack([gates[name] for name in sorted(gates, key=_layer)])


def _layer(name: str) -> int:
    return int(name.split(".")[1])
