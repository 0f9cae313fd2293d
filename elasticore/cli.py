"""The ``elasticore`` command."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Elastic attention: each KV head chooses full or sparse attention per input.",
)
data_app = typer.Typer(no_args_is_help=True, help="Build packed training data and look at it.")
app.add_typer(data_app, name="data")
convert_app = typer.Typer(
    no_args_is_help=True, help="Turn what others have released into routers of this library."
)
app.add_typer(convert_app, name="convert")
plot_app = typer.Typer(no_args_is_help=True, help="Draw what runs have logged.")
app.add_typer(plot_app, name="plot")
out, err = Console(), Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output instead.")]
Backend = Annotated[
    str, typer.Option(help="What runs the attention; see `elasticore doctor`.", metavar="NAME")
]
_PACKAGES = (
    "torch",
    "transformers",
    "triton",
    "flashinfer-python",
    "accelerate",
    "pyarrow",
    "datasets",
    "matplotlib",
)


@contextmanager
def _plain_errors() -> Iterator[None]:
    """Bad input ends in one line and exit code 2, not in a traceback."""
    try:
        yield
    except (ValueError, TypeError, ArithmeticError, OSError, RuntimeError, ImportError) as error:
        if "--traceback" in sys.argv:
            raise
        err.print(f"[bold red]error:[/] {escape(str(error))}")
        if not isinstance(error, (ValueError, OSError)):  # perhaps not the user's doing
            err.print("[dim]elasticore --traceback COMMAND shows where it came from.[/]")
        raise typer.Exit(2) from error


@app.callback(invoke_without_command=True)
def main(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
    traceback: Annotated[bool, typer.Option(help="Show where an error came from.")] = False,
) -> None:
    """Run before every command."""
    if version:
        from elasticore import __version__

        out.print(__version__)
        raise typer.Exit


@app.command()
def doctor(as_json: Json = False) -> None:
    """Show versions, devices and backends, what auto would run, and why.

    Where a backend is not available, its reason says what to do.

    Example: [bold]elasticore doctor[/]
    """
    import torch

    from elasticore import __version__
    from elasticore.backends.registry import AUTO, backends, choose
    from elasticore.backends.typical import typical_requests

    versions: dict[str, str | None] = {
        "elasticore": __version__,
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = None
    devices = [f"cpu ({torch.get_num_threads()} threads)"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        devices.append(
            f"cuda:{index} {properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"sm_{properties.major}{properties.minor}"
        )
    table = backends()
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    choices = {name: choose(AUTO, request) for name, request in typical_requests(device).items()}
    if as_json:
        report = {
            "versions": versions,
            "devices": devices,
            "backends": [backend._asdict() for backend in table],
            "auto": {
                name: {"backend": choice.name, "reason": choice.reason}
                for name, choice in choices.items()
            },
        }
        print(json.dumps(report, indent=2))
        return
    lines = Table("package", "version", title="Versions", title_justify="left")
    for package, found in versions.items():
        lines.add_row(package, found or "[dim]not installed[/]")
    out.print(lines)
    out.print("[bold]Devices[/]", *devices, sep="\n  ")
    shown = Table("backend", "available", "lanes", "devices", title="Backends")
    shown.title_justify = "left"
    for backend in table:
        available = "[green]yes[/]" if backend.available else "[red]no[/]"
        shown.add_row(
            backend.name,
            available,
            " ".join(backend.lanes),
            " ".join(backend.devices),
        )
    out.print(shown)
    for backend in table:
        if backend.reason:
            out.print(f"  [bold]{backend.name}[/]: {escape(backend.reason)}")
    picks = Table("call", "backend", "why", title=f"What auto runs on {device}, in bfloat16")
    picks.title_justify = "left"
    for name, choice in choices.items():
        picks.add_row(name, choice.name, escape(choice.reason))
    out.print(picks)


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
    with _plain_errors():
        from transformers.utils.logging import disable_progress_bar

        from elasticore.backends.registry import use_backend
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
    model: Annotated[str, typer.Option(help='Directory or hub id of the backbone, or "tiny".')],
    prompt_file: Annotated[Path, typer.Option(help="UTF-8 text to answer; - for standard input.")],
    router: Annotated[str | None, typer.Option(help="Directory or hub id of its routers.")] = None,
    backend: Backend = "auto",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    check_base: Annotated[
        bool, typer.Option(help="Insist on the weights the routers were trained on.")
    ] = True,
    chat: Annotated[bool, typer.Option(help="Wrap the prompt in the chat template.")] = False,
    as_json: Json = False,
) -> None:
    """Answer one prompt and show how it was routed.

    Example: [bold]elasticore run --model Qwen/Qwen3-4B --router ./routers --prompt-file long.txt[/]
    """
    with _plain_errors():
        import torch

        from elasticore.backends.registry import use_backend
        from elasticore.models.files import load_router
        from elasticore.models.loading import TINY, load_backbone
        from elasticore.models.recording import record

        text = sys.stdin.read() if str(prompt_file) == "-" else prompt_file.read_text("utf-8")
        if not text.strip():
            raise ValueError(f"prompt-file {prompt_file} is empty.")
        with use_backend(backend), err.status(f"loading {model}"):
            backbone, tokenizer = load_backbone(model, dtype)
            if router is None and model == TINY:
                from elasticore.assets import tiny

                router = str(tiny() / "router")
            if router is None:
                raise ValueError("router is missing: pass --router with the trained routers.")
            load_router(backbone, router, check_base=check_base)
        if chat:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
            )
        inputs = tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        inputs = inputs.to(backbone.device)
        length, longest = inputs["input_ids"].shape[1], backbone.config.max_position_embeddings
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
        ):
            output = backbone.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        answer = tokenizer.decode(output[0, length:].tolist(), skip_special_tokens=True)
    one = trace.prefill
    figures = {
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


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="YAML recipe; see docs, Training.")],
    output: Annotated[Path, typer.Option(help="Directory for checkpoints and routers.")] = Path(
        "runs/routers"
    ),
    resume: Annotated[
        str | None,
        typer.Option(
            help="Checkpoint to go on from, or a run's folder; auto: the newest of --output.",
            metavar="auto|FOLDER",
        ),
    ] = None,
    backend: Annotated[str | None, typer.Option(help="Instead of the recipe's.")] = None,
    max_steps: Annotated[int | None, typer.Option(help="Instead of the recipe's.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="Instead of the recipe's.")] = None,
    changes: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="Change a setting, such as elastic.boundary=50; repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything and show what would run.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Train the routers of a frozen backbone.

    Example: [bold]elasticore train --config recipes/tiny/routers.yaml --output runs/tiny[/]
    """
    with _plain_errors():
        from elasticore.train.recipe import Recipe
        from elasticore.train.recipe import train as run_recipe

        recipe = Recipe.load(config, changes or (), backend=backend, max_steps=max_steps, seed=seed)
        whole = _show_recipe(recipe, as_json) if dry_run else True
        path = output if dry_run else run_recipe(recipe, output, resume=resume)
    if dry_run:
        raise typer.Exit(0 if whole else 1)
    if os.environ.get("RANK", "0") != "0":  # one of several processes speaks for all
        return
    if as_json:
        history = json.loads((output / "history.json").read_text("utf-8"))
        print(json.dumps({"router": str(path), "final": history[-1] if history else None}))
        return
    out.print(f"Routers: [bold]{path}[/]   Curves: elasticore plot training {output}")


