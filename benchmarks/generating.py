"""Milliseconds per generated token of a whole model, through ``generate``: what a user types.

The model has the shape of Llama-3.1-8B and random weights. Beside the unchanged one, with a cache
that grows and with the compiled static cache, are elastic ones at several shares of streaming
heads, each row with a routing of its own.

    python -m benchmarks.generating --length 32768 --output benchmarks/results/generating.json
"""

from __future__ import annotations

import copy
import gc
import json
import shlex
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, CompileConfig, LlamaConfig, LogitsProcessor

import elasticore as ec
from elasticore.machine import environment
from elasticore.models.cache import ElasticCacheLayer
from elasticore.models.paged_cache import PagedLayer
from elasticore.models.versions import CACHE
from elasticore.router import Modules

console = Console(stderr=True)
UNTIMED = 16
"""Tokens before the first that counts: they hold the compiler and the recording of the graph."""


@dataclass(frozen=True)
class Way:
    """How the model attends and keeps its keys.

    Attributes
    ----------
    share
        Of streaming heads; None: the unchanged model.
    compiled
        With the static cache, which ``generate`` compiles for; else with the one that grows.
    cache
        What an elastic model keeps.
    ahead
        By ``elasticore.generate``, whose host is one step ahead; else by ``model.generate``.
    """

    share: float | None
    compiled: bool
    cache: Any = "elastic"
    ahead: bool = False

    def __str__(self) -> str:
        name = "sdpa" if self.share is None else f"elastic {self.share:g}"
        kind = "" if self.share is None or self.cache == "elastic" else f" {self.cache}"
        return f"{name}{kind} {'static' if self.compiled else 'dynamic'}{' ahead' * self.ahead}"


class Ticks(LogitsProcessor):
    """Notes when each token's logits are there, and the first step's logits."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.logits = device, []
        self.at: list[Any] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Change nothing."""
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.at.append(event)
            if len(self.at) == UNTIMED:
                torch.cuda.reset_peak_memory_stats(self.device)
        else:
            self.at.append(time.perf_counter())
        if len(self.at) <= 2:
            self.logits.append(scores.float())
        return scores

    def gaps(self) -> list[float]:
        """Milliseconds from token to token, those that count."""
        pairs = list(zip(self.at[UNTIMED:-1], self.at[UNTIMED + 1 :], strict=True))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
            return [one.elapsed_time(two) for one, two in pairs]
        return [(two - one) * 1e3 for one, two in pairs]


class Rows(nn.Module):
    """A policy of one layer that gives each row of the batch its own decisions."""

    boundary = 0

    def __init__(self, decisions: Tensor) -> None:
        super().__init__()
        self.register_buffer("decisions", decisions)

    def forward(self, keys: Tensor, segments: Any) -> ec.Routing:
        """Decide."""
        return ec.Routing(self.decisions.to(keys.device))


def routings(layers: int, kv_heads: int, rows: int, share: float) -> Tensor:
    """Decisions int8 ``[layers, rows, kv_heads]``, exactly ``share`` of each row's heads sparse."""
    tables = [ec.HeadTable.random(layers, kv_heads, share, seed=row).sparse for row in range(rows)]
    return torch.stack([torch.as_tensor(one) for one in tables], 1).to(torch.int8)


def held(cache: Any) -> int:
    """Bytes of keys and values, as allocated."""
    total = 0
    for layer in cache.layers:
        inner = layer.inner if isinstance(layer, ElasticCacheLayer) else layer
        if isinstance(inner, PagedLayer):
            total += inner.nbytes()
        else:
            total += inner.keys.nbytes + inner.values.nbytes
    return total


def measure(
    model: Any, way: Way, prompt: Tensor, tokens: int, sizes: ec.Elastic, mode: str | None = None
) -> dict[str, Any]:
    """Generate ``tokens`` tokens in a way, compiled in a mode of ``torch.compile``.

    Returns
    -------
    dict
        ``ms``: median of a token; ``logits`` of the prompt and of the first step; and what else.
    """
    twin = copy.deepcopy(model, {id(p): p for p in model.parameters()})
    config = model.config
    if way.share is not None:
        shape = config.num_hidden_layers, config.num_key_value_heads, len(prompt)
        rows = routings(*shape, way.share)
        policy = Modules([Rows(layer.to(prompt.device)) for layer in rows])
        ec.elasticize(twin, replace(sizes, policy=policy, cache=way.cache))
    ticks, since = Ticks(prompt.device), time.perf_counter()
    given: dict[str, Any] = {"max_new_tokens": tokens, "min_new_tokens": tokens}
    if way.compiled:
        given["cache_implementation"] = "static"
        if mode is not None:
            given["compile_config"] = CompileConfig(mode=mode)
    generate = partial(ec.generate, twin) if way.ahead else twin.generate
    out = generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        pad_token_id=0,
        logits_processor=[ticks],
        return_dict_in_generate=True,
        **given,
    )
    gaps = ticks.gaps()
    ms = statistics.median(gaps) if gaps else None
    gpu = prompt.device.type == "cuda"
    return {
        "ms": ms and round(ms, 3),
        "ms_min": gaps and round(min(gaps), 3),
        "tokens": len(gaps),
        "tokens_per_second": ms and round(len(prompt) * 1e3 / ms, 1),
        "cache_gib": round(held(getattr(out, CACHE)) / 2**30, 3),
        "peak_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2) if gpu else None,
        "seconds": round(time.perf_counter() - since, 1),
        "logits": ticks.logits,
        "first": out.sequences[:, prompt.shape[1]],
    }


