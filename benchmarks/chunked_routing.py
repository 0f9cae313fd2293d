"""How often a prompt in chunks is routed as in one go, by layer, on the tiny model.

The first layer decides the same by construction. A deeper layer's input has been touched by the
routing of the chunks before, so its decision may differ.

    python -m benchmarks.chunked_routing --output benchmarks/results/chunked-routing.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from torch import Tensor

import elasticore as ec
from elasticore.eval.tasks import TASKS, make_sample
from elasticore.machine import environment
from elasticore.models.loading import TINY, load_backbone
from elasticore.models.versions import CACHE


@torch.no_grad()
def decisions(model: Any, prompt: Tensor, chunk: int | None) -> Tensor:
    """What holds for decoding after a prompt ``[1, T]``: int8 ``[layers, kv_heads]``."""
    cache: dict[str, Any] = {}
    one = ec.Pass()
    for piece in [prompt] if chunk is None else prompt.split(chunk, 1):
        one = ec.Pass(prompt=piece.shape[1])  # a last piece of one token is prompt as well
        output = model(piece, use_cache=True, logits_to_keep=1, elastic=one, **cache)
        cache = {CACHE: getattr(output, CACHE)}
    return torch.stack([routing.decisions[0] for routing in one.routings])


def main(
    samples: Annotated[int, typer.Option(help="Prompts of each task.")] = 10,
    length: Annotated[int, typer.Option(help="Tokens of a prompt and its answer.")] = 2048,
    chunk: Annotated[list[int], typer.Option(help="Tokens of a chunk; repeatable.")] = [256, 1024],  # noqa: B006
    output: Annotated[Path | None, typer.Option(help="Where the counts go, as JSON.")] = None,
) -> None:
    """Compare the decisions after a prompt in chunks with those after one in one go."""
    model, tokenizer = load_backbone(TINY)
    ec.elasticize(model, TINY)
    prompts = [
        torch.as_tensor(sample.input_ids[: sample.start], device=model.device)[None]
        for task in TASKS
        for sample in (make_sample(task, tokenizer, length, seed) for seed in range(samples))
    ]
    same: dict[int, Tensor] = {size: torch.zeros(0) for size in chunk}
    for prompt in track(prompts, "prompts"):
        whole = decisions(model, prompt, None)
        for size in chunk:
            equal = (decisions(model, prompt, size) == whole).double().mean(1).cpu()
            same[size] = same[size] + equal if len(same[size]) else equal
    result = {
        "what": "share of a layer's head decisions that are the same after a prompt in chunks",
        **environment(model.device),
        "command": f"python -m benchmarks.chunked_routing --samples {samples} --length {length}",
        "prompts": len(prompts),
        "tokens": length,
        "by_chunk": {
            str(size): {
                "mean": round(float(total.mean()) / len(prompts), 4),
                "by_layer": [round(float(x) / len(prompts), 4) for x in total],
            }
            for size, total in same.items()
        },
    }
    text = json.dumps(result, indent=2)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    typer.run(main)
