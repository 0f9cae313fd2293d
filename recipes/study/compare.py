"""What choosing per input is worth: routers beside fixed choices of heads, at the same mean Ω_MSR.

python -m recipes.study.compare --config recipes/smollm2/routers.yaml --runs runs/smollm2/study

Sensitive tasks are those of the recipe that want less than every head sparse. What is finished is
kept in ``--runs``; a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Annotated

import torch
import typer
from torch import Tensor

from elasticore import HeadTable
from elasticore.eval.methods import Method
from elasticore.train import Recipe
from elasticore.train.recipe import parts_of
from recipes.study.about import about
from recipes.study.records import FULL, IN_CHAT, MAIN, Record, label, show, summary
from recipes.study.replay import between_tasks, replayed, unpacked, within_tasks
from recipes.study.runs import Run, Trainings, at_once, console, gate_scores
from recipes.study.scores import (
    UNSEEN,
    Cut,
    Figures,
    Scorer,
    Static,
    Way,
    mean_msr,
    streaming,
    window,
)

STEP_SIZES = {"prulong": ("policy_settings.lr=0.1", "policy_settings.multiplier_lr=0.1")}
"""Where a static method needs others than it was published with.

PruLong's is 1, for 1,000 steps. In a few hundred its gates settle before they have learnt.
"""
LAYER = "elastic.policy.by=layer"
BY_LAYER, LONG = "by-layer", "duo-long"
CUT_SAMPLES, TRIES, NEAR = 10, 7, 0.004
ORACLE_SAMPLES, KEPT = 100, 0.99
ORACLE_SHARES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.65, 0.6, 0.55, 0.5, 0.4, 0.3)
TABLE_SAMPLES = 50


@dataclass(frozen=True)
class Size:
    """How much is trained and scored.

    Attributes
    ----------
    seeds
        Of everything that trains.
    shares
        Mean Ω_MSR at which routers and tables are cut, beside the routers' own.
    samples, length
        Held-out samples per task, and their tokens.
    lengths
        What else the main methods are scored on, at the routers' own share.
    tables
        Random head tables.
    static
        The static methods that are trained, with the steps and samples of the routers.
    long
        Steps of one more training of DuoAttention; 0 makes none.
    methods
        What needs no training, as ``elasticore eval --method`` takes it.
    """

    seeds: int = 3
    shares: tuple[float, ...] = (0.5, 0.6, 0.7, 0.9)
    samples: int = 200
    length: int = 4096
    lengths: tuple[int, ...] = (2048, 8192)
    tables: int = 20
    static: tuple[str, ...] = ("duo", "prulong")
    long: int = 2000
    methods: tuple[str, ...] = ()


class Study:
    """A recipe's routers and what they are compared with.

    Parameters
    ----------
    trainings, scorer, size
        Where runs and scores are, and how many.
    """

    def __init__(self, trainings: Trainings, scorer: Scorer, size: Size) -> None:
        self.trainings, self.scorer, self.size = trainings, scorer, size
        self.unseen = scorer.of("train", UNSEEN)
        recipe = Recipe.load(trainings.config, trainings.common)
        self.tasks = list(recipe.targets)
        self.sensitive = [task for task in self.tasks if float(recipe.targets[task]) < 1]
        self.way = parts_of(recipe).way
        self.streams = streaming(self.way)

    def runs(self) -> list[Run]:
        """The routers to train, those by head first."""
        seeds = range(self.size.seeds)
        return [Run(MAIN, seed) for seed in seeds] + [Run(BY_LAYER, s, (LAYER,)) for s in seeds]

    def trained(self) -> list[Run]:
        """Those that are there, finished, and what stands beside them."""
        there = [run for run in self.runs() if self.trainings.done(run)]
        beside = [one for run in there for one in self.static(run) if self.trainings.done(one)]
        return there + beside

    def static(self, run: Run) -> Iterable[Run]:
        """After routers by head: the static methods, for their share of sparse heads."""
        if run.group != MAIN:
            return
        share = mean_msr(self._score(self._router(run), self.size.length))

        def changes(policy: str) -> tuple[str, ...]:
            settings = f"policy_settings.sparsity={share:.4f}"
            return (f"policy={policy}", settings, "calibration=0", *STEP_SIZES.get(policy, ()))

        for policy in self.size.static:
            yield Run(policy, run.seed, changes(policy))
        if self.size.long and run.seed == 0:
            yield Run(LONG, 0, (*changes("duo"), f"max_steps={self.size.long}"))

    def records(self, trained: Sequence[Run]) -> Iterator[Record]:
        """Score everything, part after part."""
        for part in self.parts(trained).values():
            yield from part()

    def parts(self, trained: Sequence[Run]) -> dict[str, Callable[[], Iterator[Record]]]:
        """What is scored, in parts that can be scored side by side, the most important first."""
        routers = [run for run in trained if run.group == MAIN]
        parts = {run.name: partial(self._seed, run, trained) for run in routers}
        return {
            "fixed": self._fixed,
            **parts,
            "random": partial(self._random, routers),
            "oracle": partial(self._oracle, routers, trained),
        }

    def _fixed(self) -> Iterator[Record]:
        """What neither trains nor has seeds."""
        for name, method in (
            (FULL, Method(FULL, "full")),
            ("streaming", Method("streaming", "streaming", window(self.way))),
        ):
            for length in (self.size.length, *self.size.lengths):
                yield Record(name, 0, name, length, self._score(method, length))
        yield from self._in_chat(FULL, 0, Method(FULL, "full"))
        for text in self.size.methods:
            free = Method.parse(text)
            yield Record(free.name, 0, free.name, self.size.length,
                         self._score(free, self.size.length))  # fmt: skip

    def _seed(self, run: Run, trained: Sequence[Run]) -> Iterator[Record]:
        """Routers and what was trained with their seed."""
        size, main = self.size, self.size.length
        own = self._own(run)
        rankings = self._rankings(run, trained)
        layers = next((r for r in trained if (r.group, r.seed) == (BY_LAYER, run.seed)), None)

        def compared(length: int) -> Iterator[Record]:
            figures = self._score(self._router(run), length)
            yield Record(MAIN, run.seed, MAIN, length, figures)
            # At other lengths, too, the share that the routers have there.
            yield from self._beside(run.seed, MAIN, length, figures, rankings)
            if layers:
                cut = self._cut(layers, mean_msr(own))
                yield Record(BY_LAYER, run.seed, MAIN, length, self._score(cut, length))

        yield from compared(main)
        yield from self._controls(run, own)
        group = f"{MAIN}, prompt in full"
        figures = self._score(self._router(run, prefill="full"), main)
        yield Record(group, run.seed, group, main, figures)
        yield from self._in_chat(MAIN, run.seed, self._router(run))
        for length in reversed(size.lengths):
            yield from compared(length)
        for share in size.shares:
            group = f"{MAIN} at {share:g}"
            figures = self._score(self._cut(run, share), main)
            yield Record(group, run.seed, group, main, figures)
            yield from self._beside(run.seed, group, main, figures, rankings)
            if layers:
                cut = self._cut(layers, mean_msr(figures))
                yield Record(BY_LAYER, run.seed, group, main, self._score(cut, main))

    def _in_chat(self, group: str, seed: int, way: Way) -> Iterator[Record]:
        """Where prompts can end before the start of the answer: so."""
        if hasattr(importlib.import_module(self.scorer.module), "as_in_chat"):
            length, group = self.size.length, group + IN_CHAT
            figures = self.scorer.in_chat().score(way, length, self.size.samples, self.tasks)
            yield Record(group, seed, group, length, figures)

    def _own(self, run: Run) -> Figures:
        """Of routers as they were trained."""
        return self._score(self._router(run), self.size.length)

    def _rankings(self, run: Run, trained: Sequence[Run]) -> dict[str, Tensor]:
        """Scores of heads, the higher the more a head is worth keeping full, by who gives them."""
        own = self._own(run)
        often = torch.stack([torch.tensor(own[task]["sparse"]) for task in self.tasks])
        gates = {r.group: gate_scores(self.trainings.path(r)) for r in trained
                 if r.seed == run.seed and r.group not in (MAIN, BY_LAYER)}  # fmt: skip
        return {"frequency": 1 - often.mean(0), **gates}

    def _beside(
        self, seed: int, group: str, length: int, figures: Figures, rankings: dict[str, Tensor]
    ) -> Iterator[Record]:
        """Head tables of the share that ``group`` has."""
        share = mean_msr(figures)
        for name, ranking in rankings.items():
            table = HeadTable.of_scores(ranking, share)
            way = Static(f"{name}-s{seed}@{share:.3f}", table, self.streams)
            yield Record(name, seed, group, length, self._score(way, length))

    def _controls(self, run: Run, figures: Figures) -> Iterator[Record]:
        """A table per task, and the routers' own decisions given to other samples."""
        length, count, shape = self.size.length, self.size.samples, self.scorer.shape
        of_tasks: Figures = {}
        for task in self.tasks:
            often = 1 - torch.tensor(figures[task]["sparse"])
            table = HeadTable.of_scores(often, figures[task]["msr"])
            way = Static(f"{task}@{run.name}", table, self.streams)
            of_tasks |= self.scorer.score(way, length, count, [task])
        yield Record("per task", run.seed, MAIN, length, of_tasks)
        own: dict[str, Tensor] = {
            task: unpacked(figures[task]["decisions"], shape) for task in self.tasks
        }
        samples = {task: self.scorer.samples(task, length, count) for task in self.tasks}
        for name, mix in (("within tasks", within_tasks), ("between tasks", between_tasks)):
            given = mix(own, run.seed)
            way = replayed(f"{name.split()[0]}@{run.name}", samples, given, self.streams)
            yield Record(name, run.seed, MAIN, length, self._score(way, length))

    def _random(self, routers: Sequence[Run]) -> Iterator[Record]:
        count = min(TABLE_SAMPLES, self.size.samples)
        shares = [mean_msr(self._own(run)) for run in routers if self.size.tables]
        for number in range(self.size.tables if shares else 0):
            table = HeadTable.random(*self.scorer.shape, fmean(shares), number)
            way = Static(f"random-{number}", table, self.streams)
            figures = self.scorer.score(way, self.size.length, count, self.tasks)
            yield Record("random", number, MAIN, self.size.length, figures)

    def _oracle(self, routers: Sequence[Run], trained: Sequence[Run]) -> Iterator[Record]:
        """For every task the sparsest table that keeps its score on samples of its own."""
        if not routers:
            return
        own = [self._own(run) for run in routers]
        rankings = [self._rankings(run, trained) for run in routers]
        length, found = self.size.length, {}
        count = min(ORACLE_SAMPLES, self.size.samples)
        names = dict.fromkeys(name for one in rankings for name in one)
        shared = {name: [one[name] for one in rankings if name in one] for name in names}
        full = self.unseen.score(Method(FULL, "full"), length, count, self.tasks)
        for task in self.tasks:
            of_task = [1 - torch.tensor(figures[task]["sparse"]) for figures in own]
            wanted = KEPT * fmean(full[task]["each"])
            best: tuple[float, Tensor] = (0.0, of_task[0])
            for share in ORACLE_SHARES:
                for name, scores in {"own": of_task, **shared}.items():
                    ranking = torch.stack([_ranks(one) for one in scores]).mean(0)
                    way = Static(f"{task}-{name}@{share:g}", HeadTable.of_scores(ranking, share),
                                 self.streams)  # fmt: skip
                    kept = self.unseen.score(way, length, count, [task])[task]["each"]
                    if fmean(kept) >= max(wanted, best[0]):
                        best = fmean(kept), way.table
                if best[0]:
                    break
            if not best[0]:
                best = 1.0, HeadTable(torch.zeros(self.scorer.shape, dtype=torch.bool))
            way = Static(f"{task}@oracle", best[1], self.streams)
            found |= self.scorer.score(way, length, self.size.samples, [task])
        yield Record("oracle", 0, "oracle", length, found)

    def _cut(self, run: Run, share: float) -> Cut:
        """Routers whose mean Ω_MSR on unseen samples is ``share``, found by false position."""
        folder = (self.trainings.path(run) / "router").resolve()
        points: dict[float, float] = {}

        def measured(amount: float) -> float:
            if amount not in points:
                cut = Cut(f"{run.name}{amount:+.4f}", folder, amount)
                count = min(CUT_SAMPLES, self.size.samples)
                found = self.unseen.score(cut, self.size.length, count, self.tasks)
                points[amount] = mean_msr(found)
            return points[amount]

        best = 0.0
        for _ in range(TRIES):
            if abs(measured(best) - share) <= NEAR:
                break
            below = max((a for a, msr in points.items() if msr <= share), default=None)
            above = min((a for a, msr in points.items() if msr > share), default=None)
            if below is None or above is None:
                edge = min(points) if below is None else max(points)
                best = round(edge + (-1 if below is None else 1) * max(1.0, abs(edge)), 4)
                continue
            part = (share - points[below]) / (points[above] - points[below])
            best = round(below + min(0.9, max(0.1, part)) * (above - below), 4)
        best = min(points, key=lambda amount: abs(points[amount] - share))
        return Cut(f"{run.name}@{share:.3f}", folder, best)

    def _router(self, run: Run, **settings: str) -> Method:
        folder = (self.trainings.path(run) / "router").resolve()
        name = "-".join((run.name, *settings, *settings.values()))
        return Method(name, "router", {"path": str(folder), **settings})

    def _score(self, way: Way, length: int) -> Figures:
        return self.scorer.score(way, length, self.size.samples, self.tasks)


