"""Seconds to the first token and tokens a second in vLLM's CPU engine, beside vLLM as it is.

Engines take turns, so that what the machine does else falls on all alike, and the best round of
each counts. In vLLM's environment:

    .venv-vllm/bin/python -m benchmarks.serving --output benchmarks/results/serving-cpu.json
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Any

os.environ.update(
    {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "HF_HUB_OFFLINE": "1",
    }
)

import torch
import typer
from vllm import LLM, SamplingParams, TokensPrompt

from elasticore import AllRetrieval, Elastic, Streaming
from elasticore.assets import backbone_path
from elasticore.machine import environment

WAYS = ("vllm", "all full", "full", "routed")
"""vLLM as it is; with the plug-in, and all heads full; with routers, by how prompts are read."""


def engine(way: str, model: str, longest: int, folder: Path) -> LLM:
    """An engine that serves the model in a way."""
    settings: dict[str, Any] = {}
    if way == "all full":
        full = Elastic(AllRetrieval(), sparse=Streaming(128, 512), block_size=128)
        settings = {"router": str(full.save(folder))}
    elif way != "vllm":
        settings = {"router": model, "prefill": way}
    return LLM(
        backbone_path(model),
        dtype="bfloat16",
        max_model_len=longest,
        max_num_batched_tokens=longest + 8,  # prompts come whole in all of them
        max_num_seqs=8,
        enable_prefix_caching=False,
        additional_config={"elasticore": settings} if settings else {},
    )


def seconds(llm: LLM, length: int, count: int, tokens: int, seed: int) -> tuple[float, float]:
    """Until the first tokens are there, and for a step of the tokens after them."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(100, 40000, (count, length), generator=generator).tolist()
    sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    for number, prompt in enumerate(ids):
        name = f"{seed}-{number}"
        llm.llm_engine.add_request(name, TokensPrompt(prompt_token_ids=prompt), sampling)
    begun, times = time.perf_counter(), []
    waiting = set(range(count))
    first = 0.0
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            if output.outputs and output.outputs[0].token_ids:
                waiting.discard(int(output.request_id.split("-")[1]))
        now = time.perf_counter() - begun
        if not waiting:
            first = first or now
            times.append(now)
    steps = [b - a for a, b in itertools.pairwise(times)]
    return first, statistics.median(steps)


def main(
    model: Annotated[str, typer.Option(help="smollm2 or tiny.")] = "smollm2",
    length: Annotated[list[int], typer.Option(help="Tokens of a prompt; repeatable.")] = [  # noqa: B006
        1024,
        2048,
        4096,
        8000,
    ],
    batch: Annotated[list[int], typer.Option(help="Prompts at once; repeatable.")] = [1],  # noqa: B006
    tokens: Annotated[int, typer.Option(help="Tokens of an answer.")] = 33,
    rounds: Annotated[int, typer.Option(help="How often; the best counts.")] = 5,
    output: Annotated[Path | None, typer.Option(help="Where the times go, as JSON.")] = None,
) -> None:
    """Measure all ways in turns."""
    longest = max(length) + tokens
    with tempfile.TemporaryDirectory() as folder:
        engines = {way: engine(way, model, longest, Path(folder)) for way in WAYS}
    cases: dict[str, Any] = {}
    for count in batch:
        for tokens_in in length:
            found: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
            for turn in range(rounds + 1):
                order = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
                for way in order:
                    took = seconds(engines[way], tokens_in, count, tokens, turn)
                    if turn:  # the first one is for warming up
                        found[way].append(took)
            row = cases[f"{tokens_in}x{count}"] = {}
            best = {w: [min(x) for x in zip(*times, strict=True)] for w, times in found.items()}
            for way, (first, step) in best.items():
                row[way] = {
                    "first_token_s": round(first, 4),
                    "ms_a_token": round(1e3 * step, 3),
                    "first_token_ratio": round(first / best["vllm"][0], 4),
                    "speed_ratio": round(best["vllm"][1] / step, 4),
                }
                print(f"{tokens_in:>6} x {count}  {way:<9}", row[way], flush=True)
    if output is not None:
        about = {
            **environment(torch.device("cpu")),
            "command": f"python -m benchmarks.serving {shlex.join(sys.argv[1:])}",
            "model": model,
            "rounds": rounds,
            "cases": cases,
        }
        output.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)
