"""``elasticore train`` and ``plot``: training runs, and their pictures."""

from __future__ import annotations

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from elasticore.cli.console import Json, app, err, out, place, plain_errors

plot_app = typer.Typer(no_args_is_help=True, help="Draw what runs have logged.")
app.add_typer(plot_app, name="plot")


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
            help="Change a setting, such as elastic.policy.boundary=50; repeatable.",
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
    with plain_errors("train"):
        from transformers.utils.logging import disable_progress_bar

        from elasticore.processes import launched
        from elasticore.train.recipe import Recipe
        from elasticore.train.run import train as run_recipe

        disable_progress_bar()  # one of our own is enough
        first = launched().rank == 0  # one of several processes speaks for all
        recipe = Recipe.load(config, changes or (), backend=backend, max_steps=max_steps, seed=seed)
        whole = _show_recipe(recipe, as_json, first) if dry_run else True
        path = output if dry_run else run_recipe(recipe, output, resume=resume)
    if dry_run:
        raise typer.Exit(0 if whole else 1)
    if not first:
        return
    if as_json:
        history = json.loads((output / "history.json").read_text("utf-8"))
        print(json.dumps({"router": str(path), "final": history[-1] if history else None}))
        return
    curves = escape(shlex.join(["elasticore", "plot", "training", str(output)]))
    out.print(f"Routers: {place(path)}   Curves: {curves}")


def _show_recipe(recipe: Any, as_json: bool, first: bool) -> bool:
    """Print what a recipe would run; return whether all of it could be checked here."""
    from elasticore.train.preview import preview

    found = preview(recipe)
    if first:
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
    with plain_errors():
        from elasticore.drawing import check_picture
        from elasticore.places import check_writable
        from elasticore.train.curves import ending, read_curves, to_json, write_csv
        from elasticore.train.plots import training_picture

        check_picture("output", output)
        if csv is not None:
            check_writable(csv)
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
    out.print(f"Picture: {place(output)}" + (f"   Table: {place(csv)}" if csv else ""))