def _ranks(scores: Tensor) -> Tensor:
    """Place of every head among all, so that scores of several kinds can be averaged."""
    flat = scores.flatten().double()
    return flat.argsort(stable=True).argsort().double().view_as(scores)


def run(
    config: Annotated[Path, typer.Option(help="Recipe of the routers.")],
    runs: Annotated[Path, typer.Option(help="Where trainings, scores and figures go.")],
    seeds: Annotated[int, typer.Option(min=1, help="Of everything that trains.")] = 3,
    share: Annotated[
        list[float] | None,
        typer.Option(help="Mean Ω_MSR to compare at, beside the routers' own; repeatable."),
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples per task.")] = 200,
    length: Annotated[int, typer.Option(help="Their tokens.")] = 4096,
    other: Annotated[
        list[int] | None, typer.Option("--other", help="Other lengths; repeatable.")
    ] = None,
    tables: Annotated[int, typer.Option(min=0, help="Random head tables.")] = 20,
    long: Annotated[int, typer.Option(min=0, help="Steps of a long DuoAttention.")] = 2000,
    method: Annotated[
        list[str] | None,
        typer.Option(help="What needs no training, as `elasticore eval` takes it; repeatable."),
    ] = None,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE of all trainings; repeatable.")
    ] = None,
    parallel: Annotated[
        int | None, typer.Option(min=1, help="Trainings, and then parts of the scoring, at a time.")
    ] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch to score.")] = None,
    part: Annotated[
        str | None,
        typer.Option(help="Score this part alone, as routers-s0, and report nothing."),
    ] = None,
) -> None:
    """Train, score and compare."""
    size = Size(
        seeds=seeds,
        shares=Size.shares if share is None else tuple(share),
        samples=samples,
        length=length,
        lengths=Size.lengths if other is None else tuple(other),
        tables=tables,
        long=long,
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
    )
    study = Study(trainings, scorer, size)
    if part is not None:
        parts = study.parts(study.trained())
        if part not in parts:
            raise typer.BadParameter(f"no part {part!r}; there are: {', '.join(parts)}.")
        for _ in parts[part]():
            pass
        return
    trained = trainings.train(study.runs(), study.static)
    if trainings.parallel > 1:  # what they score is read from their files below
        again = [sys.executable, "-m", "recipes.study.compare", *sys.argv[1:], "--part"]
        commands = {name: [*again, name] for name in study.parts(trained)}
        at_once(commands, runs / "scores", trainings.parallel)
    records = list(study.records(trained))
    rows = summary(records, study.sensitive)
    report = {
        **about("routers beside fixed choices of heads", "python -m recipes.study.compare"),
        "settings": {**asdict(size), "config": str(config), "changes": list(change or ())},
        "sensitive": study.sensitive,
        "failed": [failure._asdict() for failure in trainings.failures],
        "rows": {label(row, length): row for row in rows},
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


if __name__ == "__main__":
    typer.run(run)