def _show_recipe(recipe: Any, as_json: bool) -> bool:
    """Print what a recipe would run; return whether all of it could be checked here."""
    from elasticore.train.preview import preview

    found = preview(recipe)
    if os.environ.get("RANK", "0") == "0":
        if as_json:
            print(json.dumps(dataclasses.asdict(found), indent=2))
        else:
            shown = Table(show_header=False, title="What would run", title_justify="left")
            for name, value in found.figures.items():
                number = {int: ",", float: ",.3f"}.get(type(value), "")
                shown.add_row(name, escape(format(value, number) if number else str(value)))
            out.print(shown)
        for reason in found.unchecked:
            err.print(f"[yellow]not checked:[/] {escape(reason)}")
    return not found.unchecked


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
        str, typer.Option(help='Directory or hub id of the backbone, or "tiny".', metavar="NAME")
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
    with _plain_errors():
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
        )
        lines = {name: bar.add_task(name, total=None, figures="") for name in places}

        def step(name: str, records: int, sequences: int, tokens: int) -> None:
            figures = f"{records:,} records, {sequences:,} samples, {tokens:,} tokens"
            bar.update(lines[name], figures=figures)

        with bar:
            card = build(
                places,
                tokenizer,
                output,
                min_length=_count(min_length, "min-length"),
                max_length=_count(max_length, "max-length"),
                pack=_count(pack, "pack"),
                mixture=None if mixture is None else _weights(mixture),
                tokens=None if tokens is None else _count(tokens, "tokens"),
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
    out.print(f"Data: [bold]{output}[/]   In a recipe: data: {{kind: packed, path: {output}}}")


@data_app.command("show")
def data_show(
    path: Annotated[Path, typer.Argument(help="What build made, or the official code's files.")],
    as_json: Json = False,
) -> None:
    """Show what packed data hold, and check that their files can be read.

    Example: [bold]elasticore data show data/mix[/]
    """
    with _plain_errors():
        from elasticore.data.card import show

        with err.status(f"reading {path}"):
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


def _count(text: str, option: str) -> int:
    """A count such as 1000, 8k (8,192) or 700m."""
    digits, unit = (text[:-1], text[-1].lower()) if text[-1:].isalpha() else (text, "")
    units = {"": 1, "k": 1 << 10, "m": 1 << 20}
    if not digits.isdecimal() or unit not in units:
        raise ValueError(f"{option} must be a count such as 8192, 8k or 700m, got {text!r}.")
    return int(digits) * units[unit]


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
    with _plain_errors():
        from elasticore.models.loading import load_backbone
        from elasticore.models.official import convert_official

        with err.status(f"reading {path}"):
            backbone = None if model is None else load_backbone(model, "bfloat16")[0]
            done = convert_official(path, output, model=backbone, threshold=threshold)
    if as_json:
        report = {
            "router": str(done.path),
            "layers": done.layers,
            "mapped": [dict(zip(("theirs", "ours", "shape"), m, strict=True)) for m in done.mapped],
            "unread": done.unread,
            "config": done.config.to_dict(),
            "base_model": done.base_model,
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
    config, base = done.config, done.base_model
    out.print(
        f"Settings: {config.mode}, sink {config.sink}, local {config.local}, hidden multiplier "
        f"{config.hidden_multiplier}. Backbone: {base['family']}, {base['kv_heads']} KV heads of "
        f"{base['head_dim']}."
    )
    for note in done.notes:
        out.print(f"[dim]{escape(note)}[/]")
    out.print(f"Routers: [bold]{done.path}[/]")


@convert_app.command("pattern")
def convert_pattern(
    path: Annotated[
        Path, typer.Argument(help="DuoAttention's directory, or a .tsv file of it or of PruLong.")
    ],
    output: Annotated[Path, typer.Argument(help="Directory for the pattern.", metavar="OUT")],
    model: Annotated[str, typer.Option(help='Directory or hub id of the backbone, or "tiny".')],
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
    with _plain_errors():
        from elasticore.models.loading import load_backbone
        from elasticore.models.static import convert_pattern

        with err.status(f"loading {model}"):
            backbone = load_backbone(model, "bfloat16")[0]
            done = convert_pattern(
                path, output, backbone, sparsity=sparsity, sink=sink, local=local
            )
    share = float(done.sparse.double().mean())
    if as_json:
        report = {
            "router": str(done.path),
            "msr": share,
            "sparse": done.sparse.int().tolist(),
            "config": done.config.to_dict(),
        }
        print(json.dumps(report, indent=2))
        return
    layers, kv_heads = done.sparse.shape
    shown = Table(title="Heads that stream: ×; full attention: ·", title_justify="left")
    shown.add_column("layer", justify="right")
    shown.add_column(f"{kv_heads} KV heads")
    for index, row in enumerate(done.sparse.tolist()):
        shown.add_row(str(index), " ".join("×" if sparse else "·" for sparse in row))
    out.print(shown)
    config = done.config
    out.print(
        f"Ω_MSR {share:.3f} of {layers * kv_heads} heads; sink {config.sink}, local "
        f"{config.local}, blocks of {config.block_size}. Pattern: [bold]{done.path}[/]"
    )


@plot_app.command("training")
def plot_training(
    runs: Annotated[
        list[Path],
        typer.Argument(
            help="Output folder of a run, finished or not, or a file of its log; several are drawn "
            "as mean and spread.",
            metavar="RUN...",
        ),
    ],
    output: Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")] = Path(
        "outputs/training.png"
    ),
    csv: Annotated[Path | None, typer.Option(help="Also write all figures as a table.")] = None,
    every: Annotated[
        int, typer.Option(help="Only every n-th log in --csv and --json; the last always.", min=1)
    ] = 1,
    as_json: Json = False,
) -> None:
    """Draw how a training run went, or several seeds of it (the paper's Figure 13).

    Losses, Ω_MSR with its targets, multipliers, entropy and temperature over the steps.

    Example: [bold]elasticore plot training runs/tiny --output training.pdf[/]
    """
    with _plain_errors():
        from elasticore.drawing import check_picture
        from elasticore.train.curves import ending, read_curves, to_json, write_csv
        from elasticore.train.plots import training_picture

        check_picture("output", output)
        found = [curves for run in runs for curves in read_curves(run)]
        training_picture(found, output)
        thin = [curves.every(every) for curves in found]
        if csv is not None:
            write_csv(thin, csv)
    end = ending(found)
    if as_json:
        last = {name: {"mean": mean, "spread": spread} for name, (mean, spread) in end.items()}
        print(json.dumps({"picture": str(output), "end": last, **to_json(thin)}, indent=1))
        return

    def shown(name: str) -> str:
        if name not in end:
            return ""
        mean, spread = end[name]
        digits = 0 if mean >= 100 else 3
        return f"{mean:,.{digits}f}" + (f" ± {spread:,.{digits}f}" if len(found) > 1 else "")

    targets = {task: bounds for curves in found for task, bounds in curves.targets.items()}
    lines = Table(title="At the end", title_justify="left")
    for heading in ("task", "Ω_MSR", "target", "λ1", "λ2"):
        lines.add_column(heading, justify="left" if heading == "task" else "right")
    for task in dict.fromkeys(task for curves in found for task in curves.tasks):
        target = " to ".join(f"{bound:g}" for bound in dict.fromkeys(targets.get(task, ())))
        multipliers = (shown(f"{name}/{task}") for name in ("lambda1", "lambda2"))
        lines.add_row(escape(task), shown(f"msr/{task}"), target, *multipliers)
    out.print(lines)
    layers = [name for name in end if name.startswith("entropy/")]
    lowest = min(layers, key=end.__getitem__, default="")
    named = {
        "LM loss": "lm_loss",
        "distillation loss": "distillation",
        "regularisation loss": "penalty",
        "entropy, nats": "entropy",
        f"lowest: {lowest.partition('/')[2]}": lowest,
        "τ": "temperature",
        "tokens/s": "tokens_per_second",
        "peak memory, GB": "peak_memory_gb",
    }
    figures = Table(show_header=False)
    figures.add_column()
    figures.add_column(justify="right")
    for text, name in named.items():
        if name in end:
            figures.add_row(text, shown(name))
    out.print(figures)
    for curves in found:
        whole = "" if curves.max_steps is None else f" of {curves.max_steps:,}"
        out.print(f"{escape(curves.name)}: step {curves.last_step:,}{whole}", highlight=False)
    out.print(f"Picture: [bold]{output}[/]" + (f"   Table: [bold]{csv}[/]" if csv else ""))


@app.command()
def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(help="attention, decode, router, selector or e2e; repeatable; default: all."),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="Only this engine; repeatable.", metavar="NAME")
    ] = None,
    length: Annotated[
        list[int] | None, typer.Option(help="Only cases of this many tokens; repeatable.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Layers of the model of suite e2e.", min=1)
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Where the figures go, as JSON.")
    ] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Where the picture goes; several suites add their names.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Only short cases, and few runs.")] = False,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Run nothing: show and draw the figures of this JSON file."),
    ] = None,
) -> None:
    """Time attention, decoding, routers, selectors and whole models, beside other engines.

    Example: [bold]elasticore bench --suite attention --json attention.json --plot attention.png[/]
    """
    with _plain_errors():
        import torch
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        from elasticore.bench.cases import SUITES, Case, Engine, cases_of
        from elasticore.bench.plots import picture
        from elasticore.bench.report import Results, environment, read_json, table, write_json
        from elasticore.bench.run import Record, Session
        from elasticore.bench.timing import Clock
        from elasticore.drawing import pyplot

        if plot is not None:
            pyplot()
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

        def measure() -> Results:
            cases = [
                case
                for name in dict.fromkeys(suite or SUITES)
                for case in cases_of(name, device, quick=quick, lengths=length or (), layers=layers)
            ]
            session = Session(cases, Clock(device, budget_ms=20 if quick else 150), engine or ())
            about = environment(device)
            finished: list[tuple[Case, list[Record]]] = []
            bar = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), console=err
            )
            task = bar.add_task("", total=sum(len(engines) for _, engines in session.plan))

            def step(case: Case, engine: Engine) -> None:
                bar.update(task, description=f"{case} {engine}", advance=1)

            with bar:
                for one in session.run(step):
                    finished.append(one)
                    # After each case: a run that is cut short leaves those.
                    if json_file is not None:
                        write_json(finished, about, json_file)
            return finished

        if source is None:
            results = measure()
        elif suite or engine or length or layers or json_file or quick:
            raise ValueError("from shows a file as it is; beside it only plot can be given.")
        else:
            results = read_json(source)
        suites = list(dict.fromkeys(case.suite for case, _ in results))
        for name in suites:
            out.print(table(results, name))
        if plot is not None:
            for name in suites:
                own = plot.with_stem(f"{plot.stem}-{name}") if len(suites) > 1 else plot
                if picture(results, name, own):
                    out.print(f"Picture: [bold]{own}[/]")
    if source is None and device.type == "cpu":
        out.print("[yellow]No NVIDIA GPU: the cases are small, and their times mean little.[/]")
    if any(record.failed for _, records in results for record in records):
        raise typer.Exit(1)


