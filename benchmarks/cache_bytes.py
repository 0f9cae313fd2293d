"""Bytes of a cache that gives memory back, over the length of the prompt: a table and a picture.

Of one layer in the shape of Llama-3.1-8B, as allocated after a first generated token, times 32.

    python -m benchmarks.cache_bytes --output benchmarks/results/cache-bytes.json
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import matplotlib
import torch
import typer

from elasticore.machine import environment
from elasticore.models.paged_cache import PagedLayer

KV_HEADS, HEAD_DIM, LAYERS = 8, 128, 32
SINK, LOCAL, PAGE = 1, 16, 128
SHARES = (0.0, 0.5, 0.75, 0.875)
SIZES = {"sink": SINK, "local": LOCAL, "page_size": PAGE}


def allocated(length: int, share: float, room: int) -> int:
    """Bytes of all layers after a prompt of ``length`` tokens and a token more."""
    streaming = round(share * KV_HEADS)
    modes = torch.tensor([[1] * streaming + [0] * (KV_HEADS - streaming)], dtype=torch.int8)
    keys = torch.zeros(1, KV_HEADS, length, HEAD_DIM, dtype=torch.bfloat16)
    layer = PagedLayer(keys, keys, modes, None, **SIZES, room=room)
    layer.update(keys[:, :, :1], keys[:, :, :1])
    return LAYERS * layer.nbytes()


def main(
    length: Annotated[list[int], typer.Option(help="Tokens; repeatable.")] = [  # noqa: B006
        4096,
        8192,
        16384,
        32768,
        65536,
        131072,
    ],
    output: Annotated[Path | None, typer.Option(help="Where the bytes go, as JSON.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where the picture goes.")] = None,
) -> None:
    """Count what is allocated."""
    found: dict[str, Any] = {}
    for tokens in length:
        dense = 2 * 2 * LAYERS * KV_HEADS * HEAD_DIM * (tokens + 1)
        row = found[str(tokens)] = {"dense_gib": round(dense / 2**30, 4)}
        for share in SHARES:
            for kind, room in (("growing", -1), ("static", tokens + 64)):
                got = allocated(tokens, share, room)
                row[f"{kind}_{share:g}"] = round(got / 2**30, 4)
                row[f"{kind}_{share:g}_of_dense"] = round(got / dense, 4)
    result = {
        "what": "GiB of keys and values, as allocated: 32 layers, 8 KV heads, bfloat16",
        **environment(torch.device("cpu")),
        "command": shlex.join(["python", "-m", "benchmarks.cache_bytes", *sys.argv[1:]]),
        "lengths": found,
    }
    text = json.dumps(result, indent=1)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    else:
        print(text)
    if picture is not None:
        _draw(found, picture)


def _draw(found: dict[str, Any], picture: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 3.6), layout="constrained")
    lengths = [int(tokens) for tokens in found]
    ways = [("dense_gib", "dense", "black")]
    colours = ("tab:blue", "tab:orange", "tab:green")
    ways += [
        (f"growing_{share:g}", f"Ω {share:g}", colour)
        for share, colour in zip(SHARES[1:], colours, strict=True)
    ]
    for name, label, colour in ways:
        values = [row[name] for row in found.values()]
        axes.plot(lengths, values, marker="o", markersize=4, color=colour)
        axes.annotate(
            f"{label}: {values[-1]:.1f}",
            (lengths[-1], values[-1]),
            (6, 0),
            textcoords="offset points",
            va="center",
            color=colour,
        )
    axes.set_xscale("log", base=2)
    axes.set_xticks(lengths, [f"{tokens // 1024}K" for tokens in lengths])
    axes.set_xlim(lengths[0] * 0.9, lengths[-1] * 2.4)
    axes.set_ylim(0)
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("keys and values, GiB")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(picture, dpi=160)


if __name__ == "__main__":
    typer.run(main)
