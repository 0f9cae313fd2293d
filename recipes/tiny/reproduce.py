"""The paper in miniature: every table and figure on the tiny model, from one command to one page.

python -m recipes.tiny.reproduce                   # everything; minutes on a GPU
python -m recipes.tiny.reproduce --quick           # next to no training, to try it on a CPU
python -m recipes.tiny.reproduce report            # the page again, from the figures that are there

What is finished is kept in ``--runs``; a command that was stopped goes on when it is given again.
"""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from elasticore.train import Recipe
from recipes.study.about import about
from recipes.study.runs import Run, Trainings, console
from recipes.study.scores import Scorer
from recipes.tiny.analyses import analyse
from recipes.tiny.plan import (
    FULL,
    QUICK,
    QUICK_RECIPE,
    Size,
    ablations,
    elastic,
    main_target,
    static,
    ways,
)
from recipes.tiny.report import write_report
from recipes.tiny.speed import measured_speed
from recipes.tiny.summary import routing, summarise

app = typer.Typer(add_completion=False)

PROGRAM = "python -m recipes.tiny.reproduce"
RESULTS = "reproduction.json"
NUMBERS = re.compile(r"\[[\s\d.,eE+-]+\]")


@contextmanager
def stage(name: str, seconds: dict[str, float]) -> Iterator[None]:
    """Say that a stage begins, and add what it took to ``seconds``."""
    console.rule(name, align="left")
    since = time.perf_counter()
    try:
        yield
    finally:
        took = time.perf_counter() - since
        seconds[name] = round(seconds.get(name, 0.0) + took, 1)
        console.print(f"{name}: {took:.0f} s", highlight=False)


def train(trainings: Trainings, scorer: Scorer, size: Size) -> list[Run]:
    """Train everything; what the main table needs comes first."""
    target = main_target(Recipe.load(trainings.config, trainings.common))
    runs = elastic(target, size.seeds)
    for other in size.targets:
        runs += elastic(other, size.seeds)
    runs += ablations(size.ablation_seeds)
    return trainings.train(runs, static(trainings, scorer, size))


def score(
    trainings: Trainings, scorer: Scorer, size: Size, trained: list[Run], failed: list[Any]
) -> list[dict[str, Any]]:
    """Score everything: a record per way and length. What fails is noted, and the rest goes on."""
    records = []
    for subject in ways(trainings, scorer, size, trained):
        for length, count in subject.lengths:
            name = f"{subject.way.name} at {length:,}"
            try:
                figures = scorer.score(subject.way, length, count, subject.tasks)
            except Exception as error:  # one method must not take the others with it
                failed.append(_failure(name, error))
                continue
            about_it = {"way": subject.way.name, "group": subject.group, "seed": subject.seed}
            records.append({**about_it, "length": length, "figures": figures})
    return records


