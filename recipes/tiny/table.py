"""The tiny model's table: full, elastic, streaming and random static heads on held-out samples.

python recipes/tiny/table.py --output benchmarks/results/tiny-elastic.json
"""

from __future__ import annotations

import json
import platform
import sys
from collections.abc import Iterable
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
from elasticore.assets import tiny
from elasticore.eval.tasks import TASKS, make_sample
from elasticore.eval.teacher_forced import Score, score
from elasticore.models.loading import TINY, load_backbone

console = Console(stderr=True)


def means(scores: list[Score]) -> dict[str, dict[str, float]]:
    """Per task: accuracy (exact answers), loss and the sparsity ratios."""
    table = {}
    for task in dict.fromkeys(s.task for s in scores):
        own = [s for s in scores if s.task == task]
        table[task] = {
            "samples": len(own),
            "accuracy": float(np.mean([s.correct for s in own])),
            "token_accuracy": float(np.mean([s.accuracy for s in own])),
            "loss": float(np.mean([s.loss for s in own])),
            "msr": float(np.mean([s.msr for s in own])),
            "esr": float(np.mean([s.esr for s in own])),
            "esr_last_query": float(np.mean([s.esr_last_query for s in own])),
        }
    return table


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
    model, tokenizer = load_backbone(TINY, dtype)
    held_out = [
        make_sample(task, tokenizer, length, seed)
        for task in track(TASKS, "samples", console=console)
        for seed in range(samples)
    ]
    sensitive = [sample for sample in held_out if sample.sensitive]

    def run(name: str, chosen: list[Any]) -> list[Score]:
        def bar(batches: Iterable[Any]) -> Iterable[Any]:
            return track(list(batches), name, console=console)

        with ec.use_backend(backend):
            return score(model, chosen, batch_size=batch_size, progress=bar)

    results: dict[str, Any] = {"full": means(run("full attention", held_out))}
    ec.load_router(model, router or tiny() / "router")
    config = model._elasticore.config
    elastic = run("elastic", held_out)
    results["elastic"] = means(elastic)
    ec.restore(model)
    shape = model.config.num_hidden_layers, model.config.num_key_value_heads

    ec.elasticize(model, config, policies=[ec.AllSparse() for _ in range(shape[0])])
    results["streaming"] = means(run("all streaming", held_out))
    ec.restore(model)

    # Static tables spend on every input what elastic spends on average over all tasks.
    msr = float(np.mean([s.msr for s in elastic]))
    static = []
    for seed in range(tables):
        table = ec.random_head_table(*shape, msr, seed)
        ec.elasticize(model, config, policies=ec.fixed_policies(table))
        static.append(means(run(f"random table {seed}", sensitive)))
        ec.restore(model)
    accuracy = [float(np.mean([t["accuracy"] for t in one.values()])) for one in static]
    results["random_tables"] = {
        "count": tables,
        "msr": msr,
        "accuracy": accuracy,
        "best": static[int(np.argmax(accuracy))] if static else {},
    }
    report = {
        "what": "tiny model, held-out samples",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "elasticore": ec.__version__,
        },
        "settings": {
            "samples_per_task": samples,
            "length": length,
            "dtype": dtype,
            "elastic": config.to_dict(),
        },
        "results": results,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(results)


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
