"""Elastic attention beside DuoAttention and PruLong on the tiny backbone, over several seeds.

python -m recipes.tiny.baselines --output benchmarks/results/tiny-baselines.json

All three train on the same samples, for as many steps. The static methods get the share of sparse
heads that elastic attention of the same seed has on average over the held-out samples, so every
method spends the same over the whole set. What is finished in ``--runs`` is not done again; the
reproduction (:mod:`recipes.tiny.reproduce`) takes it from there, too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from elasticore.eval.tasks import TASKS
from elasticore.train import BASELINES, Recipe
from recipes.study.about import about
from recipes.study.runs import Trainings
from recipes.study.scores import Scorer
from recipes.tiny.plan import FULL, QUICK, QUICK_RECIPE, elastic, main_target, router, static
from recipes.tiny.summary import summarise


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    runs: Annotated[Path, typer.Option(help="Folder of trainings and scores.")] = Path("runs/tiny"),
    config: Annotated[Path, typer.Option(help="Recipe of the routers.")] = Path(
        "recipes/tiny/routers.yaml"
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="3 by default.")] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Held-out samples per task.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Trainings at a time.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch to score.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Next to no training, to try it.")] = False,
) -> None:
    """Train every method with every seed, score all on the same samples, print the table."""
    size = QUICK if quick else FULL
    given = {"seeds": seeds, "samples": samples}
    size = dataclasses.replace(size, **{k: v for k, v in given.items() if v is not None})
    runs = runs / "quick" if quick else runs
    trainings = Trainings.of(
        runs,
        config,
        QUICK_RECIPE if quick else (),
        max_steps=max_steps,
        parallel=parallel,
    )
    recipe = Recipe.load(config, trainings.common)
    scorer = Scorer(runs / "scores", backbone=recipe.backbone, batch_tokens=batch_tokens)
    trained = trainings.train(
        elastic(main_target(recipe), size.seeds), static(trainings, scorer, size)
    )
    records = [
        {
            "group": run.group if run.group in BASELINES else "elastic",
            "length": size.length,
            "figures": scorer.score(router(trainings, run), size.length, size.samples),
        }
        for run in sorted(trained, key=lambda run: (run.group in BASELINES, run.group, run.seed))
    ]
    found = summarise(records)
    report = {
        **about(
            "tiny model, held-out samples: routers and static patterns, trained alike",
            "python -m recipes.tiny.baselines",
        ),
        "settings": {
            "seeds": size.seeds,
            "samples_per_task": size.samples,
            "length": size.length,
            "max_steps": recipe.max_steps,
            "batch_size": recipe.batch_size,
            "dtype": scorer.dtype,
            "baselines": {run.name: list(run.changes) for run in trained if run.group in BASELINES},
        },
        "results": {method: own[str(size.length)] for method, own in found.items()},
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report["results"])
    if trainings.failures:
        raise typer.Exit(1)


def show(results: dict[str, Any]) -> None:
    """Print one line per task."""
    shown = Table("task", title="Mean ± standard deviation over the seeds")
    for method in results:
        for heading in (method, "Ω_MSR"):
            shown.add_column(heading, justify="right")
    for task in TASKS:
        figures = [own[task][name] for own in results.values() for name in ("score", "msr")]
        cells = [f"{figure['mean']:.3f} ± {figure['spread']:.3f}" for figure in figures]
        shown.add_row(task, *cells)
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
