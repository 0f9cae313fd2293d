"""The tables of the page: headings, rows of text, and a note below."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from elasticore.eval.tasks import TASKS
from recipes.tiny.plan import SELECTORS
from recipes.tiny.sections import PLACES
from recipes.tiny.sentences import STATIC, pm, verdict
from recipes.tiny.summary import YARN, elastic_groups, label, main_group, paired

__all__ = [
    "ablation_table",
    "answer_table",
    "length_table",
    "made_table",
    "msr_table",
    "paired_table",
    "paper_table",
    "sparsification_table",
    "task_table",
]

Report = dict[str, Any]
Table = dict[str, Any]


def _table(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    note: str = "",
    own: Iterable[str] = (),
) -> Table:
    """``own`` are first cells of rows that stand out."""
    marked = set(own)
    lines = [{"cells": list(row), "own": row[0] in marked} for row in rows]
    return {"headings": list(headings), "rows": lines, "note": note}


def paired_table(report: Report) -> Table:
    """Elastic attention and static patterns with as many sparse heads."""
    methods = (*STATIC, "random")
    rows = []
    for row in paired(report):
        cells = [label(row["group"]), pm(row["msr"]), pm(row["elastic"]["retrieval"])]
        for method in methods:
            found = row["methods"].get(method)
            cells.append("–")
            if found:
                cells[-1] = f"{pm(found['retrieval'])} ({verdict(found['ahead'])})"
        losses = [row["elastic"], *(row["methods"].get(method) for method in STATIC)]
        cells += ["–" if one is None else _added(one["added_loss"]) for one in losses]
        rows.append(cells)
    names = [label(method) for method in STATIC]
    headings = ["", "mean Ω_MSR", "elastic", *names, "best random table"]
    headings += [f"text: {name}" for name in ("elastic", *names)]
    return _table(
        headings,
        rows,
        "Right answers on retrieval, and the loss added on text. In brackets: elastic beside that "
        "method, over paired seeds; level if the mean difference is below half a point or within "
        "its own standard deviation.",
    )


def _added(figure: dict[str, Any] | None) -> str:
    if figure is None:
        return "–"
    scaled = {**figure, "mean": 100 * figure["mean"], "spread": 100 * figure["spread"]}
    return f"{pm(scaled, 2)} %"


def _main_methods(report: Report) -> list[str]:
    """Groups of the main tables, in the order of the page."""
    order = ["full", "streaming", *STATIC, *elastic_groups(report), "fa-xa", "xa-ssa", *SELECTORS]
    return [group for group in order if group in report["results"]]


def task_table(report: Report) -> Table:
    """Scores per task (Tables 1, 7 and 8)."""
    length, rows = str(report["settings"]["length"]), []
    for group in _main_methods(report):
        own = report["results"][group][length]
        whole = own["all"]
        cells = [label(group), *(pm(own[task]["score"]) for task in TASKS), pm(whole["score"])]
        rows.append([*cells, pm(whole["msr"], 2), pm(whole["esr"], 2)])
    return _table(
        ["", *TASKS, "mean", "Ω_MSR", "Ω_ESR"],
        rows,
        f"At {int(length):,} tokens, {report['settings']['samples']} held-out samples per task. "
        "needle, multikey and tracking: share of answers with every token right; code and prose: "
        "share of right tokens. Mean ± standard deviation over the seeds where there are several.",
        own=[label(main_group(report))],
    )


def msr_table(report: Report) -> Table:
    """Ω_MSR per task, where it differs."""
    length = str(report["settings"]["length"])
    groups = [*elastic_groups(report), "fa-xa", "xa-ssa"]
    rows = [
        [label(group), *(pm(report["results"][group][length][task]["msr"]) for task in TASKS)]
        for group in groups
        if group in report["results"]
    ]
    return _table(["", *TASKS], rows, own=[label(main_group(report))])


def length_table(report: Report, figure: str) -> Table:
    """One figure of the main methods over the lengths (Tables 2 and 10)."""
    results = report["results"]
    lengths = sorted(results["full"], key=int)
    groups = [group for group in _main_methods(report) if len(results[group]) > 1]
    groups += [name for group in groups if (name := group + YARN) in results]
    rows = [
        [
            label(group),
            *(pm(own[one]["all"][figure]) if one in own else "–" for one in lengths),
        ]
        for group in groups
        for own in [results[group]]
    ]
    title = {"retrieval": "right answers on retrieval", "text_loss": "loss on text, nats"}[figure]
    headings = [title, *(f"{int(one):,}" for one in lengths)]
    count, few = report["settings"]["samples"], report["settings"]["length_samples"]
    note = f"{few} samples per task, {count} at {report['settings']['length']:,}. YaRN stretches "
    note += "the rotary embedding of the frozen backbone beyond that; nothing was trained for it."
    return _table(headings, rows, note, own=[label(main_group(report))])


def sparsification_table(report: Report) -> Table:
    """What each task keeps, in percent (Table 5)."""
    steps = report["analyses"].get("sparsification", {}).get("steps", [])
    rows = [
        [
            f"{msr:g}",
            *(
                next(f"{s['retention']:.1f}" for s in steps if (s["msr"], s["task"]) == (msr, task))
                for task in TASKS
            ),
        ]
        for msr in sorted({step["msr"] for step in steps})
    ]
    return _table(["Ω_MSR", *TASKS], rows, "Percent of the score with full attention.")


def ablation_table(report: Report, kind: str) -> Table:
    """Routers trained otherwise in one respect (Table 3, Figure 14, Table 4)."""
    main, length = main_group(report), str(report["settings"]["length"])
    names = {
        "hidden": {"hidden2": "× 2", main: "× 4 (default)", "hidden6": "× 6", "hidden8": "× 8"},
        "boundary": {
            "boundary50": "50 tokens",
            main: "100 tokens (default)",
            "boundary400": "400 tokens",
            "boundaryall": "all tokens",
        },
        "modes": {main: "FA-SSA (default)", "fa-xa": "FA-XA", "xa-ssa": "XA-SSA"},
    }[kind]
    there = [group for group in names if group in report["results"]]
    rows = []
    for group in there if len(there) > 1 else []:
        whole = report["results"][group][length]["all"]
        figures = (whole["retrieval"], whole["text_loss"], whole["msr"], whole["esr"])
        seeds = len(whole["msr"]["seeds"])
        rows.append([names[group], *(pm(figure) for figure in figures), str(seeds)])
    headings = ["", "retrieval", "loss on text", "mean Ω_MSR", "mean Ω_ESR", "seeds"]
    return _table(headings, rows)


def answer_table(example: dict[str, Any]) -> Table:
    """What each way to attend wrote on one prompt."""
    rows = [["expected", _plain(example["expected"]), ""]]
    for name, text in example["answers"].items():
        right = "right" if text == example["expected"] else "wrong"
        rows.append([name, _plain(text), right])
    return _table(["", "answer", ""], rows)


def _plain(text: str) -> str:
    return " ⏎ ".join(text.strip().splitlines())


def made_table(report: Report) -> Table:
    """Machine, versions, command and time."""
    settings, seconds = report["settings"], report["seconds"]
    trainings = report.get("trainings", {})
    took = "; ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    recipe = settings["recipe"]
    rows = [
        ["command", report["command"]],
        ["date", report["date"]],
        ["machine", f"{report['gpu']}, {report['cpu_cores']} CPU cores"],
        ["versions", ", ".join(f"{name} {one}" for name, one in report["versions"].items())],
        ["time", f"{took}; together {sum(seconds.values()) / 60:.1f} minutes"],
        ["trainings", f"{len(trainings)}, {settings['parallel']} at a time"],
        [
            "each",
            f"{recipe['max_steps']} steps of {recipe['batch_size']} samples of "
            f"{recipe['data']['length']:,} tokens, {recipe['dtype']}",
        ],
        ["scores", f"in {settings['dtype']}"],
        ["elastic", "; ".join(f"{k} {_said(v)}" for k, v in recipe["elastic"].items())],
    ]
    if trainings:
        each = [one["seconds"] for one in trainings.values()]
        rows.insert(6, ["one training", f"{min(each):.0f} to {max(each):.0f} s"])
    return _table(["", ""], rows)


def _said(setting: Any) -> str:
    """A setting, or the settings of a policy or pattern after its name."""
    if not isinstance(setting, dict):
        return str(setting)
    own = (f"{key} {value}" for key, value in setting.items() if key != "name")
    return ", ".join([setting["name"], *own])


def paper_table() -> Table:
    """Where the page has what of the paper."""
    return _table(["paper", "section"], PLACES)
