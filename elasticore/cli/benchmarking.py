"""``elasticore bench``: times beside other engines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elasticore.cli.console import app, err, out, place, plain_errors


@app.command()
def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(help="attention, decode, router, selector or e2e; repeatable; default: all."),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Only this engine; repeatable.", metavar="NAME")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Only cases of this many tokens; repeatable.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model of suite e2e.", min=1)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the figures go, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where the picture goes; several suites add their names.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only short cases, and few runs.")] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Run nothing: show and draw the figures of this JSON file."),
    ] = None,
) -> None:
    """Time attention, decoding, routers, selectors and whole models, beside other engines.

    Example: [bold]elasticore bench --suite attention --json attention.json --plot attention.png[/]
    """
    with plain_errors():
        import torch
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from elasticore.bench.cases import SUITES, Case, Engine, cases_of
        from elasticore.bench.plots import picture
        from elasticore.bench.report import Results, read_json, table, write_json
        from elasticore.bench.run import Record, Session
        from elasticore.bench.timing import Clock
        from elasticore.drawing import check_picture, pyplot
        from elasticore.machine import environment
        from elasticore.places import check_writable

        if plot is not None:
            pyplot()
            check_picture("plot", plot)
        if json_file is not None:
            check_writable(json_file)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def measure() -> Results:
            cases = [
                case
                for name in dict.fromkeys(suite or SUITES)
                for case in cases_of(name, device, quick=quick, lengths=length or (), layers=layers)
            ]
            session = Session(cases, Clock(device, budget_ms=20 if quick else 150), engine or ())
            about = environment(device)
            finished: list[tuple[Case, list[Record]]] = []
            bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err
            )
            task = bar.add_task("", total=sum(len(engines) for _, engines in session.plan))

            def step(case: Case, engine: Engine) -> None:
                bar.update(task, description=f"{case} {engine}", advance=1)

            with bar:
                for one in session.run(step):
                    finished.append(one)
                    # After each case: a run that is cut short leaves those.
                    if json_file is not None:
                        write_json(finished, about, json_file)
            return finished

        if source is None:
            results = measure()
        elif suite or engine or length or layers or json_file or quick:
            raise ValueError("from shows a file as it is; beside it only plot can be given.")
        else:
            results = read_json(source)
        suites = list(dict.fromkeys(case.suite for case, _ in results))
        for name in suites:
            out.print(table(results, name))
        if plot is not None:
            for name in suites:
                own = plot.with_stem(f"{plot.stem}-{name}") if len(suites) > 1 else plot
                if picture(results, name, own):
                    out.print(f"Picture: {place(own)}")
    if source is None and device.type == "cpu":
        out.print("[yellow]No NVIDIA GPU: the cases are small, and their times mean little.[/]")
    if any(record.failed for _, records in results for record in records):
        raise typer.Exit(1)
