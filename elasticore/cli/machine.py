"""``elasticore doctor``: what this machine has, and whether elastic models work on it."""

from __future__ import annotations

import dataclasses
import json

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Json, app, err, out

_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "flashinfer-python",
    "accelerate",
    "pyarrow",
    "datasets",
    "matplotlib",
)


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and backends, what auto would run, and why; and try it out.

    Where a backend is not available, its reason says what to do. A toy model with all heads full
    must give the logits that it gives without elasticore; the exit code is 1 if it does not.

    Example: [bold]elasticore doctor[/]
    """
    import torch

    from elasticore.backends.registry import AUTO, list_backends
    from elasticore.backends.typical import typical_requests
    from elasticore.choice import choose
    from elasticore.cli.checking import compare_with_plain
    from elasticore.machine import versions

    found = versions(*_PACKAGES)
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    table = list_backends()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    choices = {name: choose(AUTO, request) for name, request in typical_requests(device).items()}
    compared = compare_with_plain()
    works = all(one.equal is not False for one in compared)
    if as_json:
        report = {
            "versions": found,
            "devices": devices,
            "backends": [backend._asdict() for backend in table],
            "auto": {
                name: {"backend": choice.name, "reason": choice.reason}
                for name, choice in choices.items()
            },
            "all heads full": [dataclasses.asdict(one) for one in compared],
        }
        print(json.dumps(report, indent=2))
        if not works:
            raise typer.Exit(1)
        return
    lines = Table("package", "version", title="Versions", title_justify="left")
    for package, version in found.items():
        lines.add_row(package, version or "[dim]not installed[/]")
    out.print(lines)
    out.print("[bold]Devices[/]", *devices, sep="\n  ")
    shown = Table("backend", "available", "lanes", "devices", title="Backends")
    shown.title_justify = "left"
    for backend in table:
        available = "[green]yes[/]" if backend.available else "[red]no[/]"
        shown.add_row(
            backend.name,
            available,
            " ".join(backend.lanes),
            " ".join(backend.devices),
        )
    out.print(shown)
    for backend in table:
        if backend.reason:
            out.print(f"  [bold]{backend.name}[/]: {escape(backend.reason)}")
    picks = Table("call", "backend", "why", title=f"What auto runs on {device}, in bfloat16")
    picks.title_justify = "left"
    for name, choice in choices.items():
        picks.add_row(name, choice.name, escape(choice.reason))
    out.print(picks)
    checks = Table("logits of", "equal", "", title="All heads full beside the plain model")
    checks.title_justify = "left"
    for one in compared:
        told = one.reason or f"largest difference {one.difference:.1e}"
        checks.add_row(one.name, "[green]yes[/]" if one.equal else "[red]no[/]", escape(told))
    out.print(checks)
    if not works:
        err.print(
            "[red]error:[/] an elastic model is not the model here, even with all heads full; "
            "install a transformers that elasticore's documentation names."
        )
        raise typer.Exit(1)
