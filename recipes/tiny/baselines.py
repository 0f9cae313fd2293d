"""Elastic attention beside DuoAttention and PruLong on the tiny backbone, over several seeds.

python -m recipes.tiny.baselines --output benchmarks/results/tiny-baselines.json

All three train on the same samples, for as many steps. The static methods get the share of sparse
heads that elastic attention of the same seed has on average over the held-out samples, so every
method spends the same over the whole set. What is finished in ``--runs`` is not done again.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import sys
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

import elasticore as ec
from elasticore.eval.tasks import TASKS, make_sample
from elasticore.eval.teacher_forced import score
from elasticore.models.loading import TINY, load_backbone
from elasticore.train import BASELINES, Recipe, train
from recipes.tiny.table import means

console = Console(stderr=True)

METHODS = ("elastic", *BASELINES)
QUICK = {"max_steps": 2, "batch_size": 2, "workers": 0, "dtype": "float32", "logging_steps": 1}


def run(method: str, recipe: Recipe, folder: Path, held_out: list[Any], batch_size: int) -> Any:
    """Train and score one method; return its figures per task, or those that are there already."""
    done = folder / f"figures-{len(held_out)}x{held_out[0].stop}.json"
    wanted = json.loads(json.dumps(dataclasses.asdict(recipe)))
    made = folder / "recipe.json"
    if made.is_file() and json.loads(made.read_text(encoding="utf-8")) != wanted:
        raise ValueError(f"runs holds {folder}, made with other settings; delete it.")
    if not done.is_file():
        if not (folder / "router" / "router.json").is_file():
            console.print(f"[bold]{folder.name}[/]: training")
            train(recipe, folder)
        model, _ = load_backbone(TINY)
        ec.load_router(model, folder / "router")
        with ec.use_backend(recipe.backend):
            scores = score(
                model,
                held_out,
                batch_size=batch_size,
                progress=lambda batches: track(list(batches), folder.name, console=console),
            )
        done.write_text(json.dumps(means(scores)), encoding="utf-8")
    return json.loads(done.read_text(encoding="utf-8"))


def summarise(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean and standard deviation over the seeds, and every seed's own, per task and figure."""
    return {
        task: {
            name: {
                "mean": float(np.mean(values)),
                "spread": float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
                "seeds": values,
            }
            for name in runs[0][task]
            if name != "samples"
            for values in [[run[task][name] for run in runs]]
        }
        for task in runs[0]
    }


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    runs: Annotated[Path, typer.Option(help="Directory of the runs.")] = Path("runs/baselines"),
    config: Annotated[Path, typer.Option(help="Recipe of the routers.")] = Path(
        "recipes/tiny/routers.yaml"
    ),
    seeds: Annotated[int, typer.Option(min=1)] = 3,
    samples: Annotated[int, typer.Option(help="Held-out samples per task.")] = 200,
    length: int = 4096,
    batch_size: int = 50,
    quick: Annotated[bool, typer.Option("--quick", help="Next to no training, to try it.")] = False,
) -> None:
    """Train every method with every seed, score all on the same samples, print the table."""
    recipe = Recipe.load(config)
    if quick:
        runs, seeds, samples, length, batch_size = runs / "quick", 1, 2, 256, 2
        recipe = dataclasses.replace(recipe, **QUICK, data={**recipe.data, "length": length})
    _, tokenizer = load_backbone(TINY)
    held_out = [
        make_sample(task, tokenizer, length, index) for task in TASKS for index in range(samples)
    ]
    found: dict[str, list[Any]] = {method: [] for method in METHODS}
    for seed in range(seeds):
        msr = 0.0
        for method in METHODS:
            own = dataclasses.replace(recipe, seed=seed)
            if method != "elastic":
                settings = {"sparsity": msr}
                own = dataclasses.replace(own, policy=method, policy_settings=settings)
            folder = runs / f"{method}-{seed}"
            found[method].append(run(method, own, folder, held_out, batch_size))
            if method == "elastic":  # tasks have the same number of samples
                msr = float(np.mean([task["msr"] for task in found[method][-1].values()]))
    report = {
        "what": "tiny model, held-out samples: routers and static patterns, trained alike",
        "date": date.today().isoformat(),
        "command": " ".join(["python -m recipes.tiny.baselines", *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "elasticore": ec.__version__,
        },
        "settings": {
            "seeds": seeds,
            "samples_per_task": samples,
            "length": length,
            "max_steps": recipe.max_steps,
            "batch_size": recipe.batch_size,
            "baselines": {name: dataclasses.asdict(kind()) for name, kind in BASELINES.items()},
        },
        "results": {method: summarise(ones) for method, ones in found.items()},
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(report["results"])


def show(results: dict[str, Any]) -> None:
    """Print one line per task."""
    shown = Table("task", title="Mean ± standard deviation over the seeds")
    for method in results:
        for heading in (method, "Ω_MSR"):
            shown.add_column(heading, justify="right")
    for task in TASKS:
        key = "accuracy" if TASKS[task].sensitive else "token_accuracy"
        figures = [own[task][name] for own in results.values() for name in (key, "msr")]
        cells = [f"{figure['mean']:.3f} ± {figure['spread']:.3f}" for figure in figures]
        shown.add_row(task, *cells)
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