def apart(found: dict[str, Any], reference: dict[str, Any]) -> float:
    """Relative difference of the first step's logits, of rows that got the same first token."""
    same = found["first"] == reference["first"]
    if not same.any():
        return float("nan")
    one, two = found["logits"][1][same], reference["logits"][1][same]
    return float((one - two).norm() / two.norm())


def main(
    length: Annotated[list[int], typer.Option(help="Tokens of the prompt; repeatable.")] = [32768],  # noqa: B006
    batch: Annotated[list[int], typer.Option(help="Rows; repeatable.")] = [1],  # noqa: B006
    share: Annotated[list[float], typer.Option(help="Of streaming heads; repeatable.")] = [  # noqa: B006
        0.75,
        0.0,
        0.5,
        0.9,
    ],
    tokens: Annotated[int, typer.Option(help="To generate.")] = 64,
    layers: Annotated[int, typer.Option(help="Of the model.")] = 32,
    small: Annotated[bool, typer.Option(help="A small model, to try this out.")] = False,
    plain: Annotated[bool, typer.Option(help="The unchanged model as well.")] = True,
    check: Annotated[bool, typer.Option(help="Compare with what runs uncompiled.")] = True,
    mode: Annotated[str | None, typer.Option(help="Of torch.compile, as max-autotune.")] = None,
    output: Annotated[Path | None, typer.Option(help="Where results go, as JSON.")] = None,
) -> None:
    """Time decoding, case by case."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = LlamaConfig(
        hidden_size=256 if small else 4096,
        intermediate_size=512 if small else 14336,
        num_hidden_layers=layers,
        num_attention_heads=8 if small else 32,
        num_key_value_heads=4 if small else 8,
        head_dim=64 if small else 128,
        vocab_size=1000 if small else 128256,
        max_position_embeddings=2 * max(length),
        rope_parameters={"rope_type": "default", "rope_theta": 5e5},
    )
    with device:
        torch.manual_seed(0)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        model = AutoModelForCausalLM.from_config(config, dtype=dtype).eval()
    model.generation_config.eos_token_id = None
    sizes = ec.Elastic(sparse=ec.Streaming(128, 2048), block_size=128)
    if small:
        sizes = ec.Elastic(sparse=ec.Streaming(16, 64), block_size=16)
    cases: dict[str, Any] = {}
    result = {
        "what": "milliseconds per token of a model in the shape of Llama-3.1-8B, by generate",
        **environment(device),
        "command": shlex.join(["python", "-m", "benchmarks.generating", *sys.argv[1:]]),
        "layers": layers,
        "cases": cases,
    }
    for size in length:
        for rows in batch:
            generator = torch.Generator().manual_seed(size + rows)
            prompt = torch.randint(0, config.vocab_size, (rows, size), generator=generator)
            case = _case(model, prompt.to(device), share, tokens, sizes, plain, check, mode)
            cases[f"{size}x{rows}"] = case
            if output is not None:  # what was measured so far is there, should the rest fail
                output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if output is None:
        print(json.dumps(result, indent=1))


def _case(
    model: Any,
    prompt: Tensor,
    shares: Sequence[float],
    tokens: int,
    sizes: ec.Elastic,
    plain: bool,
    check: bool,
    mode: str | None,
) -> dict[str, Any]:
    table = Table(title=f"{prompt.shape[1]:,} tokens, {len(prompt)} rows")
    for heading in ("", "ms", "min", "tokens/s", "cache GiB", "peak GiB", "apart", "s in all"):
        table.add_column(heading, justify="right" if heading else "left")
    case: dict[str, Any] = {}
    ways = [Way(share, True, ahead=ahead) for ahead in (True, False) for share in shares]
    if plain:
        ways = [Way(None, False), *ways, Way(None, True), Way(None, True, ahead=True)]
    references: dict[float | None, dict[str, Any]] = {}
    for way in ways:
        try:
            if way.share and way.share not in references and check:
                dense = Way(way.share, False, "dense")
                references[way.share] = measure(model, dense, prompt, 3, sizes)
            found = measure(model, way, prompt, tokens, sizes, mode)
        except Exception as error:
            if way.share is not None:
                raise
            case[str(way)] = {"failed": f"{type(error).__name__}: {str(error)[:200]}"}
            console.print(f"{way}: {case[str(way)]['failed']}", markup=False)
            continue
        finally:
            torch.compiler.reset()
            gc.collect()
            if prompt.device.type == "cuda":
                torch.cuda.empty_cache()
        reference = references.setdefault(way.share or None, found)
        difference = None if reference is found else round(apart(found, reference), 5)
        case[str(way)] = {
            **{name: x for name, x in found.items() if name not in ("logits", "first")},
            "apart": difference,
        }
        cells = [found["ms"], found["ms_min"], found["tokens_per_second"]]
        cells += [found["cache_gib"], found["peak_gib"], difference]
        table.add_row(str(way), *(str(x) for x in cells), str(found["seconds"]))
        console.print(f"{way}: {found['ms']} ms, apart {difference}", highlight=False)
    console.print(table)
    return case


if __name__ == "__main__":
    typer.run(main)
