"""What choosing per input is worth: routers beside fixed choices of heads, at the same mean Ω_MSR.

python -m recipes.study.compare --config recipes/smollm2/routers.yaml --runs runs/smollm2/study

Sensitive tasks are those of the recipe that want less than every head sparse. What is finished is
kept in ``--runs``; a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor

from elasticore import HeadTable
from elasticore.eval.methods import Method
from elasticore.train import Recipe
from elasticore.train.recipe import parts_of
from recipes.study.about import about
from recipes.study.replay import between_tasks, replayed, unpacked, within_tasks
from recipes.study.runs import Run, Trainings, console, gate_scores
from recipes.study.scores import Figures, Scorer, Static, Way, mean_msr, streaming, window

STEP_SIZES = {"prulong": ("policy_settings.lr=0.1", "policy_settings.multiplier_lr=0.1")}
"""Where a static method needs others than it was published with.

PruLong's is 1, for 1,000 steps. In a few hundred its gates settle before they have learnt.
"""
LAYER = "elastic.policy.by=layer"


@dataclass(frozen=True)
class Size:
    """How much is trained and scored.

    Attributes
    ----------
    seeds
        Of everything that trains.
    targets
        Ω_MSR wanted on sensitive tasks; the recipe's own is the main one.
    samples, length
        Held-out samples per task, and their tokens.
    lengths
        What else the main methods are scored on.
    tables
        Random head tables.
    static
        The static methods that are trained, with the steps and samples of the routers.
    methods
        What needs no training, as ``elasticore eval --method`` takes it.
    """

    seeds: int = 3
    targets: tuple[float, ...] = (0.3, 0.4, 0.6, 0.7)
    samples: int = 200
    length: int = 4096
    lengths: tuple[int, ...] = (2048, 8192)
    tables: int = 20
    static: tuple[str, ...] = ("duo", "prulong")
    methods: tuple[str, ...] = ()


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


class Study:
    """A recipe's routers and what they are compared with.

    Parameters
    ----------
    trainings, scorer, size
        Where runs and scores are, and how many.
    """

    def __init__(self, trainings: Trainings, scorer: Scorer, size: Size) -> None:
        self.trainings, self.scorer, self.size = trainings, scorer, size
        recipe = Recipe.load(trainings.config, trainings.common)
        self.tasks = list(recipe.targets)
        self.sensitive = [task for task in self.tasks if float(recipe.targets[task]) < 1]
        wanted = {float(recipe.targets[task]) for task in self.sensitive}
        if len(wanted) != 1:
            raise ValueError(f"config must have one target for {self.sensitive}, got {wanted}.")
        self.target = wanted.pop()
        self.main = self._group(self.target)
        self.way = parts_of(recipe).way
        self.streams = streaming(self.way)

    @staticmethod
    def _group(target: float) -> str:
        return f"routers-t{target:g}"

    def runs(self) -> list[Run]:
        """The routers to train, the main ones first."""
        found = []
        for target in (self.target, *self.size.targets):
            changes = tuple(f"targets.{task}={target:g}" for task in self.sensitive)
            own = self._group(target)
            found += [Run(own, seed, changes) for seed in range(self.size.seeds)]
            if target == self.target:
                by_layer = [Run("by-layer", s, (*changes, LAYER)) for s in range(self.size.seeds)]
                found += by_layer
        return found

    def static(self, run: Run) -> Iterable[Run]:
        """After main routers: the static methods, for their share of sparse heads."""
        if run.group != self.main:
            return
        share = mean_msr(self._score(self._router(run), self.size.length))
        for policy in self.size.static:
            changes = (f"policy={policy}", f"policy_settings.sparsity={share:.4f}", "calibration=0")
            yield Run(policy, run.seed, (*changes, *STEP_SIZES.get(policy, ())))

    def records(self, trained: Sequence[Run]) -> Iterator[Record]:
        """Score everything, the most important first."""
        size, main = self.size, self.size.length
        every = (main, *size.lengths)
        for name, method in (
            ("full", Method("full", "full")),
            ("streaming", Method("streaming", "streaming", window(self.way))),
        ):
            for length in every:
                yield Record(name, 0, name, length, self._score(method, length))
        routers = [run for run in trained if run.group not in size.static]
        gates = {run: gate_scores(self.trainings.path(run)) for run in trained
                 if run.group in size.static}  # fmt: skip
        shares: list[float] = []
        for run in routers:
            own = self._router(run)
            for length in every if run.group in (self.main, "by-layer") else (main,):
                figures = self._score(own, length)
                yield Record(run.group, run.seed, run.group, length, figures)
            figures = self._score(own, main)
            share = mean_msr(figures)
            tables = {
                static.group: HeadTable.of_scores(scores, share)
                for static, scores in gates.items()
                if static.seed == run.seed
            }
            often = torch.stack([torch.tensor(figures[task]["sparse"]) for task in self.tasks])
            tables["frequency"] = HeadTable.of_scores(1 - often.mean(0), share)
            for name, table in tables.items():
                cut = Static(f"{name}@{run.name}", table, self.streams)
                for length in every if run.group == self.main else (main,):
                    yield Record(name, run.seed, run.group, length, self._score(cut, length))
            if run.group == self.main:
                shares.append(share)
                yield from self._controls(run, figures)
        for text in size.methods:
            free = Method.parse(text)
            yield Record(free.name, 0, free.name, main, self._score(free, main))
        for number in range(size.tables if shares else 0):
            table = HeadTable.random(*self.scorer.shape, fmean(shares), number)
            random = Static(f"random-{number}", table, self.streams)
            yield Record("random", number, self.main, main, self._score(random, main))

    def _controls(self, run: Run, figures: Figures) -> Iterator[Record]:
        """A table per task, and the routers' own decisions given to other samples."""
        length, count, shape = self.size.length, self.size.samples, self.scorer.shape
        of_tasks: Figures = {}
        for task in self.tasks:
            often = 1 - torch.tensor(figures[task]["sparse"])
            table = HeadTable.of_scores(often, figures[task]["msr"])
            way = Static(f"{task}@{run.name}", table, self.streams)
            of_tasks |= self.scorer.score(way, length, count, [task])
        yield Record("per task", run.seed, run.group, length, of_tasks)
        own: dict[str, Tensor] = {
            task: unpacked(figures[task]["decisions"], shape) for task in self.tasks
        }
        samples = {task: self.scorer.samples(task, length, count) for task in self.tasks}
        for name, mix in (("within tasks", within_tasks), ("between tasks", between_tasks)):
            given = mix(own, run.seed)
            way = replayed(f"{name.split()[0]}@{run.name}", samples, given, self.streams)
            yield Record(name, run.seed, run.group, length, self._score(way, length))

    def _router(self, run: Run) -> Method:
        folder = (self.trainings.path(run) / "router").resolve()
        return Method(run.name, "router", {"path": str(folder)})

    def _score(self, way: Way, length: int) -> Figures:
        return self.scorer.score(way, length, self.size.samples, self.tasks)


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
            row[f"msr_{kind}"] = round(fmean(r.figures[t]["msr"] for r in own for t in among), 4)
        row["msr"] = round(fmean(mean_msr(r.figures) for r in own), 4)
        row["esr"] = round(fmean(r.figures[t]["esr"] for r in own for t in tasks), 4)
        routers = [r for r in records if (r.group, r.length) == (beside, length)]
        if routers and group != beside:
            row["ahead"], row["error"] = {}, {}
            for kind, among in kinds.items():
                gaps = [_mean_each(routers, task) - _mean_each(own, task) for task in among]
                squares = [float(gap.var()) / max(1, len(gap) - 1) for gap in gaps]
                row["ahead"][kind] = round(100 * fmean(float(gap.mean()) for gap in gaps), 2)
                row["error"][kind] = round(100 * sum(squares) ** 0.5 / len(gaps), 2)
        rows.append(row)
    return rows


