"""``elasticore analyze``: what heads and routers do, as pictures and tables."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Backend, Json, app, err, out, place, plain_errors
from elasticore.cli.preparing import bar, load, prompts_of, route, router_of, way_to_read

analyze_app = typer.Typer(
    no_args_is_help=True, help="Look into heads and routers: a picture, and a CSV file beside it."
)
app.add_typer(analyze_app, name="analyze")

SENSITIVE = "needle,multikey,tracking"
ALL = f"{SENSITIVE},code,prose"

Model = Annotated[
    str, typer.Option(help='Directory or hub id of the backbone, "tiny" or "smollm2".')
]
Router = Annotated[
    str | None, typer.Option(help="Directory or hub id of its routers; tiny brings its own.")
]
Tasks = Annotated[str, typer.Option(help="Tasks that are made here, with commas.")]
Length = Annotated[str, typer.Option(help="Tokens of prompt and answer, as 4096 or 8k.")]
Samples = Annotated[int, typer.Option(help="Prompts of each task.", min=1)]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16 or float16.")]
Seed = Annotated[int, typer.Option(help="Of the first sample; the others follow.", min=0)]
Output = Annotated[Path, typer.Option(help="The picture: .png, .svg or .pdf.")]
Method = Annotated[
    str | None,
    typer.Option(
        help="What a sparse head reads, as streaming:sink=128,local=2048 or "
        "xattention:threshold=0.9; default: as the routers have it, or the paper's streaming."
    ),
]


@analyze_app.command()
def retrieval(
    model: Model = "tiny",
    tasks: Tasks = SENSITIVE,
    length: Length = "2k",
    samples: Samples = 4,
    rows: Annotated[
        str, typer.Option(help="Whose attention counts: last, the prompt's end, or answer.")
    ] = "last",
    dtype: Dtype = "bfloat16",
    seed: Seed = 0,
    output: Output = Path("outputs/retrieval.png"),
    as_json: Json = False,
) -> None:
    """Which heads retrieve: their attention on what the answer rests on (Eq. 9).

    Example: [bold]elasticore analyze retrieval --model Qwen/Qwen3-4B --length 8k[/]
    """
    with _analysis(output):
        from elasticore.eval.analysis import retrieval_scores
        from elasticore.eval.analysis.plots import retrieval_picture

        backbone, tokenizer = load(model, dtype)
        prompts = prompts_of(backbone, tokenizer, tasks, length, samples, seed)
        found = retrieval_scores(
            backbone,
            prompts,
            rows,  # type: ignore[arg-type]
            progress=bar("looking at heads"),
        )
        retrieval_picture(found, output, title=f"Retrieval scores, {model}")
    lines = found.rows()
    shown = Table(title="Heads that retrieve most", title_justify="left")
    for name in lines[0]:
        shown.add_column(name.replace("_", " "), justify="right")
    for line in sorted(lines, key=lambda line: -float(line["score"]))[:10]:
        shown.add_row(*(_number(value) for value in line.values()))
    _finish(lines, output, shown, as_json)


@analyze_app.command()
def sparsification(
    model: Model = "tiny",
    router: Router = None,
    method: Method = None,
    tasks: Tasks = ALL,
    length: Length = "2k",
    samples: Samples = 4,
    rank_tasks: Annotated[
        str, typer.Option(help="Tasks by which heads are ranked, with other prompts.")
    ] = SENSITIVE,
    ratios: Annotated[
        str, typer.Option(help="Values of Ω_MSR, with commas; 0 is there in any case.")
    ] = "0.1,0.2,0.3,0.4,0.5,0.6,0.7,0.8,0.9,1",
    batch_size: Annotated[int, typer.Option(help="Prompts at a time.", min=1)] = 1,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    seed: Seed = 0,
    output: Output = Path("outputs/sparsification.png"),
    as_json: Json = False,
) -> None:
    """What is lost as heads turn sparse, the least retrieving first (Figure 2, Table 5).

    Example: [bold]elasticore analyze sparsification --ratios 0.25,0.5,0.75,1 --samples 8[/]
    """
    with _analysis(output, backend):
        from rich.progress import Progress

        from elasticore.eval.analysis import progressive_sparsification, retrieval_scores
        from elasticore.eval.analysis.plots import sparsification_picture

        chosen = sorted({0.0, *(_ratio(part) for part in ratios.split(","))})
        backbone, tokenizer = load(model, dtype)
        prompts = prompts_of(backbone, tokenizer, tasks, length, samples, seed)
        way = way_to_read(backbone, model, router, method)
        others = prompts_of(backbone, tokenizer, rank_tasks, length, samples, seed + samples)
        scores = retrieval_scores(backbone, others, progress=bar("ranking heads")).kv_heads
        with Progress(console=err) as whole:
            task = whole.add_task("", total=len(chosen))

            def step(text: str) -> None:
                whole.update(task, description=text, advance=1)

            steps = progressive_sparsification(
                backbone,
                prompts,
                scores,
                ratios=chosen,
                way=way,
                batch_size=batch_size,
                step=step,
            )
        sensitive = {sample.task: sample.sensitive for sample in prompts}
        sparsification_picture(steps, output, sensitive=sensitive, title=model)
    shown = Table(title="% of the score with full attention", title_justify="left")
    shown.add_column("Ω_MSR", justify="right")
    for name in sensitive:
        shown.add_column(name, justify="right")
    for ratio in chosen:
        kept = (one.retention for one in steps if one.msr == ratio)
        shown.add_row(f"{ratio:g}", *(_number(value) for value in kept))
    _finish([one.row() for one in steps], output, shown, as_json)


@analyze_app.command()
def frequency(
    model: Model = "tiny",
    router: Router = None,
    tasks: Tasks = ALL,
    length: Length = "2k",
    samples: Samples = 8,
    source: Annotated[
        Path | None,
        typer.Option("--from", help="Run nothing: RUN/METHOD of a finished `elasticore eval`."),
    ] = None,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    seed: Seed = 0,
    output: Output = Path("outputs/frequency.png"),
    as_json: Json = False,
) -> None:
    """How often each head is sparse, per task and over all tasks (Figures 6 and 11).

    Example: [bold]elasticore analyze frequency --from runs/eval/elastic[/]
    """
    with _analysis(output, backend):
        from elasticore.eval.analysis import (
            frequency_rows,
            prompt_decisions,
            read_decisions,
            routing_frequency,
        )
        from elasticore.eval.plots import routing_picture

        decisions: Any
        if source is not None:
            decisions = read_decisions(source)
        else:
            backbone, tokenizer = load(model, dtype)
            prompts = prompts_of(backbone, tokenizer, tasks, length, samples, seed)
            route(backbone, model, router)
            decisions = prompt_decisions(backbone, prompts, bar("routing"))
        found = routing_frequency(decisions)
        routing_picture(found, output, title="How often heads are sparse")
    shown = Table(title="KV heads", title_justify="left")
    for name in ("task", "Ω_MSR", "always sparse", "never", "by the prompt"):
        shown.add_column(name, justify="left" if name == "task" else "right")
    for task, shares in found.items():
        counts = int((shares == 1).sum()), int((shares == 0).sum())
        numbers = (*counts, shares.numel() - sum(counts))
        shown.add_row(escape(task), _number(float(shares.mean())), *map(str, numbers))
    _finish(frequency_rows(found), output, shown, as_json)


@analyze_app.command()
def similarity(
    model: Model = "tiny",
    router: Router = None,
    tasks: Tasks = ALL,
    length: Length = "2k",
    samples: Samples = 8,
    layer: Annotated[int, typer.Option(help="Which elastic layer's router, from 0.")] = 0,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    seed: Seed = 0,
    output: Output = Path("outputs/similarity.png"),
    as_json: Json = False,
) -> None:
    """How alike tasks are to a router, before and after its task MLP (Figures 5 and 9).

    Example: [bold]elasticore analyze similarity --layer 4 --output similarity.pdf[/]
    """
    with _analysis(output, backend):
        from elasticore.eval.analysis import router_activations, similarity_rows
        from elasticore.eval.analysis.plots import similarity_picture

        backbone, tokenizer = load(model, dtype)
        prompts = prompts_of(backbone, tokenizer, tasks, length, samples, seed)
        route(backbone, model, router)
        found = router_activations(backbone, prompts, layer, progress=bar("routing"))
        similarity_picture(found, output, title=f"Tasks to the router of layer {layer}")
    lines = similarity_rows(found)
    shown = Table("tasks", title="Similarity of tasks", title_justify="left")
    # The rows of a pair come in this order as well.
    for measure, where in dict.fromkeys((line["measure"], line["place"]) for line in lines):
        shown.add_column(f"{measure}, {where}", justify="right")
    for one, other in itertools.combinations(found.before, 2):
        pair = (line for line in lines if (line["task"], line["other"]) == (one, other))
        shown.add_row(escape(f"{one}, {other}"), *(_number(line["similarity"]) for line in pair))
    _finish(lines, output, shown, as_json)


@analyze_app.command()
def fidelity(
    model: Model = "tiny",
    router: Router = None,
    method: Method = None,
    tasks: Tasks = "multikey,code",
    length: Length = "2k",
    samples: Samples = 4,
    rows: Annotated[int, typer.Option(help="Query rows of each prompt to compute.", min=1)] = 64,
    dtype: Dtype = "bfloat16",
    backend: Backend = "auto",
    seed: Seed = 0,
    output: Output = Path("outputs/fidelity.png"),
    as_json: Json = False,
) -> None:
    """What every head loses in its sparse mode, and whether its router chose that.

    With routers, heads run as they are routed; with --method, all of them run full.

    Example: [bold]elasticore analyze fidelity --tasks multikey,code --rows 128[/]
    """
    with _analysis(output, backend):
        from elasticore.eval.analysis import head_fidelity
        from elasticore.eval.analysis.plots import fidelity_picture

        if method is not None and router is not None:
            raise ValueError("method cannot be given beside router, which says what is read.")
        backbone, tokenizer = load(model, dtype)
        prompts = prompts_of(backbone, tokenizer, tasks, length, samples, seed)
        way = None
        if method is not None or router_of(model, router) is None:
            way = way_to_read(backbone, model, router, method)
        else:
            route(backbone, model, router)
        found = head_fidelity(
            backbone, prompts, way, rows=rows, seed=seed, progress=bar("comparing heads")
        )
        fidelity_picture(found, output, title="Heads in their sparse mode; dots: routed so")
    shown = Table("task", "query heads", title="In the sparse mode", title_justify="left")
    for name in ("share", "attention kept", "error of the output"):
        shown.add_column(name, justify="right")
    for task in dict.fromkeys(one.task for one in found):
        own = [one for one in found if one.task == task]
        groups = {"all": [1.0] * len(own)}
        if way is None:
            groups["routed sparse"] = [one.sparse for one in own]
            groups["not routed sparse"] = [1 - one.sparse for one in own]
        for name, weights in groups.items():
            total = sum(weights)
            means = [
                sum(w * value for w, value in zip(weights, values, strict=True)) / (total or 1)
                for values in ([x.kept_mass for x in own], [x.output_error for x in own])
            ]
            cells = [_number(mean if total else None) for mean in means]
            shown.add_row(escape(task), name, f"{total / len(own):.0%}", *cells)
    _finish([one.row() for one in found], output, shown, as_json)


@analyze_app.command()
def runs(
    folders: Annotated[
        list[Path], typer.Argument(help="Folders of `elasticore eval`.", metavar="RUN...")
    ],
    x: Annotated[
        str,
        typer.Option(
            help="esr, esr_last_query, msr, first_token_seconds, tokens_per_second, prompt_tokens, "
            "peak_gb, speedup (over the method full), or method."
        ),
    ] = "esr",
    y: Annotated[
        str, typer.Option(help="score, another of the tasks' numbers, or as x.")
    ] = "score",
    per_task: Annotated[
        bool, typer.Option("--per-task", help="A point for each task, not for each group.")
    ] = False,
    task: Annotated[
        list[str] | None,
        typer.Option(help="Tasks or groups to show, as ruler-*; repeatable.", metavar="PATTERN"),
    ] = None,
    output: Output = Path("outputs/runs.png"),
    as_json: Json = False,
) -> None:
    """Draw evaluations: scores over sparsity or time, a point per method (Figures 1, 7, 8, 12, 14).

    Example: [bold]elasticore analyze runs runs/eval --x prompt_tokens --y speedup[/]
    """
    with _analysis(output):
        from elasticore.eval.analysis import read_points
        from elasticore.eval.analysis.runs_plot import runs_picture

        points = read_points(folders, x, y, per_task=per_task, tasks=task or ())
        runs_picture(points, output, x=x, y=y)
    lines = [point.row(x, y) for point in points]
    shown = Table()
    for name, value in lines[0].items():
        shown.add_column(name, justify="left" if isinstance(value, str) else "right")
    for line in lines:
        shown.add_row(*(_number(value) for value in line.values()))
    _finish(lines, output, shown, as_json)


@contextmanager
def _analysis(output: Path, backend: str = "auto") -> Iterator[None]:
    """Plain errors; that nothing can be drawn is said before the work."""
    with plain_errors("eval"):
        import transformers.utils.logging

        from elasticore.choice import use_backend
        from elasticore.drawing import check_picture, pyplot

        check_picture("output", output)
        pyplot()
        transformers.utils.logging.disable_progress_bar()  # one of our own is enough
        with use_backend(backend):
            yield


def _ratio(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"ratios must be numbers from 0 to 1, got {text!r}.") from None


def _number(value: Any) -> str:
    from elasticore.eval.report import number

    return escape(value) if isinstance(value, str) else number(value)


def _finish(lines: Sequence[Any], output: Path, shown: Table, as_json: bool) -> None:
    """Write the CSV file beside the picture, and show or print the result."""
    with plain_errors():
        from elasticore.eval.analysis import write_csv

        table = write_csv(lines, output.with_suffix(".csv"))
    if as_json:
        rows = [
            {name: None if value != value else value for name, value in line.items()}
            for line in lines
        ]
        print(json.dumps({"picture": str(output), "csv": str(table), "rows": rows}))
        return
    out.print(shown)
    out.print(f"Picture: {place(output)}   Table: {place(table)}")
