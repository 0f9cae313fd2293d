"""Records of scores as tables: mean and spread over the seeds, and what follows from them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np

from elasticore.eval.tasks import TASKS
from recipes.study.scores import value
from recipes.tiny.plan import SENSITIVE

__all__ = [
    "ROBUST",
    "YARN",
    "Spread",
    "elastic_groups",
    "fronts",
    "label",
    "main_group",
    "paired",
    "routing",
    "summarise",
]

Record = dict[str, Any]
FIGURES = ("accuracy", "loss", "msr", "esr")
ROBUST = tuple(task for task in TASKS if task not in SENSITIVE)

YARN = "+yarn"

LABELS = {
    "full": "full attention",
    "streaming": "all heads streaming",
    "duo": "DuoAttention",
    "prulong": "PruLong",
    "random": "random tables",
    "fa-xa": "elastic, FA-XA",
    "xa-ssa": "elastic, XA-SSA",
    "moba": "MoBA",
    "infllm-v2": "InfLLM-V2",
    "infllm-v2-small": "InfLLM-V2, half the blocks",
    "nsa-selected": "NSA, selected branch",
}


def label(group: str) -> str:
    """What people call a group."""
    if group.endswith(YARN):
        return f"{label(group.removesuffix(YARN))}, with YaRN"
    method, _, share = group.partition("@")
    if share:
        at = f"at Ω of {label(share)}" if share.startswith("elastic") else f"at Ω = {share}"
        return f"{label(method)} {at}"
    if group.startswith("elastic-t"):
        return f"elastic, t = {group.removeprefix('elastic-t')}"
    if group.startswith("xattention-"):
        return f"XAttention, τ = {group.removeprefix('xattention-')}"
    if group.startswith("trianglemix-"):
        return f"TriangleMix from layer {group.removeprefix('trianglemix-')}"
    return LABELS.get(group, group)


class Spread(NamedTuple):
    """A figure over the seeds: mean, standard deviation (0 for one) and each seed's."""

    mean: float
    spread: float
    seeds: list[float]

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """Of the seeds' values."""
        seeds = [float(value) for value in values]
        deviation = float(np.std(seeds, ddof=1)) if len(seeds) > 1 else 0.0
        return cls(float(np.mean(seeds)), deviation, seeds)


def summarise(records: Sequence[Record]) -> dict[str, dict[str, dict[str, dict[str, Any]]]]:
    """Group, length, task, figure: mean, spread and seeds.

    Beside the tasks, ``all`` has what holds of a run as a whole: ``retrieval``, the mean accuracy
    of the sensitive tasks; ``score``, the mean over all tasks; ``text_loss``, and ``added_loss``,
    by how much of it that of full attention is exceeded, on the robust ones; ``msr`` and ``esr``.
    """
    full = {one["length"]: one["figures"] for one in records if one["group"] == "full"}
    result: dict[str, Any] = {}
    for group, length in dict.fromkeys((one["group"], one["length"]) for one in records):
        own = [r["figures"] for r in records if (r["group"], r["length"]) == (group, length)]
        table: dict[str, Any] = {}
        if not group.startswith("random"):  # of many tables, the whole is enough
            table = {task: _of_task(task, own) for task in own[0]}
        wholes = [_whole(run, full.get(length)) for run in own]
        table["all"] = {name: _spread(whole[name] for whole in wholes) for name in wholes[0]}
        result.setdefault(group, {})[str(length)] = table
    return result


