"""What parts tasks: the recipe of the routers with one thing changed at a time.

python -m recipes.smollm2.levers                                  # all; minutes each on a GPU
python -m recipes.smollm2.levers --only uncalibrated --seeds 3

What is finished is kept; a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from elasticore.eval.methods import Method
from elasticore.eval.tasks import Task
from elasticore.train import Recipe
from elasticore.train.recipe import parts_of
from recipes.study.about import about
from recipes.study.runs import Run, Trainings, console
from recipes.study.scores import UNSEEN, Figures, Scorer, value, window

CONFIG = Path("recipes/smollm2/routers.yaml")
SENSITIVE = ("needle", "two-values", "far-sentence", "far-signature")


def _target(share: float) -> tuple[str, ...]:
    return tuple(f"targets.{task}={share:g}" for task in SENSITIVE)


LEVERS: dict[str, tuple[str, ...]] = {
    "recipe": (),
    "boundary-8": ("elastic.policy.boundary=8",),
    "boundary-32": ("elastic.policy.boundary=32",),
    "boundary-64": ("elastic.policy.boundary=64",),
    "boundary-100": ("elastic.policy.boundary=100",),
    "boundary-256": ("elastic.policy.boundary=256",),
    "uncalibrated": ("calibration=0",),
    "cold": ("temperature={name: cosine}",),
    "weaker": ("multiplier_init=[1.0, 2.0]",),
    "stronger": ("multiplier_init=[10.0, 20.0]",),
    "faster": ("router_lr=3e-3",),
    "target-.4": _target(0.4),
    "target-.6": _target(0.6),
    "longer": ("max_steps=400",),
    "chat": ("data.chat=0.5",),
    "paper": ("elastic.policy.boundary=100", "calibration=0", "temperature={name: cosine}"),
}
"""Changes of the recipe, as ``elasticore train --set`` takes them, by what they are called."""


def summary(found: Figures, sensitive: set[str], tasks: dict[str, Task]) -> dict[str, float]:
    """Means over the sensitive and over the robust tasks, each counting once; scores in percent."""
    far = [task for task in found if task in sensitive]
    near = [task for task in found if task not in sensitive]

    def score(among: list[str]) -> float:
        values = [value(task, found[task], tasks) for task in among]
        return round(100 * float(np.mean(values)), 2)

    def msr(among: list[str]) -> float:
        return round(float(np.mean([found[task]["msr"] for task in among])), 4)

    return {
        "sensitive": score(far),
        "robust": score(near),
        "msr_sensitive": msr(far),
        "msr_robust": msr(near),
        "msr": msr(far + near),
        "gap": round(msr(near) - msr(far), 4),
    }


def run(
    only: Annotated[list[str] | None, typer.Option(help="A lever; repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Of each lever.")] = 1,
    samples: Annotated[int, typer.Option(min=1, help="Of each task, to score.")] = 100,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 4096,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for all of them; repeatable.")
    ] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Trainings at a time.")] = None,
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch to score.")] = None,
    runs: Annotated[Path, typer.Option(help="Where runs, scores and figures go.")] = Path(
        "runs/smollm2/levers"
    ),
) -> None:
    """Train with each lever and score what comes out, beside full attention and streaming."""
    unknown = sorted(set(only or ()) - set(LEVERS))
    if unknown:
        raise typer.BadParameter(f"no lever {unknown[0]!r}; there are: {', '.join(LEVERS)}.")
    trainings = Trainings.of(runs, CONFIG, change or (), parallel=parallel)
    recipe = Recipe.load(CONFIG, trainings.common)
    names = list(recipe.targets)
    sensitive = {task for task, target in recipe.targets.items() if target < 1}
    wanted = [Run(lever, seed, LEVERS[lever]) for lever in only or LEVERS for seed in range(seeds)]
    trained = trainings.train(wanted)
    scorer = Scorer(
        runs / "scores",
        backbone=recipe.backbone,
        dtype=recipe.dtype,
        batch_tokens=batch_tokens,
        module=recipe.data["module"],
        split="train",  # held-out samples are for the study alone
        first=UNSEEN,
    )
    streaming = Method("streaming", "streaming", window(parts_of(recipe).way))
    ways: list[tuple[str, Method]] = [("full", Method("full", "full")), ("streaming", streaming)]
    for one in trained:
        folder = (trainings.path(one) / "router").resolve()
        ways.append((one.name, Method(one.name, "router", {"path": str(folder)})))
    report: dict[str, Any] = {
        **about("levers that part tasks", "python -m recipes.smollm2.levers"),
        "settings": {"samples": samples, "length": length, "changes": list(change or ())},
        "failed": [failure._asdict() for failure in trainings.failures],
        "ways": {},
    }
    table = Table(title=f"{samples} unseen training samples a task, of {length:,} tokens")
    for column in ("", "sensitive", "robust", "Ω sensitive", "Ω robust", "Ω"):
        table.add_column(column, justify="right" if column else "left")
    for name, way in ways:
        found = scorer.score(way, length, samples, names)
        means = summary(found, sensitive, dict(scorer.tasks))
        short = {
            task: {
                "score": round(100 * value(task, figures, scorer.tasks), 2),
                "msr": round(figures["msr"], 4),
            }
            for task, figures in found.items()
        }
        report["ways"][name] = {**means, "tasks": short}
        ratios = [means[key] for key in ("msr_sensitive", "msr_robust", "msr")]
        scores = [means["sensitive"], means["robust"]]
        table.add_row(name, *(f"{x:.1f}" for x in scores), *(f"{x:.2f}" for x in ratios))
    for one in trained:
        report["ways"][one.name] |= {"changes": one.changes, "seconds": trainings.seconds(one)}
    console.print(table)
    output = runs / "levers.json"
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"Figures: [bold]{output}[/]")
    if trainings.failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    typer.run(run)
