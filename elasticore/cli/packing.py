"""``elasticore data``: packed training data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Json, app, count, err, out, place, plain_errors

data_app = typer.Typer(no_args_is_help=True, help="Build packed training data and look at it.")
app.add_typer(data_app, name="data")


@data_app.command("build")
def data_build(
    source: Annotated[
        list[str],
        typer.Option(
            help="NAME, or NAME=PLACE: a file, a folder, or a hub id; repeatable. Names: chatqa2, "
            "musique, colt, govreport, xsum, official.",
            metavar="NAME[=PLACE]",
        ),
    ],
    tokenizer: Annotated[
        str,
        typer.Option(
            help='Directory or hub id of the backbone, "tiny" or "smollm2".', metavar="NAME"
        ),
    ],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    min_length: Annotated[str, typer.Option(help="Fewest tokens of a sample.")] = "8k",
    max_length: Annotated[str, typer.Option(help="Most tokens of a sample.")] = "64k",
    pack: Annotated[str, typer.Option(help="Most tokens of a packed row.")] = "64k",
    mixture: Annotated[
        str | None,
        typer.Option(help="Share of the tokens of each source.", metavar="NAME=WEIGHT,..."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="End after this many tokens.")] = None,
    loss: Annotated[str, typer.Option(help="What is learnt: answer or all.")] = "answer",
    template: Annotated[
        str, typer.Option(help="chat, or plain for models without a chat template.")
    ] = "chat",
    seed: Annotated[int, typer.Option(help="Of orders and lengths.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes that tokenize.", min=1)] = 1,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace older data.")] = False,
    as_json: Json = False,
) -> None:
    """Build packed training data from the paper's sources. Counts may end in k or m (1024).

    Example: [bold]elasticore data build --source xsum --source musique=musique/ --tokenizer
    Qwen/Qwen3-4B --output data/mix --workers 8[/]
    """
    with plain_errors("train", f"nothing is left of it in {output}; build again."):
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

        from elasticore.data.building import build

        places = dict(_pair(one, "source", optional=True) for one in source)
        if len(places) < len(source):
            raise ValueError(f"source names a source twice: {', '.join(source)}.")
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[figures]}"),
            TimeElapsedColumn(),
            console=err,
            disable=not err.is_terminal,
        )
        lines = {name: bar.add_task(name, total=None, figures="") for name in places}

        next_told = dict.fromkeys(places, 1000)

        def step(name: str, records: int, sequences: int, tokens: int) -> None:
            figures = f"{records:,} records, {sequences:,} samples, {tokens:,} tokens"
            bar.update(lines[name], figures=figures)
            if bar.disable and records >= next_told[name]:  # a file wants few lines
                next_told[name] = 2 * records
                err.print(f"{name}: {figures}", highlight=False)

        with bar:
            card = build(
                places,
                tokenizer,
                output,
                min_length=count(min_length, "min-length"),
                max_length=count(max_length, "max-length"),
                pack=count(pack, "pack"),
                mixture=None if mixture is None else _weights(mixture),
                tokens=None if tokens is None else count(tokens, "tokens"),
                loss=loss,  # type: ignore[arg-type]
                template=template,  # type: ignore[arg-type]
                seed=seed,
                workers=workers,
                overwrite=overwrite,
                on_progress=step,
            )
    if as_json:
        print(json.dumps(card, indent=2))
        return
    _print_card(card)
    recipe = escape(json.dumps(str(output), ensure_ascii=False))  # which is YAML
    out.print(f"Data: {place(output)}   In a recipe: data: {{kind: packed, path: {recipe}}}")


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(help="What build made, or the official code's files.")],
    as_json: Json = False,
) -> None:
    """Show what packed data hold, and check that their files can be read.

    Example: [bold]elasticore data show data/mix[/]
    """
    with plain_errors("train"):
        from elasticore.data.card import show

        with err.status(f"reading {escape(str(path))}"):
            card = show(path)
    if as_json:
        print(json.dumps(card, indent=2))
        return
    _print_card(card)


def _pair(text: str, option: str, *, optional: bool = False) -> tuple[str, str | None]:
    """``NAME=VALUE`` in two; the value may be missing if it is optional."""
    name, equals, value = text.partition("=")
    if not name or (not value and (equals or not optional)):
        form = "NAME or NAME=PLACE" if optional else "NAME=WEIGHT"
        raise ValueError(f"{option} takes {form}, got {text!r}.")
    return name, value or None


def _weights(text: str) -> dict[str, float]:
    weights = {}
    for part in text.split(","):
        name, value = _pair(part.strip(), "mixture")
        try:
            weights[name] = float(value or "")
        except ValueError:
            raise ValueError(f"mixture takes NAME=WEIGHT, got {part.strip()!r}.") from None
    return weights


def _print_card(card: dict[str, Any]) -> None:
    fill = "" if card["fill"] is None else f", {card['fill']:.1%} full"
    for kind in ("tasks", "sources"):
        shown = Table(kind[:-1], title=kind.capitalize(), title_justify="left")
        for heading in ("sequences", "tokens", "learnt tokens"):
            shown.add_column(heading, justify="right")
        for name, counts in card[kind].items():
            figures = (counts[key] for key in ("sequences", "tokens", "learnt_tokens"))
            shown.add_row(escape(name), *(f"{figure:,}" for figure in figures))
        out.print(shown)
    lengths = "  ".join(f"{one['from']:,}+: {one['sequences']:,}" for one in card["lengths"])
    out.print(f"{card['rows']:,} rows, {card['tokens']:,} tokens{fill}. Lengths  {lengths}")
