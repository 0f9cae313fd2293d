"""What the figures of a reproduction say, in words: every sentence is made of measured numbers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np

from elasticore.eval.tasks import TASKS
from recipes.tiny.plan import SENSITIVE
from recipes.tiny.summary import ROBUST, YARN, elastic_groups, label, main_group, paired

__all__ = ["answer", "here", "meaning", "pm"]

Report = dict[str, Any]
NOTHING = 0.005
"""Differences below this, three of 600 answers, are none."""
STATIC = ("duo", "prulong")


def percent(share: float, digits: int = 1) -> str:
    """A share as people write it."""
    return f"{100 * share:.{digits}f} %"


def pm(figure: dict[str, Any], digits: int = 3) -> str:
    """Mean ± spread, the latter where there are several seeds."""
    text = f"{figure['mean']:.{digits}f}"
    return f"{text} ± {figure['spread']:.{digits}f}" if len(figure["seeds"]) > 1 else text


def verdict(ahead: dict[str, Any]) -> str:
    """Whether a difference over the seeds is one: not if it is within its own spread."""
    if abs(ahead["mean"]) < NOTHING or abs(ahead["mean"]) <= ahead["spread"]:
        return "level"
    return "ahead" if ahead["mean"] > 0 else "behind"


def listed(parts: Iterable[str]) -> str:
    """``a, b and c``."""
    *most, last = parts
    return f"{', '.join(most)} and {last}" if most else last


def answer(report: Report) -> list[str]:
    """The reproduction in three sentences."""
    length = str(report["settings"]["length"])
    results, main = report["results"], main_group(report)
    rows = paired(report)
    if main not in results:
        return [f"No routers of the recipe ({label(main)}) were trained: see what failed, below."]
    own, full = results[main][length]["all"], results["full"][length]["all"]
    streaming = results["streaming"][length]["all"]
    said = [
        f"With {percent(own['msr']['mean'])} of its heads sparse on average over the five tasks, "
        f"elastic attention answers {percent(own['retrieval']['mean'])} of the retrieval "
        f"questions; full attention answers {percent(full['retrieval']['mean'])}, and all heads "
        f"streaming {percent(streaming['retrieval']['mean'])}."
    ]
    row = next(row for row in rows if row["group"] == main)
    others = [
        f"{'the best of the ' if name == 'random' else ''}{label(name)} "
        f"{percent(one['retrieval']['mean'])} (elastic is {verdict(one['ahead'])})"
        for name, one in row["methods"].items()
    ]
    if others:
        said.append(f"At the same mean share, the same heads for every input: {listed(others)}.")
    said.append(_text_loss(row))
    return said


def _text_loss(row: dict[str, Any]) -> str:
    """What sparse heads cost on text at one share."""
    own = row["elastic"]["added_loss"]["mean"]
    said = f"On text it adds {percent(own, 2)} to the loss of full attention"
    others = [
        f"{label(name)} {percent(one['added_loss']['mean'], 2)}"
        for name, one in row["methods"].items()
        if one["added_loss"] is not None
    ]
    return f"{said}; {listed(others)}." if others else f"{said}."


def meaning(report: Report) -> list[str]:
    """What the front means: where each method spends, and how the shares compare."""
    length, rows = str(report["settings"]["length"]), paired(report)
    results, main = report["results"], main_group(report)
    said = []
    if main in results:
        own = results[main][length]
        heads = report["heads"]
        parts = {
            name: float(np.mean([own[task]["msr"]["mean"] for task in tasks]))
            for name, tasks in (("retrieval", SENSITIVE), ("text", ROBUST))
        }
        mean = own["all"]["msr"]["mean"]
        said.append(
            f"Where it spends: at the recipe's target elastic attention leaves "
            f"{(1 - parts['retrieval']) * heads:.1f} of {heads} heads full on retrieval and "
            f"{(1 - parts['text']) * heads:.1f} on text. A static pattern with the same mean has "
            f"{(1 - mean) * heads:.1f} on both."
        )
    for name in STATIC:
        found = [(row, row["methods"][name]) for row in rows if name in row["methods"]]
        if not found:
            continue
        at: dict[str, list[str]] = {"ahead": [], "level": [], "behind": []}
        for row, one in found:
            at[verdict(one["ahead"])].append(f"{row['msr']['mean']:.2f}")
        parts_said = [f"{kind} at Ω = {listed(where)}" for kind, where in at.items() if where]
        said.append(f"On retrieval, elastic beside {label(name)}: {'; '.join(parts_said)}.")
        losses = [
            row["elastic"]["added_loss"]["mean"] - one["added_loss"]["mean"]
            for row, one in found
            if one["added_loss"] is not None
        ]
        if losses:
            points = _range(losses, lambda v: f"{100 * v:+.2f}")
            said.append(
                f"On text its added loss minus that of {label(name)} is {points} percentage points "
                "over these shares."
            )
    return said


def _range(values: Iterable[float], form: Any) -> str:
    low, high = min(values := list(values)), max(values)
    return form(low) if form(low) == form(high) else f"{form(low)} to {form(high)}"


def here(report: Report) -> dict[str, str]:
    """What each picture or table shows, by name; nothing for what was not measured."""
    parts = {
        "sparsification": _sparsification,
        "retrieval": _retrieval,
        "routing": _routing,
        "similarity": _similarity,
        "targets": _targets,
        "lengths": _lengths,
        "training": _training,
        "pooling": _pooling,
        "hidden": _hidden,
        "modes": _modes,
        "effective": _effective,
        "speed": _speed,
    }
    return {name: text for name, part in parts.items() if (text := part(report))}


def _sparsification(report: Report) -> str:
    found = report["analyses"].get("sparsification")
    if not found:
        return ""
    steps = found["steps"]

    def kept(tasks: Iterable[str]) -> str:
        end = [s["retention"] for s in steps if s["msr"] == 1 and s["task"] in tasks]
        return _range(end, lambda v: f"{v:.0f}")

    lost = [s["msr"] for s in steps if s["task"] in SENSITIVE and s["retention"] < 90]
    first = (
        f"the first retrieval task has lost a tenth of its score at Ω = {min(lost):g}"
        if lost
        else "no retrieval task loses a tenth of its score"
    )
    return (
        f"With every head sparse, retrieval keeps {kept(SENSITIVE)} % of its score and text "
        f"{kept(ROBUST)} %. Going there in the order of the retrieval scores, {first}."
    )


def _retrieval(report: Report) -> str:
    found = report["analyses"].get("sparsification")
    if not found:
        return ""
    scores = np.asarray(found["heads"])
    ranked = np.sort(scores.ravel())[::-1]
    layer = found["layers"][int(scores.max(1).argmax())]
    return (
        f"The highest score is {ranked[0]:.2f}, in layer {layer}; {int((ranked > 0.1).sum())} of "
        f"{ranked.size} query heads have more than 0.1, and the median head has "
        f"{float(np.median(ranked)):.3f}."
    )


def _routing(report: Report) -> str:
    found = report["routing"].get(main_group(report))
    if not found:
        return ""
    shares = np.asarray([found[task] for task in TASKS])  # [tasks, layers, heads]
    full, sparse = (shares < 0.05).all(0), (shares > 0.95).all(0)
    return (
        f"Over the seeds and all five tasks, {int(full.sum())} of {full.size} heads are always in "
        f"retrieval mode, {int(sparse.sum())} always sparse, and "
        f"{int((~full & ~sparse).sum())} depend on the input or the seed."
    )


def _similarity(report: Report) -> str:
    found = report["analyses"].get("similarity")
    if not found:
        return ""
    mixed = np.asarray([[(a in SENSITIVE) != (b in SENSITIVE) for b in TASKS] for a in TASKS])
    means = {name: float(np.asarray(m)[mixed].mean()) for name, m in found["matrices"].items()}
    return (
        "Between retrieval and text, the mean similarity before and after the task MLP is "
        f"{means['before, cosine']:.2f} and {means['after, cosine']:.2f} as a plain cosine, "
        f"{means['before, rescaled']:.2f} and {means['after, rescaled']:.2f} rescaled."
    )


def _targets(report: Report) -> str:
    groups, length = elastic_groups(report), str(report["settings"]["length"])
    if len(groups) < 2:
        return ""
    first, last = (report["results"][group][length] for group in (groups[0], groups[-1]))

    def msr(one: Any, tasks: Iterable[str]) -> str:
        return f"{float(np.mean([one[task]['msr']['mean'] for task in tasks])):.2f}"

    return (
        f"From {label(groups[0]).split(', ')[1]} to {label(groups[-1]).split(', ')[1]}, Ω on "
        f"retrieval goes from {msr(first, SENSITIVE)} to {msr(last, SENSITIVE)} and its accuracy "
        f"from {percent(first['all']['retrieval']['mean'])} to "
        f"{percent(last['all']['retrieval']['mean'])}; Ω on text from {msr(first, ROBUST)} to "
        f"{msr(last, ROBUST)}."
    )


def _lengths(report: Report) -> str:
    results, main = report["results"], main_group(report)
    plain = [g for g in ("full", main, *STATIC, "streaming") if len(results.get(g, ())) > 1]
    if not plain:
        return ""
    longest = max(results["full"], key=int)
    times = int(longest) / report["settings"]["length"]

    def at(group: str) -> str:
        figures = results[group][longest]["all"]
        return (
            f"{label(group)} {percent(figures['retrieval']['mean'])} and "
            f"{figures['text_loss']['mean']:.3f}"
        )

    said = (
        f"Right answers on retrieval, and loss on text, at {int(longest):,} tokens "
        f"({times:g} × the trained length), as it is: {'; '.join(map(at, plain))}."
    )
    stretched = [g + YARN for g in plain if longest in results.get(g + YARN, ())]
    return (
        f"{said} With positions stretched: {'; '.join(map(at, stretched))}." if stretched else said
    )


def _training(report: Report) -> str:
    found = report["analyses"].get("curves")
    if not found:
        return ""

    def mean(place: int, figure: str) -> float:
        return float(np.mean([run["history"][place][figure] for run in found["runs"]]))

    return (
        f"As the mean over the seeds ({len(found['runs'])}), the LM loss goes from "
        f"{mean(0, 'lm_loss'):.2f} to {mean(-1, 'lm_loss'):.2f} and the penalty from "
        f"{mean(0, 'penalty'):.2f} to {mean(-1, 'penalty'):.2f} between the first log and the last."
    )


def _among(report: Report, groups: Iterable[str]) -> str:
    """Scores of a few groups, and how far the recipe's seeds are apart."""
    length, results, main = str(report["settings"]["length"]), report["results"], main_group(report)
    there = [group for group in groups if group in results]
    if not there or main not in results:
        return ""
    scores = [results[group][length]["all"]["score"]["mean"] for group in (main, *there)]
    own = results[main][length]["all"]["score"]
    return (
        f"The mean scores lie between {min(scores):.3f} and {max(scores):.3f}; the recipe's own "
        f"seeds have a standard deviation of {own['spread']:.3f}."
    )


