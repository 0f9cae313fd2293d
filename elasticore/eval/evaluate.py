"""An evaluation: every method on every task, in a folder that it can be resumed from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any

import torch

from elasticore.choice import use_backend
from elasticore.errors import UnsupportedRequest
from elasticore.eval.costs import costs, in_groups
from elasticore.eval.identity import SETTINGS, check_same, content_of, leaves, settings_of
from elasticore.eval.journal import Entry, Journal
from elasticore.eval.methods import Method
from elasticore.eval.suites import load_suites
from elasticore.places import held, write_text
from elasticore.processes import current, from_first, joined

__all__ = ["Evaluation", "evaluate"]

ANSWERS = "answers.jsonl"
SAMPLES = "samples.jsonl"
METRICS = "metrics.json"


@dataclass(frozen=True)
class Evaluation:
    """What is evaluated; a folder holds the answers to one.

    Attributes
    ----------
    model
        Directory or hub id of the backbone, or ``"tiny"``.
    tasks
        Names of suites, or of tasks in one, as ``"ruler-like:vt"``: see
        :data:`~elasticore.eval.suites.SUITES`.
    methods
        As :meth:`Method.parse` takes them, or a :class:`Method` each.
    lengths
        Tokens of prompt and answer, where a suite makes its samples to fit.
    limit
        Tokens of a prompt, where a suite cuts them; None means what the model's positions allow.
    samples
        Of each task; None means all, or 20 where they are made here.
    data
        Folder of the benchmarks' files; None asks the hub.
    dtype, backend, chat, seed
        Of the model and its generation.
    thinking
        Whether the model is to think before it answers, where its chat template knows of that.
        Training data are built without.
    batch_size
        Prompts at a time. An evaluation may be resumed with another: answers agree up to rounding,
        and each notes the size of its batch.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str | Method, ...] = ("full",)
    lengths: tuple[int, ...] = (4096,)
    limit: int | None = None
    samples: int | None = None
    data: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 1
    backend: str = "auto"
    chat: bool = False
    thinking: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.thinking and not self.chat:
            raise ValueError("thinking is a setting of the chat template; set chat, too.")


def evaluate(
    evaluation: Evaluation,
    output: str | Path,
    *,
    check_base: bool = True,
    progress: Callable[[str, Sequence[Any]], Iterable[Any]] = lambda name, batches: batches,
) -> Path:
    """Run an evaluation, or what is left of it; return its folder.

    Processes that ``torchrun`` or ``accelerate launch`` has started share its samples.

    The folder holds ``evaluation.json``, ``environment.json`` and, per method, ``answers.jsonl``
    (written as they come), ``samples.jsonl`` (the answers with scores and references) and
    ``metrics.json``.

    Parameters
    ----------
    evaluation
        What to run.
    output
        The folder. One that holds another evaluation is refused: of other settings or data, of a
        model or routers that have changed, or of another version of elasticore.
    check_base
        See :func:`~elasticore.elasticize`.
    progress
        ``(method, batches) -> batches``, for a progress bar.

    Raises
    ------
    ValueError
        If a setting is wrong, or the folder is another evaluation's.
    FileNotFoundError
        If the model, a router or data are missing.
    UnsupportedRequest
        If the model or a batch does not fit into memory; answers that are there are kept.
    OSError
        If another process writes to the folder, or it cannot be written.
    """
    from elasticore.machine import environment

    output = Path(output)
    methods = [Method.parse(m) if isinstance(m, str) else m for m in evaluation.methods]
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"methods have the names {names}; call each by one of its own: NAME=KIND.")
    own = settings_of(evaluation, methods)
    check_same(output, own)  # what can be said at once
    with ExitStack() as stack:
        here = stack.enter_context(joined())
        from_first(lambda: stack.enter_context(held(output)))
        stack.enter_context(use_backend(evaluation.backend))
        model, tokenizer = _load(evaluation)
        tasks = load_suites(evaluation, tokenizer, model.config.max_position_embeddings)
        _check_shares(tasks, evaluation.samples, here.size)
        own |= content_of(model, tokenizer, tasks, evaluation.samples)
        settings = check_same(output, own)
        for method in methods:
            with method.on(model, check_base=check_base):
                pass  # what is wrong with the last one should not show after hours
        # From here on the folder is this evaluation's.
        about = environment(model.device)
        from_first(lambda: _begin(output, settings, about, names))
        for method in methods:
            folder = output / method.name
            with method.on(model, check_base=check_base):
                _run(evaluation, method, model, tokenizer, tasks, folder, progress)
    return output


