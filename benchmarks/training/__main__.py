"""What a training step costs beside the ways that compute both branches and blend them.

python -m benchmarks.training --output benchmarks/results/training-h200.json

A router's gate ``z`` (1 streams) gets its gradient from both branches of every head. The usual way
computes ``z · streaming + (1 - z) · full``, forward and backward, although z is exactly 0 or 1.
The triton backend computes both outputs in one pass and goes back through the chosen one only.

layer
    Forward and backward of one attention layer: gradients of q, k, v and the gate. ``ours`` takes
    turns with ``flash+flex``, in which FlashAttention-2 does the full branch, as in the paper's
    released code, and ``cudnn+flex``, the fastest kernels that PyTorch has, blended in one compiled
    pass. The released code's streaming kernel is a CUDA extension that has to be built; here
    compiled FlexAttention over the same blocks stands for it in both.
step
    A whole training step of a model in the shape of Llama-3.1-8B with random weights, through the
    real trainer: forward, blocked loss, backward with gradient checkpointing, optimizer. A given
    share of the heads streams, the same ones in every run.
loss
    The head and its cross-entropy over all tokens: in blocks, as a whole, and by other projects.

--quick runs everything in a tiny size, on a CPU too; only times from a GPU count.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

import elasticore as ec
from benchmarks.training.blended import PEERS
from benchmarks.training.layer import layers
from benchmarks.training.loss import losses
from benchmarks.training.measuring import console
from benchmarks.training.sizes import QUICK, Sizes
from benchmarks.training.step import steps
from benchmarks.training.timed import Timed
from elasticore.backends.triton import TritonAttention
from elasticore.machine import environment

PARTS = ("layer", "step", "loss")


def main(
    output: Annotated[
        Path | None, typer.Option("--output", "--json", help="JSON file for the results.")
    ] = None,
    part: Annotated[
        list[str] | None, typer.Option(help=f"Of {', '.join(PARTS)}; repeatable, all by default.")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Tokens of a layer; repeatable.", min=128)
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(help="Tokens of a step and of the loss.", min=128)
    ] = None,
    layers_: Annotated[
        int | None, typer.Option("--layers", help="Layers of the step's model.", min=1)
    ] = None,
    steps_: Annotated[
        int | None, typer.Option("--steps", help="Training steps, the first not counted.", min=2)
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny sizes, on a CPU too.")] = False,
) -> None:
    """Measure training beside the blended ways and print the tables.

    Example: python -m benchmarks.training --part layer --length 16384 --output layer.json
    """
    parts = part or list(PARTS)
    for name in parts:
        if name not in PARTS:
            raise typer.BadParameter(
                f"{name!r} is not one of {', '.join(PARTS)}.", param_hint="--part"
            )
    gpu = torch.cuda.is_available()
    usable = TritonAttention.available()
    if not quick and not (gpu and usable):
        why = usable.reason if gpu else "PyTorch sees no NVIDIA GPU; --quick runs anywhere."
        console.print(f"[red]error:[/] training cannot be timed here: {why}")
        raise typer.Exit(1)
    device = torch.device("cuda" if gpu else "cpu")
    given = {"tokens": tokens, "layers": layers_, "steps": steps_}
    sizes = dataclasses.replace(
        QUICK if quick else Sizes(), **{n: v for n, v in given.items() if v is not None}
    )
    if length:
        sizes = dataclasses.replace(sizes, lengths=tuple(length))
    ours = "triton" if gpu else "serial"
    for backend in (*PEERS, Timed):
        ec.register_backend(backend.name, backend, replace=True)
    measure = {
        "layer": lambda: layers(sizes, ours, device),
        "step": lambda: steps(sizes, ours, device),
        "loss": lambda: losses(sizes, device),
    }
    results: dict[str, Any] = {}
    for name in parts:
        results[name] = measure[name]()
        if output is not None:  # what is there stays there, whatever comes next
            output.parent.mkdir(parents=True, exist_ok=True)
            text = json.dumps(report(results, sizes, ours, device), indent=1, ensure_ascii=False)
            output.write_text(text + "\n", encoding="utf-8")
    show(results)


def report(
    results: Mapping[str, Any], sizes: Sizes, ours: str, device: torch.device
) -> dict[str, Any]:
    """The results with what they depend on."""
    return {
        "what": "training beside blended branches: median milliseconds of forward and backward, "
        "seconds of a step; ratios say how many times faster than another way ours is",
        **environment(device),
        "command": shlex.join(["python", "-m", "benchmarks.training", *sys.argv[1:]]),
        "settings": {**dataclasses.asdict(sizes), "ours": ours},
        "not_measured": [name for name in PARTS if name not in results],
        **results,
    }


def show(results: Mapping[str, Any]) -> None:
    """Print a table per part."""
    printed = Console()
    for part in ("layer", "loss"):
        if part not in results:
            continue
        shown = Table("", "way", "ms", "forward", "ours is × faster", "GB", title=part)
        for name, one in results[part].items():
            for way, ms in one["ms"].items():
                if ms is None:
                    continue
                forward = one.get("forward_ms", {}).get(way)
                ratio = one["ratios"].get(way)
                peak = one.get("memory", {}).get(way, {}).get("beyond_gb")
                shown.add_row(name, way, *map(cell, (ms, forward, ratio, peak)))
            for way, why in one.get("failed", {}).items():
                shown.add_row(name, way, f"[red]{why}[/]")
        printed.print(shown)
    if "step" in results:
        shown = Table("", "way", "seconds", "tokens/s", "in attention", "GB", title="step")
        for name, found in results["step"].items():
            for way, one in found.items():
                if one["seconds"] is None:
                    shown.add_row(name, way, f"[red]{one['failed']}[/]")
                    continue
                figures = one["seconds"], one["tokens_per_second"], one["attention_share"]
                shown.add_row(name, way, *map(cell, (*figures, one["memory"]["total_gb"])))
        printed.print(shown)


def cell(value: float | None) -> str:
    """A figure, or nothing."""
    return "" if value is None else f"{value:.4g}"


if __name__ == "__main__":
    typer.run(main)
