"""A server with routers answers eight prompts at once: ``make serve-demo``.

Without a GPU it takes about three minutes, most of which vLLM's start and the prompts need.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from dataclasses import asdict, dataclass

from openai import AsyncOpenAI
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from elasticore import demo
from elasticore.assets import backbone_path
from elasticore.eval.tasks import make_sample
from recipes.serving.server import Server, serve

TASKS = {
    "smollm2": (
        "needle", "two-values", "far-fact", "far-sentence",
        "near-needle", "near-fact", "next-line", "near-sentence",
    ),
    "tiny": ("multikey", "tracking", "code") * 2 + ("multikey", "code"),
}  # fmt: skip


@dataclass(frozen=True)
class Answered:
    """One prompt's answer: its tokens, Ω_MSR, and when they came (seconds)."""

    task: str
    prompt_tokens: int
    sparse: float | None
    text: str
    tokens: int
    first_token: float
    tokens_per_second: float


async def ask(client: AsyncOpenAI, task: str, prompt: list[int], tokens: int) -> Answered:
    """One prompt, streamed."""
    begun, times, text = time.perf_counter(), [], ""
    stream = await client.completions.create(
        model="model", prompt=prompt, max_tokens=tokens, temperature=0, stream=True,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    async for part in stream:
        times.append(time.perf_counter() - begun)
        text += part.choices[0].text if part.choices else ""
    rate = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return Answered(task, len(prompt), None, text, len(times), times[0], rate)


async def ask_all(
    server: Server, prompts: list[tuple[str, list[int]]], tokens: int
) -> list[Answered]:
    """All prompts at once."""
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", timeout=600) as client:
        asked = [ask(client, task, prompt, tokens) for task, prompt in prompts]
        return list(await asyncio.gather(*asked))


def main() -> None:
    """Start, ask, show."""
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python -m recipes.serving.demo --model tiny --json"
    )
    parser.add_argument("--model", choices=TASKS, default="smollm2")
    parser.add_argument("--length", type=int, default=2000, help="tokens of the longest prompt")
    parser.add_argument("--tokens", type=int, default=16, help="tokens of every answer")
    parser.add_argument("--prefill", choices=("full", "routed"), default="full")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    options = parser.parse_args()
    say = Console(stderr=True)
    try:
        path = backbone_path(options.model)
    except FileNotFoundError as error:
        say.print(f"[bold red]error:[/] {error}")
        sys.exit(2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tasks = demo.DEMOS[options.model].tasks
    prompts = []
    for number, task in enumerate(TASKS[options.model]):
        length = options.length - 40 * number  # so that the log tells them apart
        sample = make_sample(task, tokenizer, length, number, tasks=tasks)
        prompts.append((task, sample.input_ids[: sample.start].tolist()))
    settings = {"router": options.model, "prefill": options.prefill, "log_requests": True}
    arguments = ["--max-model-len", str(options.length + options.tokens), "--max-num-seqs", "8"]
    if options.model == "tiny":
        arguments += ["--dtype", "float32"]
    with say.status(f"Starting vLLM with {options.model}"), serve(path, settings, arguments) as s:
        say.print(f"vLLM serves {options.model} at {s.url}; eight prompts are on their way.")
        found = asyncio.run(ask_all(s, prompts, options.tokens))
        shares = s.shares()
    done = [Answered(**asdict(one) | {"sparse": shares.get(one.prompt_tokens)}) for one in found]
    if options.json:
        print(json.dumps([asdict(one) for one in done], indent=2))
        return
    table = Table("task", "tokens", "sparse heads", "answer", "first token", "tokens/s")
    for one in done:
        share = "–" if one.sparse is None else f"{100 * one.sparse:.0f} %"
        words = " ".join(one.text.split())
        table.add_row(
            one.task, f"{one.prompt_tokens:,}", share, words, f"{one.first_token:.1f} s",
            f"{one.tokens_per_second:.1f}",
        )  # fmt: skip
    Console().print(table)


if __name__ == "__main__":
    main()