def _mean_each(records: Sequence[Record], task: str) -> Any:
    """The score of every sample, as the mean over the seeds."""
    return np.mean([record.figures[task]["each"] for record in records], 0)


def run(
    config: Annotated[Path, typer.Option(help="Recipe of the routers.")],
    runs: Annotated[Path, typer.Option(help="Where trainings, scores and figures go.")],
    seeds: Annotated[int, typer.Option(min=1, help="Of everything that trains.")] = 3,
    target: Annotated[
        list[float] | None, typer.Option(help="Ω_MSR beside the recipe's; repeatable.")
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples per task.")] = 200,
    length: Annotated[int, typer.Option(help="Their tokens.")] = 4096,
    other: Annotated[
        list[int] | None, typer.Option("--other", help="Other lengths; repeatable.")
    ] = None,
    tables: Annotated[int, typer.Option(min=0, help="Random head tables.")] = 20,
    method: Annotated[
        list[str] | None,
        typer.Option(help="What needs no training, as `elasticore eval` takes it; repeatable."),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of all trainings; repeatable.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Trainings at a time.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch to score.")] = None,
) -> None:
    """Train, score and compare."""
    size = Size(
        seeds=seeds,
        targets=Size.targets if target is None else tuple(target),
        samples=samples,
        length=length,
        lengths=Size.lengths if other is None else tuple(other),
        tables=tables,
        methods=tuple(method or ()),
    )
    for text in size.methods:  # what is wrong is said before anything starts
        Method.parse(text)
    trainings = Trainings.of(runs, config, change or (), parallel=parallel)
    recipe = Recipe.load(config, trainings.common)
    module = recipe.data.get("module", "elasticore.eval.tasks")
    scorer = Scorer(
        runs / "scores",
        backbone=recipe.backbone,
        dtype=recipe.dtype if torch.cuda.is_available() else "float32",
        batch_tokens=batch_tokens,
        module=module,
        workers=len(os.sched_getaffinity(0)) if torch.cuda.is_available() else 0,
    )
    study = Study(trainings, scorer, size)
    trained = trainings.train(study.runs(), study.static)
    records = list(study.records(trained))
    rows = summary(records, study.sensitive)
    report = {
        **about("routers beside fixed choices of heads", "python -m recipes.study.compare"),
        "settings": {**asdict(size), "config": str(config), "changes": list(change or ())},
        "sensitive": study.sensitive,
        "failed": [failure._asdict() for failure in trainings.failures],
        "rows": rows,
        "seconds": {one.name: trainings.seconds(one) for one in trained},
        "tasks": [
            {
                **{k: v for k, v in asdict(r).items() if k != "figures"},
                "scores": {task: round(100 * fmean(f["each"]), 2) for task, f in r.figures.items()},
                "msr": {task: round(f["msr"], 4) for task, f in r.figures.items()},
            }
            for r in records
        ],
    }
    output = runs / "study.json"
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(rows, length)
    console.print(f"Figures: [bold]{output}[/]")
    if trainings.failures:
        raise typer.Exit(1)


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


if __name__ == "__main__":
    typer.run(run)