def _pooling(report: Report) -> str:
    return _among(report, [group for group in report["results"] if group.startswith("boundary")])


def _hidden(report: Report) -> str:
    return _among(report, [group for group in report["results"] if group.startswith("hidden")])


def _modes(report: Report) -> str:
    length, results = str(report["settings"]["length"]), report["results"]
    groups = [group for group in (main_group(report), "fa-xa", "xa-ssa") if group in results]
    if len(groups) < 2:
        return ""

    def one(group: str) -> str:
        own = results[group][length]["all"]
        return (
            f"{label(group)} {percent(own['retrieval']['mean'])} at "
            f"Ω_ESR = {own['esr']['mean']:.2f}"
        )

    return f"Right answers on retrieval: {'; '.join(map(one, groups))}."


def _effective(report: Report) -> str:
    length, results, main = str(report["settings"]["length"]), report["results"], main_group(report)
    if main not in results:
        return ""
    esr = results[main][length]["all"]["esr"]["mean"]
    retrieval = results[main][length]["all"]["retrieval"]["mean"]
    wholes = {group: one[length]["all"] for group, one in results.items() if length in one}
    as_sparse = [
        group
        for group, one in wholes.items()
        if not group.startswith(("elastic-t", "random", "hidden", "boundary"))
        and one["esr"]["mean"] >= esr
        and one["retrieval"]["mean"] >= retrieval
    ]
    said = listed(map(label, as_sparse)) if as_sparse else "none"
    return (
        f"The recipe's routers leave out {percent(esr)} of the query-key pairs and answer "
        f"{percent(retrieval)}. Methods that leave out as much or more and answer as many or more: "
        f"{said}."
    )