eval_app = typer.Typer(help="Evaluate a model, and compare evaluations.")
app.add_typer(eval_app, name="eval")


@eval_app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help='Directory or hub id of the backbone, or "tiny".')
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(help="offline, ruler, longbench-e, longbench-v2, or tasks, as offline:vt."),
    ] = "offline",
    router: Annotated[
        str | None, typer.Option(help="Directory of trained routers; a method of its own.")
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="full, streaming, xattention:threshold=0.9, ...; repeatable."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, as 4096 or 8k,16k.")] = "4k",
    limit: Annotated[int | None, typer.Option(help="Tokens of prompts that are cut.")] = None,
    samples: Annotated[int | None, typer.Option(help="Of each task; default: all.", min=1)] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmarks' files.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of answers and scores.")] = Path("runs/eval"),
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    chat: Annotated[bool, typer.Option(help="Apply the chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the samples that are made here.")] = 0,
    backend: Backend = "auto",
    check_base: Annotated[
        bool, typer.Option(help="Insist on the weights the routers were trained on.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Ask a model the questions of long-context benchmarks, with its sparsity beside every score.

    Stopped half way, the same command goes on where it was.

    Example: [bold]elasticore eval --model tiny --router ROUTERS --tasks offline --lengths 2k,4k[/]
    """
    if context.invoked_subcommand is not None:
        return
    with _plain_errors():
        import logging

        from rich.progress import track
        from transformers.utils.logging import disable_progress_bar

        from elasticore.eval.evaluate import Evaluation
        from elasticore.eval.evaluate import evaluate as run_evaluation
        from elasticore.eval.report import read_report

        if model is None:
            raise ValueError("model is missing: pass --model with a directory or hub id.")
        chosen = list(method or [])
        if router is not None:
            chosen.append(f"elastic=router:path={router}")
        disable_progress_bar()  # ours says more
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        evaluation = Evaluation(
            model=model,
            tasks=tuple(part.strip() for part in tasks.split(",")),
            methods=tuple(chosen or ["full"]),
            lengths=tuple(_count(part, "lengths") for part in lengths.split(",")),
            limit=limit,
            samples=samples,
            data=None if data is None else str(data),
            dtype=dtype,
            batch_size=batch_size,
            backend=backend,
            chat=chat,
            seed=seed,
        )
        run_evaluation(
            evaluation,
            output,
            check_base=check_base,
            progress=lambda name, batches: track(batches, f"answering, {name}", console=err),
        )
        _show_report(read_report([output]), None, as_json)
    err.print(f"[dim]Answers, scores and settings: {output}[/]")


@eval_app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `elasticore eval`.")],
    metric: Annotated[str, typer.Option(help="Which of a task's numbers.")] = "score",
    groups: Annotated[bool, typer.Option("--groups", help="Without the single tasks.")] = False,
    form: Annotated[
        str | None, typer.Option("--format", help="csv, markdown or latex, instead of a table.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare evaluations: a row per method, a column per task.

    Example: [bold]elasticore eval report runs/eval --format latex > table.tex[/]
    """
    with _plain_errors():
        from elasticore.eval.report import read_report

        _show_report(read_report(runs, metric, groups), form, as_json)


def _show_report(found: Any, form: str | None, as_json: bool) -> None:
    if as_json:
        print(json.dumps([dict(zip(found.columns, row, strict=True)) for row in found.rows]))
        return
    if form is not None:
        print(found.as_text(form), end="")
        return
    from elasticore.eval.report import number

    # A column for each method, as there are more tasks than methods.
    shown = Table()
    shown.add_column("", no_wrap=True)
    for row in found.rows:
        shown.add_column(row[0], justify="right")
    for place, column in enumerate(found.columns[1:], 1):
        shown.add_row(column, *(number(row[place]) for row in found.rows))
    out.print(shown)
