"""``elasticore doctor``: what this machine has."""

from __future__ import annotations

import importlib.metadata
import json
import platform

from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Json, app, out

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
    """Show versions, devices and backends, what auto would run, and why.

    Where a backend is not available, its reason says what to do.

    Example: [bold]elasticore doctor[/]
    """
    import torch

    from elasticore import __version__
    from elasticore.backends.registry import AUTO, backends, choose
    from elasticore.backends.typical import typical_requests

    versions: dict[str, str | None] = {
        "elasticore": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    table = backends()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    choices = {name: choose(AUTO, request) for name, request in typical_requests(device).items()}
    if as_json:
        report = {
            "versions": versions,
            "devices": devices,
            "backends": [backend._asdict() for backend in table],
            "auto": {
                name: {"backend": choice.name, "reason": choice.reason}
                for name, choice in choices.items()
            },
        }
        print(json.dumps(report, indent=2))
        return
    lines = Table("package", "version", title="Versions", title_justify="left")
    for package, found in versions.items():
        lines.add_row(package, found or "[dim]not installed[/]")
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
