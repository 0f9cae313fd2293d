"""The same answers from a cache that gives memory back, and what both cost: all tasks, by generate.

python -m recipes.smollm2.caches --samples 2     # ten minutes on two cores, less on a GPU
"""

from __future__ import annotations

import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from statistics import fmean, median
from typing import Annotated, Any

import torch
import typer
from rich.progress import track
from rich.table import Table
from transformers import StoppingCriteria

import elasticore as ec
from elasticore.eval.chat_tasks import TASKS
from elasticore.eval.tasks import make_sample
from elasticore.models.cache import ElasticCacheLayer
from elasticore.models.generating import greedy
from elasticore.models.loading import load_backbone
from elasticore.models.paged_cache import PagedLayer
from elasticore.models.versions import CACHE
from elasticore.train import Recipe
from recipes.smollm2.levers import CONFIG
from recipes.study.about import about
from recipes.study.runs import console


class Clock(StoppingCriteria):
    """Stops nothing; notes when every token is there."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.at = device, [time.perf_counter()]

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """Note it."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.at.append(time.perf_counter())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def held(cache: Any) -> int:
    """Bytes of keys and values, as allocated."""
    inner = [one.inner if isinstance(one, ElasticCacheLayer) else one for one in cache.layers]
    return sum(
        one.nbytes() if isinstance(one, PagedLayer) else one.keys.nbytes + one.values.nbytes
        for one in inner
    )


def answered(model: Any, ids: torch.Tensor, tokens: int) -> dict[str, Any]:
    """Greedy tokens, seconds to the first one, milliseconds of each other, bytes of the cache."""
    clock = Clock(model.device)
    with greedy(model):
        out = model.generate(
            ids,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            stopping_criteria=[clock],
            return_dict_in_generate=True,
        )
    gaps = [1e3 * (two - one) for one, two in zip(clock.at[1:-1], clock.at[2:], strict=True)]
    return {
        "tokens": out.sequences[0, ids.shape[1] :].tolist(),
        "first_seconds": clock.at[1] - clock.at[0],
        "ms": median(gaps),
        "bytes": held(getattr(out, CACHE)),
    }


def run(
    samples: Annotated[int, typer.Option(min=1, help="Held-out ones of each task.")] = 2,
    length: Annotated[int, typer.Option(help="Their tokens.")] = 4096,
    tokens: Annotated[int, typer.Option(min=3, help="To generate.")] = 16,
    dtype: Annotated[str, typer.Option(help="Of the model.")] = "float32",
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "runs/smollm2/caches.json"
    ),
) -> None:
    """Generate with the plain model, and elastic with either cache."""
    recipe = Recipe.load(CONFIG)
    model, tokenizer = load_backbone(recipe.backbone, dtype)
    shipped = ec.Elastic.load("smollm2")
    ways: dict[str, AbstractContextManager[Any] | ec.Elastic] = {
        "plain": nullcontext(),
        "dense": shipped,
        "elastic": replace(shipped, cache="elastic"),
    }
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in ways}
    jobs = [(task, number) for number in range(samples) for task in recipe.targets]
    same = {task: 0 for task in recipe.targets}
    for task, number in track(jobs, "prompts", console=console, transient=True):
        sample = make_sample(task, tokenizer, length, number, "heldout", TASKS)
        ids = torch.as_tensor(sample.input_ids[: sample.start])[None].to(model.device)
        for name, way in ways.items():
            with way.on(model) if isinstance(way, ec.Elastic) else way:
                found[name].append(answered(model, ids, tokens))
        same[task] += found["dense"][-1]["tokens"] == found["elastic"][-1]["tokens"]
    table = Table(title=f"{len(jobs)} prompts of {length:,} tokens")
    for heading in ("", "s to the first token", "ms a token", "cache, MiB"):
        table.add_column(heading, justify="right" if heading else "left")
    rows = {}
    for name, own in found.items():
        rows[name] = {
            "first_seconds": round(fmean(one["first_seconds"] for one in own), 3),
            "ms": round(fmean(one["ms"] for one in own), 2),
            "cache_mib": round(fmean(one["bytes"] for one in own) / 2**20, 1),
        }
        table.add_row(name, *(f"{value:,.2f}" for value in rows[name].values()))
    console.print(table)
    console.print(f"The same {tokens} tokens with both caches: {sum(same.values())} of {len(jobs)}")
    report = {
        **about("answers with either cache", "python -m recipes.smollm2.caches"),
        "settings": {"samples": samples, "length": length, "tokens": tokens, "dtype": dtype},
        "same": sum(same.values()),
        "prompts": len(jobs),
        "same_by_task": same,
        "rows": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"Figures: [bold]{output}[/]")


if __name__ == "__main__":
    typer.run(run)
