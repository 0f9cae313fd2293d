"""Which tasks are sensitive and which robust: full attention against all heads streaming.

python -m recipes.smollm2.retention                   # 200 samples a task at 4,096 tokens; on a GPU
python -m recipes.smollm2.retention --samples 4       # to try it on a CPU
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from elasticore import AllSparse, Elastic, Streaming
from elasticore.assets.fetched import smollm2
from elasticore.models.loading import load_backbone
from recipes.smollm2.samples import figures, make_samples, scored
from recipes.smollm2.tasks import TASKS
from recipes.tiny.about import about

SINK, LOCAL = 128, 512
SENSITIVE, ROBUST = 0.60, 0.97
LEAST = {"sensitive": 50.0, "robust": 25.0}

console = Console()


def kind_of(full: float, streaming: float) -> str:
    """``"sensitive"``, ``"robust"`` or ``""`` by the rule, from two scores in percent."""
    retention = streaming / full if full else 1.0
    if retention < SENSITIVE and full >= LEAST["sensitive"]:
        return "sensitive"
    if retention > ROBUST and full >= LEAST["robust"]:
        return "robust"
    return ""


def run(
    samples: Annotated[int, typer.Option(min=1, help="Of each task.")] = 200,
    lengths: Annotated[list[int] | None, typer.Option("--length", help="Repeatable.")] = None,
    tasks: Annotated[list[str] | None, typer.Option("--task", help="Repeatable.")] = None,
    batch_tokens: Annotated[int, typer.Option(help="Tokens of a batch.")] = 65536,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "runs/smollm2/retention.json"
    ),
) -> None:
    """Score every candidate with full attention and with all heads streaming."""
    names = list(tasks or TASKS)
    dtype = "bfloat16" if torch.cuda.is_available() else "float32"
    model, _ = load_backbone(str(smollm2()), dtype)
    report: dict[str, Any] = {
        **about("retention of the candidate tasks", "python -m recipes.smollm2.retention"),
        "settings": {"samples": samples, "sink": SINK, "local": LOCAL, "dtype": dtype},
        "lengths": {},
    }
    for length in lengths or [4096]:
        held = make_samples(names, length, samples, "train")

        def measure(name: str, held: list[Any] = held, length: int = length) -> dict[str, Any]:
            progress = lambda batches: track(  # noqa: E731
                batches, f"{name} at {length:,}", console=console, transient=True
            )
            found = scored(model, held, batch_tokens=batch_tokens, progress=progress)
            return figures(found)

        full = measure("full")
        with Elastic(AllSparse(), sparse=Streaming(SINK, LOCAL)).on(model):
            streaming = measure("streaming")
        found = {
            name: {
                "full": full[name],
                "streaming": streaming[name],
                "retention": round(streaming[name]["score"] / max(full[name]["score"], 1e-9), 4),
                "kind": kind_of(full[name]["score"], streaming[name]["score"]),
            }
            for name in names
        }
        report["lengths"][str(length)] = found
        console.print(_table(found, length))
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def _table(found: dict[str, Any], length: int) -> Table:
    table = Table(title=f"{length:,} tokens")
    for column in ("task", "full", "streaming", "retention", "kind"):
        table.add_column(column, justify="left" if column in ("task", "kind") else "right")
    for name, row in sorted(found.items(), key=lambda item: item[1]["retention"]):
        table.add_row(
            name,
            f"{row['full']['score']:.1f} ± {row['full']['error']:.1f}",
            f"{row['streaming']['score']:.1f}",
            f"{row['retention']:.0%}",
            row["kind"],
        )
    return table


if __name__ == "__main__":
    typer.run(run)
