"""``elasticore demo`` and ``run``: prompts answered by an elastic model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Backend, Json, app, err, out, plain_errors


@app.command()
def demo(
    backend: Backend = "auto",
    length: Annotated[int, typer.Option(help="Tokens of each prompt with its answer.")] = 4096,
    seed: Annotated[int, typer.Option(help="Of the prompts; all are held out.")] = 0,
    picture: Annotated[Path, typer.Option(help="Where the routing picture goes.")] = Path(
        "outputs/routing.png"
    ),
    router: Annotated[str | None, typer.Option(help="Directory of other routers.")] = None,
    as_json: Json = False,
) -> None:
    """Answer long prompts with the tiny model in the package, elastic beside full attention.

    Two prompts hide what they ask for far back in the text, two continue real code.

    Example: [bold]elasticore demo --picture routing.png[/]
    """
    with plain_errors():
        from transformers.utils.logging import disable_progress_bar

        from elasticore.choice import use_backend
        from elasticore.demo import run_demo
        from elasticore.eval.plots import routing_picture

        disable_progress_bar()  # one of our own is enough
        prompts = [("multikey", seed), ("tracking", seed), ("code", seed), ("code", seed + 1)]
        with use_backend(backend), err.status("loading the tiny model") as status:
            answers = run_demo(
                prompts=prompts,
                length=length,
                router=router,
                step=lambda text: status.update(f"answering {text}"),
            )
        frequency: dict[str, Any] = {}
        for task in dict.fromkeys(answer.task for answer in answers):
            tables = [answer.decisions.double() for answer in answers if answer.task == task]
            frequency[task] = sum(tables) / len(tables)
        routing_picture(frequency, picture, title="Which heads read sparsely, per task")
    if as_json:
        rows = [{**dataclasses.asdict(a), "decisions": a.decisions.tolist()} for a in answers]
        print(json.dumps({"answers": rows, "picture": str(picture)}, indent=2))
        return
    shown = Table(title=f"Prompts of about {length:,} tokens, backend {answers[0].backend}")
    for heading in ("task", "elastic", "full attention"):
        shown.add_column(heading)
    for heading in ("Ω_MSR", "Ω_ESR", "prefill", "full"):
        shown.add_column(heading, justify="right", no_wrap=True)
    for answer in answers:
        shown.add_row(
            answer.task,
            _told(answer, answer.text, 0),
            _told(answer, answer.full_text, 1),
            f"{answer.msr:.2f}",
            f"{answer.esr:.2f}",
            f"{answer.prefill_seconds:.2f} s",
            f"{answer.full_prefill_seconds:.2f} s",
            end_section=True,
        )
    out.print(shown)
    out.print(
        "[dim]Ω_MSR: share of sparse heads. Ω_ESR: share of query-key pairs left out. Retrieval "
        "tasks are right or wrong; for code, the share of the next 256 tokens that are the model's "
        "first choice.[/]"
    )
    out.print(f"Routing picture: [bold]{picture}[/]")


def _told(answer: Any, text: str, which: int) -> str:
    """An answer and whether it is right; ``which`` is 0 for elastic, 1 for full attention."""
    if not answer.sensitive:
        return f"{answer.accuracy[which]:.0%} of tokens\n[dim]{_clip(text)}[/]"
    if answer.correct[which]:
        return f"[green]right[/]\n{_clip(text)}"
    return f"[red]wrong[/]\n{_clip(text)} (not {_clip(answer.expected)})"


def _clip(text: str, width: int = 34) -> str:
    text = " ".join(text.split())
    return escape(text if len(text) <= width else text[: width - 1] + "…")


@app.command()
def run(
    model: Annotated[
        str, typer.Option(help='Directory or hub id of the backbone, "tiny" or "smollm2".')
    ],
    prompt_file: Annotated[Path, typer.Option(help="UTF-8 text to answer; - for standard input.")],
    router: Annotated[str | None, typer.Option(help="Directory or hub id of its routers.")] = None,
    backend: Backend = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    check_base: Annotated[
        bool, typer.Option(help="Insist on the weights the routers were trained on.")
    ] = True,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    thinking: Annotated[
        bool, typer.Option(help="Let a model that can think do so, with --chat.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt and show how it was routed.

    Example: [bold]elasticore run --model Qwen/Qwen3-4B --router ./routers --prompt-file long.txt[/]
    """
    with plain_errors():
        import torch

        from elasticore.choice import use_backend
        from elasticore.data.prompting import chat_tokens, prompt_tokens
        from elasticore.models.elastic import elasticize
        from elasticore.models.generating import greedy
        from elasticore.models.loading import TINY, load_backbone
        from elasticore.models.recording import record

        text = sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text("utf-8")
        if not text.strip():
            raise ValueError(f"prompt-file {prompt_file} is empty.")
        if thinking and not chat:
            raise ValueError("thinking is a setting of the chat template: pass --chat, too.")
        with use_backend(backend), err.status(f"loading {model}"):
            backbone, tokenizer = load_backbone(model, dtype)
            if router is None and model != TINY:
                raise ValueError("router is missing: pass --router with the trained routers.")
            elasticize(backbone, router or TINY, check_base=check_base)
        if chat:
            tokens = chat_tokens(tokenizer, text, thinking=thinking)
        else:
            tokens = prompt_tokens(tokenizer, text)
        length, longest = len(tokens), backbone.config.max_position_embeddings
        if length + max_new_tokens > longest:
            raise ValueError(
                f"prompt-file has {length} tokens, and with max_new_tokens={max_new_tokens} that "
                f"exceeds the {longest} positions of {model}; shorten one of them."
            )
        with (
            use_backend(backend),
            err.status(f"reading {length:,} tokens"),
            record() as trace,
            torch.no_grad(),
            greedy(backbone),
        ):
            inputs = torch.tensor([tokens], device=backbone.device)
            output = backbone.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
            )
        answer = tokenizer.decode(output[0, length:].tolist(), skip_special_tokens=True)
    one = trace.prefill
    figures = {
        "chat": chat,
        "thinking": thinking,
        "prompt_tokens": length,
        "new_tokens": output.shape[1] - length,
        "backend": one.backend,
        "backend_reason": one.backend_reason,
        "msr": float(one.msr[0]),
        "esr": float(one.esr[0]),
        "esr_last_query": float(one.esr_last_query[0]),
        "prefill_seconds": one.seconds,
    }
    if as_json:
        report = {"answer": answer, **figures, "decisions": one.decisions[:, 0].tolist()}
        print(json.dumps(report, indent=2))
        return
    out.print(escape(answer))
    err.print(
        f"[dim]{length:,} tokens · backend {one.backend} · Ω_MSR {figures['msr']:.2f} · Ω_ESR "
        f"{figures['esr']:.2f} · prefill {one.seconds:.2f} s[/]"
    )
