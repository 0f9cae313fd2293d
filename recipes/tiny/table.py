"""The tiny model's table: full, elastic, streaming and random static heads on held-out samples.

python -m recipes.tiny.table --output benchmarks/results/tiny-elastic.json
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from elasticore import Elastic, HeadTable
from elasticore.assets import tiny
from elasticore.eval.methods import Method
from elasticore.eval.tasks import TASKS
from recipes.study.about import about
from recipes.study.scores import (
    Figures,
    Scorer,
    Static,
    Way,
    mean_msr,
    streaming,
    window,
)
from recipes.tiny.plan import SENSITIVE


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    router: Annotated[
        Path | None, typer.Option(help="Routers; the shipped ones by default.")
    ] = None,
    samples: Annotated[int, typer.Option(help="Held-out samples per task.")] = 200,
    tables: Annotated[int, typer.Option(help="Random static head tables.")] = 20,
    length: int = 4096,
    batch_size: int = 50,
    backend: str = "auto",
    dtype: str = "float32",
) -> None:
    """Score every method on the same held-out samples and print the table."""
    scorer = Scorer(dtype=dtype, batch_tokens=batch_size * length, backend=backend)
    path = router or tiny() / "router"
    elastic = Elastic.load(path)
    results: dict[str, Any] = {
        name: _score(scorer, way, length, samples)
        for name, way in {
            "full": Method("full", "full"),
            "elastic": Method("elastic", "router", {"path": str(path)}),
            "streaming": Method("streaming", "streaming", window(elastic)),
        }.items()
    }
    # Static tables spend on every input what elastic spends on average over all tasks.
    msr = mean_msr(results["elastic"])
    static = []
    for seed in range(tables):
        table = HeadTable.random(*scorer.shape, msr, seed)
        way = Static(f"random table {seed}", table, streaming(elastic))
        static.append(_score(scorer, way, length, samples, SENSITIVE))
    accuracy = [float(np.mean([t["accuracy"] for t in one.values()])) for one in static]
    results["random_tables"] = {
        "count": tables,
        "msr": msr,
        "accuracy": accuracy,
        "best": static[int(np.argmax(accuracy))] if static else {},
    }
    report = {
        **about("tiny model, held-out samples", "python -m recipes.tiny.table"),
        "settings": {
            "samples_per_task": samples,
            "length": length,
            "dtype": dtype,
            "elastic": elastic.to_dict(),
        },
        "results": results,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(results)


def _score(
    scorer: Scorer, way: Way, length: int, samples: int, tasks: Iterable[str] = tuple(TASKS)
) -> Figures:
    """Figures per task, without how often each head was sparse."""
    found = scorer.score(way, length, samples, tasks)
    return {task: {k: v for k, v in own.items() if k != "sparse"} for task, own in found.items()}


def show(results: dict[str, Any]) -> None:
    """Print one line per task."""
    best = results["random_tables"]["best"]
    shown = Table(
        "task",
        "full",
        "elastic",
        "streaming",
        "best static",
        "Ω_MSR",
        "Ω_ESR",
        "loss full",
        "loss elastic",
    )
    for task in results["full"]:
        full, own, streaming = (results[m][task] for m in ("full", "elastic", "streaming"))
        exact = TASKS[task].sensitive
        key = "accuracy" if exact else "token_accuracy"
        shown.add_row(
            task,
            *(f"{r[key]:.3f}" for r in (full, own, streaming)),
            f"{best[task]['accuracy']:.3f}" if exact and best else "",
            f"{own['msr']:.3f}",
            f"{own['esr']:.3f}",
            f"{full['loss']:.4f}",
            f"{own['loss']:.4f} ({own['loss'] / full['loss'] - 1:+.2%})",
        )
    Console(width=140).print(shown)


if __name__ == "__main__":
    typer.run(main)
