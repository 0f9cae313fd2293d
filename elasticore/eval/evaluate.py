"""An evaluation: every method on every task, in a folder that it can be resumed from."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elasticore.backends.registry import use_backend
from elasticore.eval.journal import Journal
from elasticore.eval.methods import Method

__all__ = ["Evaluation", "evaluate", "suites"]

SETTINGS = "evaluation.json"
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
        Names of suites, or of tasks in one, as ``"offline:vt"``: see :func:`suites`.
    methods
        As :meth:`Method.parse` takes them.
    lengths
        Tokens of prompt and answer, where a suite makes its samples to fit.
    limit
        Tokens of a prompt, where a suite cuts them; None means what the model's positions allow.
    samples
        Of each task; None means all, or 20 where they are made here.
    data
        Folder of the benchmarks' files; None asks the hub.
    dtype, batch_size, backend, chat, seed
        Of the model and its generation.
    """

    model: str
    tasks: tuple[str, ...]
    methods: tuple[str, ...] = ("full",)
    lengths: tuple[int, ...] = (4096,)
    limit: int | None = None
    samples: int | None = None
    data: str | None = None
    dtype: str = "bfloat16"
    batch_size: int = 1
    backend: str = "auto"
    chat: bool = False
    seed: int = 0


def evaluate(
    evaluation: Evaluation,
    output: str | Path,
    *,
    check_base: bool = True,
    progress: Callable[[str, Sequence[Any]], Iterable[Any]] = lambda name, batches: batches,
) -> Path:
    """Run an evaluation, or what is left of it; return its folder.

    The folder holds ``evaluation.json``, ``environment.json`` and, per method, ``answers.jsonl``
    (written as they come), ``samples.jsonl`` (the answers with scores and references) and
    ``metrics.json``.

    Parameters
    ----------
    evaluation
        What to run.
    output
        The folder. One that holds another evaluation is refused.
    check_base
        See :func:`~elasticore.load_router`.
    progress
        ``(method, batches) -> batches``, for a progress bar.

    Raises
    ------
    ValueError
        If a setting is wrong, or the folder is another evaluation's.
    FileNotFoundError
        If the model, a router or data are missing.
    """
    from elasticore.bench.report import environment
    from elasticore.models.loading import load_backbone

    output = Path(output)
    methods = [Method.parse(text) for text in evaluation.methods]
    names = [method.name for method in methods]
    if len(set(names)) < len(names):
        raise ValueError(f"methods have the names {names}; call each by one of its own: NAME=KIND.")
    _claim(output, evaluation)
    with use_backend(evaluation.backend):
        model, tokenizer = load_backbone(evaluation.model, evaluation.dtype)
        tasks = suites(evaluation, tokenizer, model.config.max_position_embeddings)
        (output / "environment.json").write_text(
            json.dumps(environment(model.device), indent=1) + "\n"
        )
        for method in methods:
            folder = output / method.name
            folder.mkdir(exist_ok=True)
            with method.on(model, check_base=check_base):
                _run(evaluation, method, model, tokenizer, tasks, folder, progress)
    return output


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
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from elasticore.eval.language_model import ElasticLM

    journal = Journal(folder / ANSWERS)
    lm = ElasticLM(
        model,
        tokenizer,
        journal,
        batch_size=evaluation.batch_size,
        progress=lambda batches: progress(method.name, batches),
    )
    found: Any = simple_evaluate(
        model=lm,
        tasks=tasks,
        # Ours are objects already; the harness would look through thousands of files of its own.
        task_manager=TaskManager(include_defaults=False),
        limit=evaluation.samples,
        apply_chat_template=evaluation.chat,
        bootstrap_iters=0,
        random_seed=evaluation.seed,
        numpy_random_seed=evaluation.seed,
        torch_random_seed=evaluation.seed,
    )
    rows = list(_joined(found["samples"], journal))
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (folder / SAMPLES).write_text(text, encoding="utf-8")
    metrics = {
        "method": asdict(method),
        "scores": _scores(found["results"] | found.get("groups", {})),
        "tasks": _per_task(rows),
    }
    (folder / METRICS).write_text(json.dumps(metrics, indent=1) + "\n", encoding="utf-8")


