"""What the answers cost, per task and group and for every part of their samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["COSTS", "Costs", "costs", "in_groups"]

COSTS = (
    "prompt_tokens",
    "msr",
    "esr",
    "esr_last_query",
    "first_token_seconds",
    "tokens_per_second",
    "peak_gb",
)
"""Of :class:`~elasticore.eval.measuring.Measures`: what is averaged."""

Costs = dict[str, float | None]
"""The number of samples and the mean of each of `COSTS`, None where it is not measured."""


def costs(rows: Sequence[dict[str, Any]], tasks: Sequence[Any]) -> dict[str, dict[str, Costs]]:
    """Per task or group, and per metric of it, the costs of the samples that have this metric.

    All samples have a ``score``. A metric such as LongBench-E's ``4-8k`` or LongBench-v2's ``hard``
    covers a part of them.

    Parameters
    ----------
    rows
        Samples with ``task``, ``scores`` and their measures.
    tasks
        Tasks, and groups of them. A group's costs are the plain means of its children's, as its
        scores are.
    """
    found: dict[str, dict[str, Costs]] = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        own = [row for row in rows if row["task"] == task]
        found[task] = {
            part: _of_samples([row for row in own if part in row["scores"]])
            for part in dict.fromkeys(part for row in own for part in row["scores"])
        }
    for group in tasks:
        _add_group(found, group)
    return found


def in_groups(tasks: Sequence[Any]) -> list[str]:
    """The names of all that is part of a group: tasks, and groups in groups."""
    found: list[str] = []
    for group in tasks:
        if hasattr(group, "child_names"):
            found += [*group.child_names, *in_groups(list(group))]
    return list(dict.fromkeys(found))


def _add_group(found: dict[str, dict[str, Costs]], group: Any) -> None:
    if not hasattr(group, "child_names"):
        return  # a task
    for child in group:
        _add_group(found, child)
    children = [found[name] for name in group.child_names]
    found[group.name] = {
        part: _of_children([child[part] for child in children if part in child])
        for part in dict.fromkeys(part for child in children for part in child)
    }


def _of_samples(rows: list[dict[str, Any]]) -> Costs:
    return {"samples": len(rows), **{name: _mean([row[name] for row in rows]) for name in COSTS}}


def _of_children(children: list[Costs]) -> Costs:
    samples = sum(child["samples"] or 0 for child in children)
    return {"samples": samples, **{name: _mean([c[name] for c in children]) for name in COSTS}}


def _mean(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None
