"""What parts tasks: the recipe of the routers with one thing changed at a time.

python -m recipes.smollm2.levers                               # all; minutes each on a GPU
python -m recipes.smollm2.levers --only plain --only calibrated

What is finished is kept; a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from elasticore import AllSparse, Elastic, Streaming
from elasticore.eval.tasks import Sample
from elasticore.models.loading import load_backbone
from elasticore.train import Recipe
from elasticore.train.recipe import train
from recipes.smollm2.samples import figures, make_samples, scored
from recipes.tiny.about import about

CONFIG = Path("recipes/smollm2/routers.yaml")
COSINE = "temperature={name: cosine}"
STRONG = "multiplier_init=[10.0, 20.0]"

LEVERS: dict[str, tuple[str, ...]] = {
    "as in the recipe": (),
    "not calibrated": ("calibration=0",),
    "temperature from 1.5 to 1": (COSINE,),
    "neither": ("calibration=0", COSINE),
    "multipliers from 1 to 2": ("multiplier_init=[1.0, 2.0]",),
    "multipliers from 10 to 20": (STRONG,),
    "multipliers from 10 to 20, not calibrated": (STRONG, "calibration=0"),
    "256 tokens at each end": ("elastic.policy.boundary=256",),
    "learning rate 3e-3": ("router_lr=3e-3",),
    "twice the steps": ("max_steps=400",),
}
"""Changes of the recipe, as ``elasticore train --set`` takes them, by what they are called."""

console = Console()


def summary(found: dict[str, dict[str, Any]], sensitive: set[str]) -> dict[str, float]:
    """Means over the sensitive and over the robust tasks, each task counting once."""

    def mean(key: str, among: list[str]) -> float:
        return round(float(np.mean([found[task][key] for task in among])), 3)

    far = [task for task in found if task in sensitive]
    near = [task for task in found if task not in sensitive]
    return {
        "sensitive": mean("score", far),
        "robust": mean("score", near),
        "msr_sensitive": mean("msr", far),
        "msr_robust": mean("msr", near),
        "msr": mean("msr", far + near),
    }


def run(
    only: Annotated[list[str] | None, typer.Option(help="A lever; repeatable.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Held-out samples of each task.")] = 100,
    length: Annotated[int, typer.Option(help="Tokens of a held-out sample.")] = 4096,
    change: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE for all of them; repeatable.")
    ] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch to score.")] = 65536,
    runs: Annotated[Path, typer.Option(help="Where runs and figures go.")] = Path(
        "runs/smollm2/levers"
    ),
) -> None:
    """Train with each lever and score what comes out, beside full attention and streaming."""
    unknown = sorted(set(only or ()) - set(LEVERS))
    if unknown:
        raise typer.BadParameter(f"there is no lever {unknown[0]!r}; there are: {list(LEVERS)}.")
    recipe = Recipe.load(CONFIG, change or ())
    names = list(recipe.targets)
    sensitive = {task for task, target in recipe.targets.items() if target < 1}
    held = make_samples(names, length, samples)
    model, _ = load_backbone(recipe.backbone, recipe.dtype)
    settings = {"samples": samples, "length": length, "changes": list(change or ())}
    report: dict[str, Any] = {
        **about("levers that part tasks", "python -m recipes.smollm2.levers"),
        "settings": settings,
        "levers": {},
    }

    def add(name: str, way: Elastic | None, seconds: float | None = None) -> None:
        if way is None:
            found = _figures(name, model, held, batch_tokens)
        else:
            with way.on(model):
                found = _figures(name, model, held, batch_tokens)
        record = {**summary(found, sensitive), "seconds": seconds, "tasks": found}
        file = runs / f"{_slug(name)}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps({"settings": settings, **record}) + "\n", encoding="utf-8")

    for name, way in (
        ("full", None),
        ("all streaming", Elastic(AllSparse(), sparse=Streaming(128, 512))),
    ):
        if not _done(runs, name, settings):
            add(name, way)
    for name in only or LEVERS:
        if _done(runs, name, settings):
            continue
        folder, since = runs / _slug(name), time.perf_counter()
        shutil.rmtree(folder, ignore_errors=True)  # of a command that was stopped
        trained = train(Recipe.load(CONFIG, [*LEVERS[name], *(change or ())]), folder)
        add(name, Elastic.load(trained), round(time.perf_counter() - since, 1))
    table = Table(title=f"Held-out samples of {length:,} tokens, {samples} a task")
    for column in ("", "sensitive", "robust", "Ω sensitive", "Ω robust", "Ω"):
        table.add_column(column, justify="right" if column else "left")
    for name in ("full", "all streaming", *LEVERS):
        record = _done(runs, name, settings)
        if record is None:
            continue
        report["levers"][name] = record
        shown = [record["sensitive"], record["robust"]]
        ratios = [record[key] for key in ("msr_sensitive", "msr_robust", "msr")]
        table.add_row(name, *(f"{x:.1f}" for x in shown), *(f"{x:.2f}" for x in ratios))
    console.print(table)
    (runs / "levers.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _figures(
    name: str, model: Any, held: list[Sample], batch_tokens: int
) -> dict[str, dict[str, Any]]:
    def progress(batches: Any) -> Any:
        return track(batches, f"{name}", console=console, transient=True)

    return figures(scored(model, held, batch_tokens=batch_tokens, progress=progress))


def _slug(name: str) -> str:
    return name.replace(",", "").replace(" ", "-")


def _done(runs: Path, name: str, settings: dict[str, Any]) -> dict[str, Any] | None:
    """What an earlier command found with the same settings."""
    file = runs / f"{_slug(name)}.json"
    if not file.is_file():
        return None
    record = json.loads(file.read_text(encoding="utf-8"))
    return record if record.pop("settings") == settings else None


if __name__ == "__main__":
    typer.run(run)