def _begin(
    output: Path, settings: dict[str, Any], about: dict[str, Any], names: Sequence[str]
) -> None:
    write_text(output / SETTINGS, json.dumps(settings, indent=1) + "\n")
    write_text(output / "environment.json", json.dumps(about, indent=1) + "\n")
    for name in names:
        (output / name).mkdir(exist_ok=True)


def _check_shares(tasks: Sequence[Any], samples: int | None, processes: int) -> None:
    """Every process must have a sample of every task."""
    for task in leaves(tasks):
        there = len(task.rows[:samples])
        if there < processes:
            raise ValueError(
                f"task {task.config.task} has {there} samples for {processes} processes; start no "
                "more processes than the smallest task has samples."
            )


def _run(
    evaluation: Evaluation,
    method: Method,
    model: Any,
    tokenizer: Any,
    tasks: list[Any],
    folder: Path,
    progress: Callable[[str, Sequence[Any]], Iterable[Any]],
) -> None:
    """One method on all tasks."""
    from lm_eval.evaluator import evaluate as run_tasks
    from lm_eval.tasks import TaskManager

    from elasticore.eval.language_model import ElasticLM

    here = current()
    # A file for each process; the first one's is all there is with one.
    path = folder / (f"answers-{here.rank}.jsonl" if here.rank else ANSWERS)
    there = from_first(lambda: sorted(folder.glob("answers*.jsonl")))
    journal = Journal(path, [file for file in there if file.name != path.name])
    lm = ElasticLM(
        model,
        tokenizer,
        journal,
        batch_size=evaluation.batch_size,
        thinking=evaluation.thinking,
        progress=lambda batches: progress(method.name, batches),
    )
    found: Any = run_tasks(
        lm,
        # Ours are objects already; the harness would look through thousands of files of its own.
        TaskManager(include_defaults=False).load(tasks),
        limit=evaluation.samples,
        apply_chat_template=evaluation.chat,
        bootstrap_iters=0,
    )
    every = lm.gather_object(lm.answered)
    if here.rank:
        return
    answered = {name: entry for one in every for name, entry in one.items()}
    rows = list(_joined(found["samples"], answered))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_text(folder / SAMPLES, text)
    metrics = {
        "method": asdict(method),
        "scores": _scores(found["results"] | found.get("groups", {})),
        "costs": costs(rows, tasks),
        "tasks": list(dict.fromkeys(row["task"] for row in rows)),
        "in_groups": in_groups(tasks),
    }
    write_text(folder / METRICS, json.dumps(metrics, indent=1) + "\n")


def _load(evaluation: Evaluation) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from elasticore.models.loading import load_backbone

    try:
        return load_backbone(evaluation.model, evaluation.dtype)
    except torch.OutOfMemoryError as error:
        raise UnsupportedRequest(
            f"model {evaluation.model} in {evaluation.dtype} does not fit into the memory of the "
            "GPU; use a smaller model, bfloat16, or a GPU with more memory."
        ) from error


def _joined(
    samples: dict[str, list[Any]], entries: Mapping[tuple[str, int], Entry]
) -> Iterable[dict[str, Any]]:
    """Every sample with its scores, its answer and what that cost."""
    for task, rows in samples.items():
        for row in sorted(rows, key=lambda row: row["doc_id"]):  # not by process
            entry = entries[task, row["doc_id"]]
            scores = {name: row[name] for name in row["metrics"] if row[name] is not None}
            yield {
                "task": task,
                "document": row["doc_id"],
                "scores": scores,
                "answer": entry.answer,
                "target": row["target"],
                **asdict(entry.measures),
            }


def _scores(results: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Per task or group, its metrics without the harness's name of a filter; those of no sample
    (nan) are left out."""
    return {
        name: {
            metric.partition(",")[0]: value
            for metric, value in found.items()
            if metric.endswith(",none") and "_stderr" not in metric and not isnan(value)
        }
        for name, found in results.items()
    }
