"""Which tasks are sensitive and which robust: full attention against all heads streaming.

python -m recipes.smollm2.retention                   # 200 samples a task at 4,096 tokens; on a GPU
python -m recipes.smollm2.retention --samples 4       # to try it on a CPU
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

import numpy as np
import typer
from rich.table import Table

from elasticore.eval.methods import Method
from recipes.study.about import about
from recipes.study.runs import console
from recipes.study.scores import UNSEEN, Scorer

SINK, LOCAL = 128, 512
SENSITIVE, ROBUST = 0.60, 0.97
LEAST = {"sensitive": 50.0, "robust": 25.0}


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
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch.")] = None,
    runs: Annotated[Path, typer.Option(help="Where scores are kept.")] = Path("runs/smollm2"),
) -> None:
    """Score every candidate with full attention and with all heads streaming."""
    scorer = Scorer(
        runs / "retention",
        backbone="smollm2",
        batch_tokens=batch_tokens,
        module="elasticore.eval.chat_tasks",
        split="train",
        first=UNSEEN,
    )
    unknown = sorted(set(tasks or ()) - set(scorer.tasks))
    if unknown:
        raise typer.BadParameter(f"no task {unknown[0]!r}; there are: {', '.join(scorer.tasks)}.")
    report: dict[str, Any] = {
        **about("retention of the candidate tasks", "python -m recipes.smollm2.retention"),
        "settings": {"samples": samples, "sink": SINK, "local": LOCAL, "dtype": scorer.dtype},
        "lengths": {},
    }
    for length in lengths or [4096]:
        found = {
            way.name: scorer.score(way, length, samples, tasks)
            for way in (
                Method("full", "full"),
                Method("streaming", "streaming", {"sink": SINK, "local": LOCAL}),
            )
        }
        rows = {}
        for task in found["full"]:
            full, streaming = (_percent(figures[task]["each"]) for figures in found.values())
            retention = round(streaming["score"] / max(full["score"], 1e-9), 4)
            kind = kind_of(full["score"], streaming["score"])
            rows[task] = {"full": full, "streaming": streaming, "retention": retention}
            rows[task]["kind"] = kind
        report["lengths"][str(length)] = rows
        console.print(_table(rows, length))
    output = runs / "retention.json"
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"Figures: [bold]{output}[/]")


def _percent(each: list[float]) -> dict[str, float]:
    """A score with its standard error."""
    error = np.std(each) / max(1, len(each) - 1) ** 0.5
    return {"score": round(100 * fmean(each), 2), "error": round(100 * float(error), 2)}


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
