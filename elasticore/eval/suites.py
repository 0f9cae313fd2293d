"""The suites of tasks that an evaluation can name, and what of it each of them needs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elasticore.eval.evaluate import Evaluation

__all__ = ["SUITES", "load_suites"]

SUITES = {
    "basic": "needles, chains of variables, and real text to continue; made here",
    "ruler-like": "thirteen tasks by RULER's definitions; made here",
    "ruler": "RULER, from its own files",
    "longbench-e": "thirteen tasks of six categories",
    "longbench-v2": "503 questions of four choices",
}
"""The suites by name, with a line about each. Of all but the last, single tasks can be named."""

MADE_HERE = 20
"""Samples of a task that is made here, if nothing is said."""


def load_suites(evaluation: Evaluation, tokenizer: Any, positions: int) -> list[Any]:
    """The tasks and groups that ``evaluation`` names, as lm-evaluation-harness takes them.

    Parameters
    ----------
    evaluation
        Its ``tasks`` are names of suites, or of tasks in one, as ``"ruler-like:vt"``.
    tokenizer
        The model's.
    positions
        Tokens that the model can read.

    Raises
    ------
    ValueError
        If a suite or a task is unknown, or a length exceeds the model's positions.
    FileNotFoundError
        If data are missing; the message says where they are to be had, and where to put them.
    """
    from elasticore.eval import benchmarks
    from elasticore.eval.benchmarks.basic import load_basic
    from elasticore.eval.benchmarks.ruler_like import load_ruler_like

    chosen = _by_suite(evaluation.tasks)
    lengths, data, seed = evaluation.lengths, evaluation.data, evaluation.seed
    if chosen.keys() & {"basic", "ruler-like", "ruler"} and max(lengths) > positions:
        raise ValueError(
            f"lengths {[length for length in lengths if length > positions]} exceed the "
            f"{positions} positions of {evaluation.model}."
        )
    samples = evaluation.samples or MADE_HERE
    limit = positions - 1024 if evaluation.limit is None else evaluation.limit
    made: list[Any] = []
    for suite, tasks in chosen.items():
        some: dict[str, Any] = {"tasks": tasks} if tasks else {}
        if suite == "basic":
            made += load_basic(tokenizer, lengths, samples, seed, **some)
        elif suite == "ruler-like":
            thinking = {"enable_thinking": evaluation.thinking}
            template: dict[str, Any] | None = thinking if evaluation.chat else None
            groups = load_ruler_like(tokenizer, lengths, samples, seed, template=template, **some)
            made += _with_mean(suite, groups)
        elif suite == "ruler":
            made += _with_mean(suite, benchmarks.load_ruler(tokenizer, lengths, data, **some))
        elif suite == "longbench-e":
            made.append(benchmarks.load_longbench_e(tokenizer, limit, data, **some))
        else:
            made.append(benchmarks.load_longbench_v2(tokenizer, limit, data))
    return made


def _with_mean(suite: str, groups: list[Any]) -> list[Any]:
    """The groups of several lengths, under one of all lengths."""
    from elasticore.eval.benchmarks.task import Average

    return groups if len(groups) == 1 else [Average.of(f"{suite}-mean", groups)]


def _by_suite(names: tuple[str, ...]) -> dict[str, list[str]]:
    """The tasks that are named of every suite; none means all."""
    chosen: dict[str, list[str]] = {}
    whole = set(names) & set(SUITES)
    for name in names:
        suite, _, task = name.partition(":")
        if suite not in SUITES:
            raise ValueError(
                f"tasks name the unknown suite {suite!r}; there are: {', '.join(SUITES)}, and "
                "single tasks of all but the last, as ruler-like:vt."
            )
        if task and suite == "longbench-v2":
            raise ValueError(f"tasks name {name!r}, but {suite} is one task; leave out ':{task}'.")
        tasks = chosen.setdefault(suite, [])
        if suite not in whole and task not in tasks:
            tasks.append(task)
    return chosen
