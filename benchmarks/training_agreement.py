"""The tiny model's routers trained over triton and over serial with the same seeds: the same?

python benchmarks/training_agreement.py --output benchmarks/results/training-agreement.json

Both runs start from the same routers, see the same samples and draw the same noise; what differs is
the attention. Rounding is enough for two runs to part in time: a sampled decision that is nearly a
tie falls the other way, and the routers that come of it sample others. How far that goes is what a
third run shows, over serial again but with the backbone in float32 instead of bfloat16.

The runs are processes that share the machine's GPU.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import elasticore as ec
from elasticore.eval.tasks import TASKS, Sample, make_sample
from elasticore.machine import environment
from elasticore.models.loading import load_backbone
from elasticore.train.recipe import Recipe

console = Console(stderr=True)

RECIPE = Path(__file__).resolve().parent.parent / "recipes" / "tiny" / "routers.yaml"
REFERENCE = "serial"


class Run(NamedTuple):
    """One training."""

    name: str
    recipe: Recipe
    folder: Path

    def start(self) -> subprocess.Popen[bytes]:
        """Train in a process of its own, with what it prints in a file."""
        self.folder.mkdir(parents=True)
        config = self.folder / "recipe.yaml"
        config.write_text(json.dumps(dataclasses.asdict(self.recipe)), encoding="utf-8")
        command = [sys.executable, "-m", "elasticore", "train", "--config", str(config)]
        with (self.folder / "log.txt").open("wb") as log:
            return subprocess.Popen(
                [*command, "--output", str(self.folder / "run")],
                stdout=log,
                stderr=log,
                env={**os.environ, "TOKENIZERS_PARALLELISM": "false"},
            )

    def curve(self, figure: str) -> np.ndarray:
        """A logged figure of every step."""
        text = (self.folder / "run" / "history.json").read_text(encoding="utf-8")
        return np.array([entry[figure] for entry in json.loads(text)])


def train(runs: list[Run]) -> dict[str, float]:
    """All runs at once; the seconds of each."""
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    seconds: dict[str, float] = {}
    started = time.perf_counter()
    with Progress(*columns, console=console) as progress:
        lines = {run.name: progress.add_task(f"training: {run.name}", total=1) for run in runs}
        processes = {run.name: run.start() for run in runs}
        try:
            while len(seconds) < len(runs):
                time.sleep(0.2)
                for run in runs:
                    code = processes[run.name].poll()
                    if code is None or run.name in seconds:
                        continue
                    if code:
                        log = (run.folder / "log.txt").read_text(encoding="utf-8")
                        console.print(f"[red]error:[/] {run.name} failed:\n{log[-2000:]}")
                        raise typer.Exit(1)
                    seconds[run.name] = round(time.perf_counter() - started, 1)
                    progress.update(lines[run.name], completed=1)
        finally:
            for process in processes.values():
                process.kill()  # none is left, unless one failed
    return seconds


def decisions(run: Run, samples: list[Sample], batch_size: int) -> Tensor:
    """Which heads each prompt makes sparse: int8 ``[samples, layers, KV heads]``."""
    model, _ = load_backbone(run.recipe.backbone, run.recipe.dtype)
    ec.elasticize(model, run.folder / "run" / "router")
    found = torch.empty(
        len(samples), len(ec.routers(model)), model.config.num_key_value_heads, dtype=torch.int8
    )
    for start in sorted({sample.start for sample in samples}):
        places = [place for place, sample in enumerate(samples) if sample.start == start]
        prompts = torch.as_tensor(np.stack([samples[place].input_ids[:start] for place in places]))
        for ids, rows in zip(
            prompts.split(batch_size), torch.tensor(places).split(batch_size), strict=True
        ):
            one = ec.Pass()
            with torch.no_grad():
                model(ids.to(model.device), logits_to_keep=1, elastic=one)
            found[rows] = torch.stack([r.decisions for r in one.routings], 1).cpu()
    return found


def compare(run: Run, other: Run, ours: Tensor, theirs: Tensor, tasks: list[str]) -> dict[str, Any]:
    """How far two runs are apart, in their losses step by step and in what their routers decide."""
    losses = run.curve("lm_loss"), other.curve("lm_loss")
    apart = np.abs(losses[0] - losses[1])
    quarter = -max(1, len(apart) // 4)
    same = ours == theirs
    of = {task: torch.tensor([t == task for t in tasks]) for task in dict.fromkeys(tasks)}
    return {
        "loss_apart_first_step": float(apart[0]),
        "loss_apart_mean": float(apart.mean()),
        "loss_apart_largest": float(apart.max()),
        "loss_last_quarter": float(losses[0][quarter:].mean()),
        "loss_last_quarter_serial": float(losses[1][quarter:].mean()),
        "decisions": same.numel(),
        "same_decisions": int(same.sum()),
        "share_same": float(same.float().mean()),
        "share_same_of_task": {task: float(same[rows].float().mean()) for task, rows in of.items()},
    }


def main(
    output: Annotated[
        Path | None, typer.Option("--output", "--json", help="JSON file for the results.")
    ] = None,
    recipe: Annotated[Path, typer.Option(help="What is trained.")] = RECIPE,
    backend: Annotated[str, typer.Option(help="What is compared with serial.")] = "triton",
    steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)] = None,
    batch_size: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    length: Annotated[int | None, typer.Option(help="Tokens of a sample.", min=64)] = None,
    seed: Annotated[int, typer.Option(help="Of samples, routers and noise.")] = 0,
    samples: Annotated[int, typer.Option(help="Held-out samples per task.", min=1)] = 40,
    float32: Annotated[
        bool, typer.Option(help="Also train over serial with a float32 backbone.")
    ] = True,
) -> None:
    """Train over both backends at once and compare losses and decisions.

    Example: python benchmarks/training_agreement.py --steps 300 --output agreement.json
    """
    changes = {"max_steps": steps, "batch_size": batch_size, "seed": seed, "logging_steps": 1}
    base = Recipe.load(recipe, save_steps=0, **changes)
    if length is not None:
        base = dataclasses.replace(base, data={**base.data, "length": length})
    with ec.use_backend(backend):  # unknown or unavailable: said now, not by a process
        pass
    with tempfile.TemporaryDirectory() as folder:

        def run(name: str, **changes: Any) -> Run:
            return Run(name, dataclasses.replace(base, **changes), Path(folder) / name)

        runs = [run(REFERENCE, backend=REFERENCE), run(backend, backend=backend)]
        if backend == REFERENCE:
            runs[1] = runs[1]._replace(name="again", folder=Path(folder) / "again")
        if float32:
            runs.append(run("float32", backend=REFERENCE, dtype="float32"))
        seconds = train(runs)
        results = measure(runs, samples, base.data["length"], base.batch_size)
    for name, one in results["runs"].items():
        one["seconds"] = seconds[name]
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        report = {
            "what": "routers of the tiny model trained with the same seeds over two backends",
            **environment(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
            "command": shlex.join(["python", *sys.argv]),
            "settings": {**dataclasses.asdict(base), "heldout_samples_per_task": samples},
            **results,
        }
        text = json.dumps(report, indent=1, ensure_ascii=False)
        output.write_text(text + "\n", encoding="utf-8")
    show(results)


def measure(runs: list[Run], count: int, length: int, batch_size: int) -> dict[str, Any]:
    """The losses of all runs, their decisions on held-out samples, and how far they are apart."""
    _, tokenizer = load_backbone(runs[0].recipe.backbone)
    held_out = [
        make_sample(task, tokenizer, length, seed) for task in TASKS for seed in range(count)
    ]
    tasks = [sample.task for sample in held_out]
    found = {run.name: decisions(run, held_out, batch_size) for run in runs}
    return {
        "runs": {
            run.name: {
                "lm_loss": np.round(run.curve("lm_loss"), 6).tolist(),
                "penalty": np.round(run.curve("penalty"), 6).tolist(),
                "msr": float(found[run.name].float().mean()),
            }
            for run in runs
        },
        "compared": {
            run.name: compare(run, runs[0], found[run.name], found[runs[0].name], tasks)
            for run in runs[1:]
        },
    }


def show(results: dict[str, Any]) -> None:
    """Print one line per run that is compared with the first."""
    shown = Table("", "loss apart, step 1", "mean", "largest", "last quarter", "same decisions")
    for name, one in results["compared"].items():
        shown.add_row(
            f"{name} and {REFERENCE}",
            f"{one['loss_apart_first_step']:.2g}",
            f"{one['loss_apart_mean']:.3g}",
            f"{one['loss_apart_largest']:.3g}",
            f"{one['loss_last_quarter']:.4f} / {one['loss_last_quarter_serial']:.4f}",
            f"{one['same_decisions']:,} of {one['decisions']:,} ({one['share_same']:.1%})",
        )
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