def _speed(report: Report) -> str:
    said = []
    found = report["speed"].get("router")
    if found:
        ms = [row["ms"]["router-graph"] for row in found["rows"] if "router-graph" in row["ms"]]
        if ms:
            said.append(
                f"The router takes {_range(ms, lambda v: f'{v:.3f}')} ms per layer in a CUDA graph "
                "at any length."
            )
    found = report["speed"].get("attention")
    if found:
        ratios = [
            row["ms"]["serial"] / row["ms"]["triton"]
            for row in found["rows"]
            if {"serial", "triton"} <= row["ms"].keys() and row["share"] not in (0, 1)
        ]
        if ratios:
            said.append(
                "With both kinds of heads in a layer, the fused call is "
                f"{_range(ratios, lambda v: f'{v:.1f}')} times as fast as one kind after the "
                "other (the serial backend, which is written to be read)."
            )
    found = report["speed"].get("e2e")
    if found:
        longest = max(row["length"] for row in found["rows"])
        ms = next(row["ms"] for row in found["rows"] if row["length"] == longest)
        plain = [one for name, one in ms.items() if name.startswith("sdpa")]
        others = [
            f"{name} {min(plain) / one:.2f}"
            for name, one in ms.items()
            if plain and not name.startswith("sdpa")
        ]
        if others:
            said.append(
                f"Prefill of {longest:,} tokens, times as fast as the unchanged model's best "
                f"kernel: {', '.join(others)}."
            )
    else:
        said.append("Whole models were not measured in the files this page was made from.")
    return " ".join(said)