def suites(evaluation: Evaluation, tokenizer: Any, positions: int) -> list[Any]:
    """The tasks that ``evaluation`` names, as lm-evaluation-harness takes them.

    Raises
    ------
    ValueError
        If a suite or a task is unknown, or a length exceeds the model's positions.
    FileNotFoundError
        If data are missing; the message says where they are to be had, and where to put them.
    """
    from elasticore.eval import benchmarks
    from elasticore.eval.benchmarks.offline import load_offline

    too_long = [length for length in evaluation.lengths if length > positions]
    if too_long:
        raise ValueError(
            f"lengths {too_long} exceed the {positions} positions of {evaluation.model}."
        )
    limit = positions - 1024 if evaluation.limit is None else evaluation.limit
    chosen: dict[str, list[str]] = {}
    for name in evaluation.tasks:
        suite, _, task = name.partition(":")
        chosen.setdefault(suite, []).extend(filter(None, [task]))
    made: list[Any] = []
    for suite, tasks in chosen.items():
        some: dict[str, Any] = {"tasks": tasks} if tasks else {}
        data = evaluation.data
        if suite == "offline":
            samples = evaluation.samples or 20
            template: dict[str, Any] | None = {} if evaluation.chat else None
            lengths, seed = evaluation.lengths, evaluation.seed
            made += load_offline(tokenizer, lengths, samples, seed, template=template, **some)
        elif suite == "ruler":
            made += benchmarks.load_ruler(tokenizer, evaluation.lengths, data, **some)
        elif suite == "longbench-e":
            made.append(benchmarks.load_longbench_e(tokenizer, limit, data, **some))
        elif suite == "longbench-v2":
            made.append(benchmarks.load_longbench_v2(tokenizer, limit, data))
        else:
            raise ValueError(
                f"tasks name the unknown suite {suite!r}; there are: offline, ruler, longbench-e "
                "and longbench-v2, and single tasks of the first three as offline:vt."
            )
    return made


def _claim(output: Path, evaluation: Evaluation) -> None:
    """Make the folder this evaluation's."""
    own = json.loads(json.dumps(asdict(evaluation)))
    file = output / SETTINGS
    if file.is_file():
        saved = json.loads(file.read_text(encoding="utf-8"))
        # Methods may join, as each has a folder of its own.
        changed = sorted(k for k in own if k != "methods" and saved.get(k) != own[k])
        if changed:
            raise ValueError(
                f"output {output} holds another evaluation (differs in {', '.join(changed)}); "
                "name another folder, or resume with the same settings."
            )
        own["methods"] = list(dict.fromkeys([*saved["methods"], *own["methods"]]))
    output.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(own, indent=1) + "\n", encoding="utf-8")


def _joined(samples: dict[str, list[Any]], journal: Journal) -> Iterable[dict[str, Any]]:
    """Every sample with its scores, its answer and what that cost."""
    entries = {(e.task, e.document): e for e in journal.entries()}
    for task, rows in samples.items():
        for row in rows:
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
    """Per task or group, its metrics without the harness's name of a filter."""
    return {
        name: {
            metric.partition(",")[0]: value
            for metric, value in found.items()
            if metric.endswith(",none") and "_stderr" not in metric
        }
        for name, found in results.items()
    }


_MEANS = ("msr", "esr", "esr_last_query", "first_token_seconds", "tokens_per_second", "peak_gb")


def _per_task(rows: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Per task, the number of samples and the means of what they cost."""
    tasks = dict.fromkeys(row["task"] for row in rows)
    return {task: _means([row for row in rows if row["task"] == task]) for task in tasks}


def _means(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    found: dict[str, float | None] = {"samples": len(rows)}
    for name in ("prompt_tokens", *_MEANS):
        values = [row[name] for row in rows if row[name] is not None]
        found[name] = sum(values) / len(values) if values else None
    return found