def _of_task(task: str, runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    found = {name: _spread(run[task][name] for run in runs) for name in FIGURES}
    return {**found, "score": _spread(value(task, run[task]) for run in runs)}


def _spread(values: Iterable[float]) -> dict[str, Any]:
    return Spread.of(values)._asdict()


def _whole(run: dict[str, Any], full: dict[str, Any] | None) -> dict[str, float]:
    """The figures of one run over its tasks, each of the same weight."""
    found = {name: float(np.mean([run[task][name] for task in run])) for name in ("msr", "esr")}
    found["retrieval"] = float(np.mean([run[task]["accuracy"] for task in SENSITIVE]))
    if set(run) < set(TASKS):  # a random table, which only retrieval tells from another
        return found
    found["score"] = float(np.mean([value(task, run[task]) for task in run]))
    found["text_loss"] = float(np.mean([run[task]["loss"] for task in ROBUST]))
    if full is not None:
        added = [run[task]["loss"] / full[task]["loss"] - 1 for task in ROBUST]
        found["added_loss"] = float(np.mean(added))
    return found


def fronts(report: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Per family of methods, its points in order of Ω_MSR, at the reproduction's main length.

    A point has ``group`` and the figures of ``all``; that of random tables is their best and their
    median, as two families.
    """
    length = str(report["settings"]["length"])
    groups = {g: one[length]["all"] for g, one in report["results"].items() if length in one}
    found: dict[str, list[dict[str, Any]]] = {}
    for group, figures in groups.items():
        family = group.partition("@")[0]
        if family.startswith("elastic-t"):
            family = "elastic"
        if family == "random":
            tables = figures["retrieval"]["seeds"]
            for name, one in (("best", max(tables)), ("median", float(np.median(tables)))):
                point = {**figures, "retrieval": _spread([one]), "group": group}
                found.setdefault(f"random, {name}", []).append(point)
        else:
            found.setdefault(family, []).append({**figures, "group": group})
    return {
        family: sorted(points, key=lambda point: point["msr"]["mean"])
        for family, points in found.items()
    }


def routing(records: Sequence[Record], length: int) -> dict[str, dict[str, Any]]:
    """Per group of routers and task, how often each head was sparse: the mean over the seeds."""
    found: dict[str, dict[str, Any]] = {}
    for group in dict.fromkeys(one["group"] for one in records):
        own = [r["figures"] for r in records if (r["group"], r["length"]) == (group, length)]
        if own and all("sparse" in figures for run in own for figures in run.values()):
            found[group] = {
                task: np.mean([run[task]["sparse"] for run in own], axis=0).tolist()
                for task in own[0]
            }
    return found


def paired(report: dict[str, Any]) -> list[dict[str, Any]]:
    """Elastic attention beside every static method at the same mean Ω_MSR, a row per target.

    Of each method ``retrieval`` and ``added_loss`` (None for random tables), and ``ahead``: elastic
    minus it, the mean over the seeds and its spread; the seeds are paired where there are as many.
    """
    length = str(report["settings"]["length"])
    results, main = report["results"], main_group(report)
    rows = []
    for group in elastic_groups(report):
        own = results[group][length]["all"]
        row: dict[str, Any] = {"group": group, "msr": own["msr"], "elastic": own, "methods": {}}
        for method in ("duo", "prulong", "random"):
            name = f"{method}@{group}"
            if group == main and method != "random":
                name = method
            if name not in results:
                continue
            other = results[name][length]["all"]
            seeds = other["retrieval"]["seeds"]
            if method == "random":
                seeds = [max(seeds)]
            row["methods"][method] = {
                "retrieval": _spread(seeds),
                "added_loss": other.get("added_loss"),
                "ahead": _spread(_differences(own["retrieval"]["seeds"], seeds)),
            }
        rows.append(row)
    return rows


def elastic_groups(report: dict[str, Any]) -> list[str]:
    """The groups of routers, by their target on sensitive tasks."""
    there = (group for group in report["results"] if not group.endswith(YARN))
    found = [group for group in there if group.startswith("elastic-t")]
    return sorted(found, key=lambda group: float(group.removeprefix("elastic-t")))


def main_group(report: dict[str, Any]) -> str:
    """The group of the recipe's own routers."""
    targets = report["settings"]["recipe"]["targets"]
    return f"elastic-t{float(targets[SENSITIVE[0]]):g}"


def _differences(own: list[float], other: list[float]) -> list[float]:
    if len(own) == len(other):
        return [a - b for a, b in zip(own, other, strict=True)]
    return [a - float(np.mean(other)) for a in own]