def _failure(name: str, error: Exception) -> dict[str, Any]:
    console.print(f"[red]{name}: {type(error).__name__}[/]")
    text = "".join(traceback.format_exception(error)[-4:])
    console.print(text, markup=False, highlight=False)
    return {"name": name, "text": text}


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    runs: Annotated[Path, typer.Option(help="Folder of trainings and scores.")] = Path("runs/tiny"),
    output: Annotated[Path | None, typer.Option(help="Folder of figures and page.")] = None,
    config: Annotated[Path, typer.Option(help="Recipe of the routers.")] = Path(
        "recipes/tiny/routers.yaml"
    ),
    seeds: Annotated[int | None, typer.Option(min=1, help="Of every method; 3 by default.")] = None,
    ablation_seeds: Annotated[int | None, typer.Option(min=0, help="Of every ablation.")] = None,
    targets: Annotated[
        list[float] | None, typer.Option("--target", help="Ω_MSR beside the recipe's; repeatable.")
    ] = None,
    samples: Annotated[int | None, typer.Option(min=1, help="Held-out samples per task.")] = None,
    length_samples: Annotated[int | None, typer.Option(min=1, help="At other lengths.")] = None,
    max_steps: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    parallel: Annotated[int | None, typer.Option(min=1, help="Trainings at a time.")] = None,
    dtype: Annotated[str, typer.Option(help="For scores; auto, bfloat16 or float32.")] = "auto",
    batch_tokens: Annotated[int | None, typer.Option(help="Tokens of a batch to score.")] = None,
    backend: Annotated[str, typer.Option(help="Runs the attention of the scores.")] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Next to no training, to try it.")] = False,
) -> None:
    """Train, score, analyse and write the page."""
    if context.invoked_subcommand is not None:
        return
    signal.signal(signal.SIGTERM, _interrupt)  # so that trainings under way end with us
    size = QUICK if quick else FULL
    given = {
        "seeds": seeds,
        "ablation_seeds": ablation_seeds,
        "targets": tuple(targets) if targets else None,
        "samples": samples,
        "length_samples": length_samples,
    }
    size = dataclasses.replace(size, **{k: v for k, v in given.items() if v is not None})
    runs = runs / "quick" if quick else runs
    output = output or runs
    changes = QUICK_RECIPE if quick else ()
    trainings = Trainings.of(runs, config, changes, max_steps=max_steps, parallel=parallel)

    recipe = Recipe.load(config, trainings.common)
    try:
        scorer = Scorer(
            runs / "scores",
            backbone=recipe.backbone,
            dtype=dtype,
            batch_tokens=batch_tokens,
            backend=backend,
        )
    except FileNotFoundError as error:
        raise typer.BadParameter(f"{error} See {config}.", param_hint="--config") from error
    head = about("the paper in miniature on the tiny model", PROGRAM)
    file = output / RESULTS
    seconds: dict[str, float] = {}
    if file.is_file():  # a command that goes on adds to what the parts before have taken
        seconds = json.loads(file.read_text(encoding="utf-8")).get("seconds", {})
    report: dict[str, Any] = {
        **head,
        "settings": {
            **dataclasses.asdict(size),
            "parallel": trainings.parallel,
            "recipe": dataclasses.asdict(recipe),
            "dtype": scorer.dtype,
        },
        "heads": scorer.shape[0] * scorer.shape[1],
        "seconds": seconds,
        "failed": [],
        "speed": measured_speed(),
    }
    try:
        with stage("train", seconds):
            trained = train(trainings, scorer, size)
        report["failed"] += [
            {"name": one.name, "text": f"code {one.code}\n{one.log}"} for one in trainings.failures
        ]
        report["trainings"] = {
            one.name: {"changes": list(one.changes), "seconds": trainings.seconds(one)}
            for one in trained
        }
        with stage("score", seconds):
            records = score(trainings, scorer, size, trained, report["failed"])
            report["results"] = summarise(records)
            report["routing"] = routing(records, size.length)
        with stage("analyse", seconds):
            report["analyses"] = analyse(trainings, scorer, size, trained, report["failed"])
    finally:
        _write(file, report)
    with stage("report", seconds):
        page = write_report(_six(report), output)  # as it will be when it is made again
    _write(file, report)
    console.print(f"Page: [bold]{page}[/]   Figures: [bold]{file}[/]")
    if report["failed"]:
        console.print(f"[red]{len(report['failed'])} parts failed[/]; the page lists them.")
        raise typer.Exit(1)


@app.command("report")
def report_again(
    results: Annotated[Path, typer.Option(help="The figures.")] = Path(
        "benchmarks/results/tiny-reproduction.json"
    ),
    output: Annotated[Path, typer.Option(help="Folder of the page.")] = Path("outputs"),
) -> None:
    """Write the page again, from the figures of a run."""
    console.print(write_report(json.loads(results.read_text(encoding="utf-8")), output))


def _write(file: Path, report: dict[str, Any]) -> None:
    """Write the figures, with six digits each."""
    file.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(_six(report), indent=1)
    file.write_text(NUMBERS.sub(_on_one_line, text) + "\n", encoding="utf-8")


def _on_one_line(found: re.Match[str]) -> str:
    return re.sub(r"\s+", " ", found[0])


def _six(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _six(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_six(one) for one in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    app()
