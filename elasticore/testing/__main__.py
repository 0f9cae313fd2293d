"""``python -m elasticore.testing BACKEND``: the conformance suite, for whoever wrote a backend."""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from elasticore.choice import use_backend
from elasticore.errors import ElasticoreError
from elasticore.machine import environment
from elasticore.testing.runner import all_jobs, run_jobs, shortly, summary

SHOWN = 12
"""Failures that are printed."""

out, err = Console(), Console(stderr=True)
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


@app.command()
def main(
    backend: Annotated[str, typer.Argument(help="Name of the backend to check.")],
    device: Annotated[str | None, typer.Option(help="Default: cuda, or cpu without a GPU.")] = None,
    dtype: Annotated[
        list[str] | None,
        typer.Option(
            help="float64, float32, bfloat16 or float16; repeatable. Default: the first "
            "two on a CPU, the last two on a GPU."
        ),
    ] = None,
    gradients: Annotated[
        bool, typer.Option("--gradients", help="Check gradients and checkpointing as well.")
    ] = False,
    cases: Annotated[
        str, typer.Option(help="Only cases whose name holds this regular expression.")
    ] = "",
    quick: Annotated[
        bool, typer.Option("--quick", help="A pairwise cover instead of every combination.")
    ] = False,
    processes: Annotated[int, typer.Option(help="How many run at a time.", min=1)] = 1,
    seconds: Annotated[
        float | None, typer.Option(help="Begin no further check after this time.", min=0)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order of the checks.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the counts go, as JSON.")
    ] = None,
) -> None:
    """Compare a backend with a dense float64 computation on every combination of the matrix.

    Ends with exit code 1 if a check failed, or if none passed.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    gpu = torch.device(device).type == "cuda"
    try:
        use_backend(backend)
        jobs = all_jobs(
            dtype or (["bfloat16", "float16"] if gpu else ["float64", "float32"]),
            gradients=gradients,
            cases=cases,
            full=not quick,
            seed=seed,
        )
    except (ValueError, ElasticoreError) as error:
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        raise typer.Exit(2) from error
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
    )
    started, outcomes = time.time(), []
    with bar:
        task = bar.add_task(backend, total=len(jobs))
        counts: Counter[str] = Counter()
        for outcome in run_jobs(backend, jobs, device=device, processes=processes, seconds=seconds):
            outcomes.append(outcome)
            counts[outcome.result] += 1
            said = ", ".join(f"{number} {result}" for result, number in counts.items())
            bar.update(task, advance=1, description=f"{backend}: {said}")
            if outcome.result == "failed" and counts["failed"] <= SHOWN:
                failure = f"{outcome.job or 'process'}: {shortly(outcome.message)}"
                out.print(f"[red]failed[/] {escape(failure)}")
    report = {
        "what": f"conformance of the {backend} backend on {device}",
        **environment(torch.device(device)),
        "command": shlex.join(["python", "-m", "elasticore.testing", *sys.argv[1:]]),
        "backend": backend,
        "device": device,
        "processes": processes,
        "seconds": round(time.time() - started, 1),
        **summary(jobs, outcomes),
    }
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(report, indent=1, ensure_ascii=False) + "\n"
        json_file.write_text(text, encoding="utf-8")
    passed = report["checks"] - report["failed"]
    out.print(
        f"{backend} on {device}: {passed:,} passed, {report['failed']:,} failed, "
        f"{report['unsupported']:,} not supported, {report['out_of_memory']:,} out of memory, "
        f"{report['left']:,} not begun; {report['seconds']} s"
    )
    if not passed and report["unsupported"]:
        reason = next(o.message for o in outcomes if o.result == "unsupported")
        out.print(f"Nothing was shown: {escape(shortly(reason))}")
    raise typer.Exit(int(report["failed"] > 0 or passed == 0))


if __name__ == "__main__":
    app()
