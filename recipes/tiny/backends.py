"""The tiny elastic model on the triton backend: the decisions and answers of the serial one?

python recipes/tiny/backends.py --output benchmarks/results/tiny-triton.json

With ``serial`` the routers are modules and the heads run in plain PyTorch; with ``triton`` both the
decisions and the attention come from kernels.
"""

from __future__ import annotations

import json
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import transformers
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

import elasticore as ec
from elasticore.backends.triton import TritonAttention
from elasticore.eval.tasks import TASKS, Sample, make_sample
from elasticore.eval.teacher_forced import Score, score
from elasticore.models.loading import TINY, load_backbone

console = Console(stderr=True)

DTYPES = ("float32", "bfloat16")
BACKENDS = ("serial", "triton")


def keep_modules(model: Any) -> None:
    """Let the routers run as modules on a GPU too: one with a hook does."""
    for router in ec.routers(model):
        router.task_mlp.register_forward_hook(lambda *_: None)


def decisions(model: Any, samples: list[Sample], batch_size: int) -> Tensor:
    """Which heads each prompt makes sparse: int8 ``[samples, layers, KV heads]``."""
    found = []
    for start in sorted({sample.start for sample in samples}):
        prompts = [sample.input_ids[:start] for sample in samples if sample.start == start]
        for ids in torch.as_tensor(np.stack(prompts), device=model.device).split(batch_size):
            one = ec.Pass()
            with torch.no_grad():
                model(ids, logits_to_keep=1, elastic=one)
            found.append(torch.stack([r.decisions for r in one.routings], 1).cpu())
    return torch.cat(found)


def compare(serial: list[Score], triton: list[Score]) -> dict[str, Any]:
    """Accuracy (exact answers) and loss with both; samples that are right in both or in neither."""
    return {
        "samples": len(serial),
        "same_correctness": sum(
            a.correct == b.correct for a, b in zip(serial, triton, strict=True)
        ),
        "accuracy_serial": float(np.mean([s.correct for s in serial])),
        "accuracy_triton": float(np.mean([s.correct for s in triton])),
        "loss_serial": float(np.mean([s.loss for s in serial])),
        "loss_triton": float(np.mean([s.loss for s in triton])),
    }


def run(dtype: str, samples: int, length: int, batch_size: int) -> dict[str, Any]:
    """Score the same samples with both backends."""
    scores: dict[str, list[Score]] = {}
    found: dict[str, Tensor] = {}
    for backend in track(BACKENDS, dtype, console=console):
        model, tokenizer = load_backbone(TINY, dtype)
        held_out = [
            make_sample(task, tokenizer, length, s) for task in TASKS for s in range(samples)
        ]
        ec.elasticize(model, TINY)
        if backend == "serial":
            keep_modules(model)
        with ec.use_backend(backend):
            scores[backend] = score(model, held_out, batch_size=batch_size)
            found[backend] = decisions(model, held_out, batch_size)
    return {
        "decisions": found["serial"].numel(),
        "same_decisions": int((found["serial"] == found["triton"]).sum()),
        "tasks": {
            task: compare(*([s for s in scores[b] if s.task == task] for b in BACKENDS))
            for task in TASKS
        },
    }


def main(
    output: Annotated[Path | None, typer.Option(help="JSON file for the results.")] = None,
    samples: Annotated[int, typer.Option(help="Held-out samples per task.")] = 40,
    length: int = 4096,
    batch_size: int = 50,
) -> None:
    """Score the model with both backends and print the table."""
    usable = TritonAttention.available()
    if not torch.cuda.is_available() or not usable:
        reason = usable.reason if torch.cuda.is_available() else "PyTorch sees no NVIDIA GPU."
        console.print(f"[red]error:[/] the triton backend cannot run the model here: {reason}")
        raise typer.Exit(1)
    results = {dtype: run(dtype, samples, length, batch_size) for dtype in DTYPES}
    report = {
        "what": "tiny elastic model, held-out samples: modules and serial backend beside kernels",
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
        "gpu": torch.cuda.get_device_name(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": version("triton"),
            "transformers": transformers.__version__,
            "elasticore": ec.__version__,
        },
        "settings": {"samples_per_task": samples, "length": length},
        "results": results,
    }
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    show(results)


def show(results: dict[str, Any]) -> None:
    """Print one line per dtype and task."""
    shown = Table("dtype", "same decisions", "task", "correct", "same", "loss serial", "triton")
    for dtype, found in results.items():
        same = f"{found['same_decisions']:,} of {found['decisions']:,}"
        for task, one in found["tasks"].items():
            shown.add_row(
                dtype,
                same,
                task,
                f"{one['accuracy_serial']:.3f} / {one['accuracy_triton']:.3f}",
                f"{one['same_correctness']} of {one['samples']}",
                f"{one['loss_serial']:.5f}",
                f"{one['loss_triton']:.5f}",
            )
    Console(width=120).print(shown)


if __name__ == "__main__":
    typer.run(main)
