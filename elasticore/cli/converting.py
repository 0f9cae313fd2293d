"""``elasticore convert``: what others have released, as routers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Json, app, err, out, place, plain_errors
from elasticore.places import held

convert_app = typer.Typer(
    no_args_is_help=True, help="Turn what others have released into routers of this library."
)
app.add_typer(convert_app, name="convert")


@convert_app.command("official")
def convert_official(
    path: Annotated[Path, typer.Argument(help="Directory of an official Elastic Attention model.")],
    output: Annotated[Path, typer.Argument(help="Directory for the routers.", metavar="OUT")],
    model: Annotated[
        str | None, typer.Option(help="The backbone, for a checkpoint that does not hold it.")
    ] = None,
    threshold: Annotated[
        float, typer.Option(help="Of XAttention; the released evaluation uses 0.8.")
    ] = 0.9,
    as_json: Json = False,
) -> None:
    """Take the routers out of a checkpoint of the paper's authors, Qwen3 or Llama.

    Example: [bold]elasticore convert official ./Elastic-Qwen3-4B runs/official[/]
    """
    with plain_errors(), held(output):
        from elasticore.models.loading import load_backbone
        from elasticore.models.official import convert_official

        with err.status(escape(f"reading {path}")):
            backbone = None if model is None else load_backbone(model, "bfloat16")[0]
            done = convert_official(path, output, model=backbone, threshold=threshold)
    if as_json:
        report = {
            "router": str(done.path),
            "layers": done.layers,
            "mapped": [dict(zip(("theirs", "ours", "shape"), m, strict=True)) for m in done.mapped],
            "unread": done.unread,
            "way": done.way.to_dict(),
            "base_model": done.way.base,
            "notes": done.notes,
        }
        print(json.dumps(report, indent=2))
        return
    shown = Table(title=f"Routers of {done.layers} layers", title_justify="left")
    for heading in ("official, in each layer", "here", "shape"):
        shown.add_column(heading)
    for theirs, ours, shape in done.mapped:
        shown.add_row(theirs, ours, " × ".join(map(str, shape)))
    out.print(shown)
    if done.unread:
        out.print("Not read by inference: " + escape(", ".join(done.unread)))
    way, base = done.way, done.way.base or {}
    out.print(
        f"Way: {escape(repr(way))}. Backbone: {base['family']}, {base['kv_heads']} KV heads of "
        f"{base['head_dim']}."
    )
    for note in done.notes:
        out.print(f"[dim]{escape(note)}[/]")
    out.print(f"Routers: {place(done.path)}")


@convert_app.command("pattern")
def convert_pattern(
    path: Annotated[
        Path, typer.Argument(help="DuoAttention's directory, or a .tsv file of it or of PruLong.")
    ],
    output: Annotated[Path, typer.Argument(help="Directory for the pattern.", metavar="OUT")],
    model: Annotated[
        str, typer.Option(help='Directory or hub id of the backbone, "tiny" or "smollm2".')
    ],
    sparsity: Annotated[
        float | None, typer.Option(help="Share of heads that stream; default: gates below 0.5.")
    ] = None,
    sink: Annotated[
        int | None, typer.Option(help="Tokens; default: the pattern's, or 128.")
    ] = None,
    local: Annotated[
        int | None, typer.Option(help="Tokens; default: the pattern's, or 1024.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make a static pattern of DuoAttention or PruLong loadable as routers are.

    Example: [bold]elasticore convert pattern attn_patterns/Mistral-7B OUT --sparsity 0.5 --model
    mistralai/Mistral-7B-Instruct-v0.2[/]
    """
    with plain_errors(), held(output):
        import torch

        from elasticore.eval.methods import published
        from elasticore.models.elastic import way_of
        from elasticore.models.loading import load_backbone

        way = published(path, sparsity, sink, local)
        with err.status(escape(f"loading {model}")):
            backbone = load_backbone(model, "bfloat16")[0]
        with way.on(backbone):  # the table is of this model's sizes
            folder = way_of(backbone).save(output)
    table = torch.as_tensor(way.policy.sparse)  # type: ignore[attr-defined]
    share = float(table.double().mean())
    if as_json:
        report = {
            "router": str(folder),
            "msr": share,
            "sparse": table.int().tolist(),
            "way": way.to_dict(),
        }
        print(json.dumps(report, indent=2))
        return
    layers, kv_heads = table.shape
    shown = Table(title="Heads that stream: ×; full attention: ·", title_justify="left")
    shown.add_column("layer", justify="right")
    shown.add_column(f"{kv_heads} KV heads")
    for index, row in enumerate(table.tolist()):
        shown.add_row(str(index), " ".join("×" if sparse else "·" for sparse in row))
    out.print(shown)
    out.print(
        f"Ω_MSR {share:.3f} of {layers * kv_heads} heads; {escape(repr(way.sparse))}, blocks of "
        f"{way.block_size}. Pattern: {place(folder)}"
    )
