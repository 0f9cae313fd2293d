"""``elasticore eval``: benchmarks, and tables of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Backend, Json, app, count, err, out, plain_errors, steps

eval_app = typer.Typer()
app.add_typer(eval_app, name="eval")


@eval_app.callback(invoke_without_command=True)
def evaluate(
    context: typer.Context,
    model: Annotated[
        str | None, typer.Option(help='Directory or hub id of the backbone, "tiny" or "smollm2".')
    ] = None,
    tasks: Annotated[
        str,
        typer.Option(
            help="basic, ruler-like, ruler, longbench-e, longbench-v2, or tasks, as ruler-like:vt."
        ),
    ] = "basic",
    router: Annotated[
        str | None,
        typer.Option(help='Directory of trained routers, or "tiny"; a method of its own.'),
    ] = None,
    method: Annotated[
        list[str] | None,
        typer.Option(help="full, streaming, xattention:threshold=0.9, ...; repeatable."),
    ] = None,
    lengths: Annotated[str, typer.Option(help="Tokens, as 4096 or 8k,16k.")] = "4k",
    limit: Annotated[int | None, typer.Option(help="Tokens of prompts that are cut.")] = None,
    samples: Annotated[
        int | None, typer.Option(help="Of each task; all, or 20 if made here.", min=1)
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of the benchmarks' files.")] = None,
    output: Annotated[Path, typer.Option(help="Folder of answers and scores.")] = Path("runs/eval"),
    batch_size: Annotated[int, typer.Option(min=1)] = 1,
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    chat: Annotated[bool, typer.Option(help="Apply the chat template.")] = False,
    thinking: Annotated[
        bool, typer.Option(help="Let a model that can think do so, with --chat.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the samples that are made here.")] = 0,
    backend: Backend = "auto",
    check_base: Annotated[
        bool, typer.Option(help="Insist on the weights the routers were trained on.")
    ] = True,
    as_json: Json = False,
) -> None:
    """Ask a model the questions of long-context benchmarks, with its sparsity beside every score.

    Stopped half way, the same command goes on where it was. Data that are missing are named with
    where to get them and where to put them.

    Without a download, on a CPU:

    [bold]elasticore eval --model tiny --router tiny --method full --tasks basic --lengths 1k[/]

    A model of the hub, its routers, and full attention in the same run:

    [bold]elasticore eval --model Qwen/Qwen3-4B --router runs/qa/router --method full --chat --tasks
    basic,ruler-like --lengths 8k,32k --samples 20 --output runs/qwen[/]

    Benchmarks, from a folder with their data:

    [bold]elasticore eval --model Qwen/Qwen3-4B --router runs/qa/router --chat --tasks
    ruler,longbench-e,longbench-v2 --lengths 8k,64k --data data --batch-size 4[/]

    Baselines:

    [bold]elasticore eval --model Qwen/Qwen3-4B --method streaming --method xattention:threshold=0.9
    --method pattern:path=masks.tsv,sparsity=0.7[/]

    The samples shared by two processes, each with a GPU of its own:

    [bold]torchrun --nproc-per-node 2 -m elasticore eval --model Qwen/Qwen3-4B --tasks
    longbench-e[/]

    One task; a name of one's own for a method:

    [bold]elasticore eval --model tiny --tasks ruler-like:vt --method mine=router:path=runs/mine[/]
    """
    if context.invoked_subcommand is not None:
        _none_before(context)
        return
    with plain_errors("eval", f"the answers so far are in {output}; the same command goes on."):
        import logging

        from transformers.utils.logging import disable_progress_bar

        from elasticore.eval.evaluate import Evaluation
        from elasticore.eval.evaluate import evaluate as run_evaluation
        from elasticore.eval.methods import ROUTER, Method
        from elasticore.eval.report import read_report
        from elasticore.processes import launched

        first = launched().rank == 0  # one of several processes speaks for all
        if model is None:
            raise ValueError("model is missing: pass --model with a directory or hub id.")
        chosen: list[str | Method] = list(method or [])
        if router is not None:  # as it stands, whatever is in it
            chosen.append(Method("elastic", ROUTER, {"path": router}))
        disable_progress_bar()  # ours says more
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        evaluation = Evaluation(
            model=model,
            tasks=tuple(part.strip() for part in tasks.split(",")),
            methods=tuple(chosen or ["full"]),
            lengths=tuple(count(part, "lengths") for part in lengths.split(",")),
            limit=limit,
            samples=samples,
            data=None if data is None else str(data),
            dtype=dtype,
            batch_size=batch_size,
            backend=backend,
            chat=chat,
            thinking=thinking,
            seed=seed,
        )
        run_evaluation(
            evaluation,
            output,
            check_base=check_base,
            progress=lambda name, batches: (
                steps(batches, f"answering, {name}") if first else batches
            ),
        )
        if not first:
            return
        _show_report(read_report([output]), None, as_json)
    err.print(f"[dim]Answers, scores and settings: {escape(str(output))}[/]")


def _none_before(context: typer.Context) -> None:
    """Refuse options before the name of a further command, which would not see them."""
    sources = {
        one.opts[0]: context.get_parameter_source(one.name) for one in context.command.params
    }
    given = [
        option for option, source in sources.items() if source and source.name == "COMMANDLINE"
    ]
    if given:
        with plain_errors():
            name = context.invoked_subcommand
            raise ValueError(
                f"{', '.join(given)} before {name} belongs to eval itself; the options of {name} "
                f"come after its name: elasticore eval {name} RUN --json."
            )


@eval_app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Folders of `elasticore eval`.")],
    metric: Annotated[
        str, typer.Option(help="Which of a task's numbers, as score,msr,first_token_seconds.")
    ] = "score",
    part: Annotated[
        str | None, typer.Option(help="Only these samples: 0-4k, 4-8k, 8k+, easy, hard, short, ...")
    ] = None,
    groups: Annotated[bool, typer.Option("--groups", help="Without the tasks of a group.")] = False,
    form: Annotated[
        str | None, typer.Option("--format", help="csv, markdown or latex, instead of a table.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare evaluations: a row per method, a column per task.

    Example: [bold]elasticore eval report runs/eval --groups --metric score,msr --format latex >
    table.tex[/]
    """
    with plain_errors("eval"):
        from elasticore.eval.report import ALL, read_report

        metrics = [name.strip() for name in metric.split(",")]
        _show_report(read_report(runs, metrics, groups, part or ALL), form, as_json)


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
