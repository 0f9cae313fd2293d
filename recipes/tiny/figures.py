"""The pictures of the reproduction, drawn from its figures alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from elasticore.drawing import pyplot, save
from elasticore.eval.analysis import RetrievalScores, Step
from elasticore.eval.analysis.plots import retrieval_picture, sparsification_picture
from elasticore.eval.plots import routing_picture
from elasticore.eval.tasks import TASKS
from elasticore.train.curves import read_curves
from elasticore.train.plots import training_picture
from recipes.tiny.plan import SELECTORS, SENSITIVE
from recipes.tiny.summary import YARN, elastic_groups, fronts, label, main_group

__all__ = ["draw"]

Report = dict[str, Any]
DPI = 140
STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
# Okabe and Ito's colours, told apart by colour-blind readers.
COLOURS = {
    "elastic": "#D55E00",
    "duo": "#0072B2",
    "prulong": "#009E73",
    "random, best": "#666666",
    "random, median": "#aaaaaa",
    "ranking": "#CC79A7",
    "streaming": "#000000",
    "full": "#000000",
    "fa-xa": "#E69F00",
    "xa-ssa": "#56B4E9",
}
TASK_COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#56B4E9")
NAMES = {
    "elastic": "elastic attention",
    "random, best": "random tables, best",
    "random, median": "random tables, median",
    "ranking": "retrieval-score ranking (C.2)",
}


def draw(report: Report, folder: Path) -> dict[str, Path]:
    """Draw every picture that the figures suffice for; return them by name."""
    parts: dict[str, Callable[[Report, Path], Path]] = {
        "front": _front,
        "effective": _effective,
        "targets": _targets,
        "lengths": _lengths,
        "sparsification": _sparsification,
        "retrieval": _retrieval,
        "routing": _routing,
        "similarity": _similarity,
        "training": _training,
        "pooling": _pooling,
        "speed": _speed,
    }
    with pyplot().rc_context(STYLE):
        return {
            name: part(report, folder / f"{name}.png")
            for name, part in parts.items()
            if _there(name, report)
        }


def _there(name: str, report: Report) -> bool:
    """Whether the report has what a picture shows."""
    analyses, results = report["analyses"], report["results"]
    needs = {
        "targets": sum(group.startswith("elastic-t") for group in results) > 1,
        "lengths": len(results["full"]) > 1,
        "sparsification": "sparsification" in analyses,
        "retrieval": "sparsification" in analyses,
        "routing": main_group(report) in report["routing"],
        "similarity": "similarity" in analyses,
        "training": "curves" in analyses,
        "pooling": any(group.startswith("boundary") for group in results),
        "speed": any(report["speed"].values()),
    }
    return bool(needs.get(name, True))


def _points(axis: Any, points: Sequence[dict[str, Any]], x: str, y: str, **style: Any) -> None:
    """Means with their spread in both directions, joined."""
    own = [point for point in points if y in point]
    if own:
        axis.errorbar(
            [point[x]["mean"] for point in own],
            [point[y]["mean"] for point in own],
            xerr=[point[x]["spread"] for point in own],
            yerr=[point[y]["spread"] for point in own],
            capsize=2,
            markersize=5,
            **style,
        )


def _ranking(report: Report) -> list[dict[str, Any]]:
    """Points of the heads ranked by their retrieval score, as :func:`fronts` has them."""
    steps = report["analyses"].get("sparsification", {}).get("steps", [])
    full = {s["task"]: s["loss"] for s in steps if s["msr"] == 0}
    points = []
    for msr in sorted({step["msr"] for step in steps}):
        own = {step["task"]: step for step in steps if step["msr"] == msr}
        added = [own[t]["loss"] / full[t] - 1 for t in own if t not in SENSITIVE]
        figures = {
            "msr": msr,
            "retrieval": float(np.mean([own[task]["score"] for task in SENSITIVE])),
            "added_loss": float(np.mean(added)),
        }
        points.append({k: {"mean": v, "spread": 0.0} for k, v in figures.items()})
    return points


def _front(report: Report, path: Path) -> Path:
    """Retrieval, and the loss added on text, over the mean share of sparse heads."""
    families = fronts(report) | {"ranking": _ranking(report)}
    shown = ["duo", "prulong", "ranking", "random, best", "random, median", "streaming", "full"]
    figure, axes = pyplot().subplots(1, 2, figsize=(9.2, 3.9), layout="constrained")
    for axis, y in zip(axes, ("retrieval", "added_loss"), strict=True):
        for family in (*shown, "elastic"):
            style = {"color": COLOURS[family], "label": NAMES.get(family, label(family))}
            single = family in ("streaming", "full")
            style["fmt"] = {"streaming": "X", "full": "*"}.get(family, "o-")
            if family == "elastic":
                style |= {"linewidth": 2.2, "zorder": 5}
            elif not single:
                style |= {"linewidth": 1.2, "alpha": 0.9}
            _points(axis, families.get(family, []), "msr", y, **style)
        axis.set_xlabel("mean Ω_MSR over the five tasks (share of sparse heads)")
    axes[0].set_title("retrieval: right answers")
    axes[0].set_ylim(-0.03, 1.05)
    axes[1].set_title("text: loss added to full attention's")
    axes[1].yaxis.set_major_formatter(pyplot().FuncFormatter(lambda v, _: f"{v:.2%}"))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return save(figure, path, DPI)


def _effective(report: Report, path: Path) -> Path:
    """Retrieval over the share of query-key pairs left out, for all methods."""
    families = fronts(report)
    figure, axis = pyplot().subplots(figsize=(7.2, 4.2), layout="constrained")
    for family in ("full", "streaming", "duo", "prulong", "fa-xa", "xa-ssa", "elastic"):
        style = {"color": COLOURS[family], "label": NAMES.get(family, label(family))}
        style["fmt"] = {"streaming": "X", "full": "*"}.get(family, "o-")
        _points(axis, families.get(family, []), "esr", "retrieval", **style)
    markers = "sD^vP<>hp8d*"
    kinds = list(dict.fromkeys(kind for kind, _ in SELECTORS.values()))
    for number, kind in enumerate(kinds):
        own = [f for name, (k, _) in SELECTORS.items() if k == kind for f in families.get(name, [])]
        own.sort(key=lambda point: point["esr"]["mean"])
        style = {"color": "#777777", "fmt": f"{markers[number]}:", "label": kind}
        _points(axis, own, "esr", "retrieval", **style)
    axis.set_xlabel("mean Ω_ESR over the five tasks (share of query-key pairs left out)")
    axis.set_ylabel("right answers on retrieval")
    axis.set_ylim(-0.03, 1.05)
    figure.legend(loc="outside right upper")
    return save(figure, path, DPI)


def _targets(report: Report, path: Path) -> Path:
    """Per task: score and Ω_MSR for every target (Figure 7)."""
    groups = elastic_groups(report)
    return _bars(report, groups, [f"t = {g.removeprefix('elastic-t')}" for g in groups], path)


def _pooling(report: Report, path: Path) -> Path:
    """Per task: score and Ω_MSR for every number of pooled tokens (Figure 14)."""
    names = {"boundary50": "50", main_group(report): "100", "boundary400": "400"}
    names["boundaryall"] = "all"
    groups = [group for group in names if group in report["results"]]
    return _bars(report, groups, [f"{names[g]} tokens" for g in groups], path)


def _bars(report: Report, groups: Sequence[str], names: Sequence[str], path: Path) -> Path:
    """A bar per task and group for the score, and one for Ω_MSR."""
    plt = pyplot()
    length = str(report["settings"]["length"])
    figure, (top, bottom) = plt.subplots(
        2, 1, figsize=(7.2, 4.6), sharex=True, height_ratios=(1, 1), layout="constrained"
    )
    places = np.arange(len(TASKS))
    width = 0.8 / len(groups)
    shades = plt.get_cmap("viridis")(np.linspace(0.1, 0.85, len(groups)))
    for number, (group, name, colour) in enumerate(zip(groups, names, shades, strict=True)):
        own = [report["results"][group][length][task] for task in TASKS]
        where = places + (number - (len(groups) - 1) / 2) * width
        for axis, figure_name in ((top, "score"), (bottom, "msr")):
            means = [one[figure_name]["mean"] for one in own]
            spread = [one[figure_name]["spread"] for one in own]
            label_it = name if axis is top else None
            axis.bar(where, means, width * 0.92, yerr=spread, color=colour, label=label_it)
    top.set_ylabel("score")
    bottom.set_ylabel("Ω_MSR")
    for axis in (top, bottom):
        axis.set_ylim(0, 1.05)
    bottom.set_xticks(places, list(TASKS))
    figure.legend(loc="outside right upper")
    return save(figure, path, DPI)


def _lengths(report: Report, path: Path) -> Path:
    """Retrieval, loss on text, and Ω_ESR over the length (Table 2, Figures 8 and 12)."""
    results, main = report["results"], main_group(report)
    groups = ["full", "streaming", "duo", "prulong", "fa-xa", "xa-ssa", main]
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.9), layout="constrained")
    names = {"retrieval": "retrieval: right answers", "text_loss": "text: loss (nats)"}
    trained, lengths = report["settings"]["length"], sorted(map(int, results["full"]))
    for axis, name in zip(axes, (*names, "esr"), strict=True):
        for group in (one for one in groups if one in results):
            colour = COLOURS["elastic" if group == main else group]
            style = {
                "color": "#888888" if group == "streaming" else colour,
                "linewidth": 2.2 if group == main else 1.3,
                "markersize": 5,
            }
            own = {length: one["all"][name] for length, one in results[group].items()}
            fmt = {"full": "*-", "streaming": "X-"}.get(group, "o-")
            _over_lengths(axis, own, fmt=fmt, label=label(group), capsize=2, **style)
            stretched = results.get(group + YARN, {})
            if stretched and name != "esr":  # dashed, from the trained length on
                more = {length: one["all"][name] for length, one in stretched.items()}
                _over_lengths(axis, {str(trained): own[str(trained)], **more}, fmt=".--", **style)
        _token_axis(axis, lengths)
        axis.axvline(trained, color="#999999", linewidth=0.8, linestyle=":")
        axis.set_title(names.get(name, "Ω_ESR"))
        axis.set_xlabel("tokens")
    axes[0].plot([], [], ".--", color="#888888", label="the same with YaRN")
    axes[0].plot([], [], ":", color="#999999", label="trained length")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return save(figure, path, DPI)


def _over_lengths(axis: Any, figures: Mapping[str, dict[str, Any]], **style: Any) -> None:
    """A line over lengths, which are the keys."""
    points = sorted((int(length), one["mean"], one["spread"]) for length, one in figures.items())
    x, y, spread = zip(*points, strict=True)
    axis.errorbar(x, y, yerr=spread, **style)


def _sparsification(report: Report, path: Path) -> Path:
    steps = [Step(**row) for row in report["analyses"]["sparsification"]["steps"]]
    sensitive = {name: task.sensitive for name, task in TASKS.items()}
    return sparsification_picture(steps, path, sensitive=sensitive)


def _retrieval(report: Report, path: Path) -> Path:
    own = report["analyses"]["sparsification"]
    heads, kv_heads = (torch.tensor(own[name]).double() for name in ("heads", "kv_heads"))
    return retrieval_picture(RetrievalScores(heads, kv_heads, tuple(own["layers"])), path)


def _routing(report: Report, path: Path) -> Path:
    shares = {t: torch.tensor(v) for t, v in report["routing"][main_group(report)].items()}
    shares["all tasks"] = torch.stack(list(shares.values())).mean(0)
    return routing_picture(shares, path)


def _similarity(report: Report, path: Path) -> Path:
    """The tasks' similarity before and after the task MLP (Figures 5 and 9)."""
    own = report["analyses"]["similarity"]
    figure, axes = pyplot().subplots(1, 4, figsize=(11, 3.3), sharey=True, layout="constrained")
    places = range(len(own["tasks"]))
    for axis, (name, matrix) in zip(axes, own["matrices"].items(), strict=True):
        image = axis.imshow(np.asarray(matrix), vmin=-1, vmax=1, cmap="RdBu_r")
        axis.set_title(name.replace("rescaled", "rescaled (Eq. 16)"))
        axis.set_xticks(places, own["tasks"], rotation=45, ha="right")
        axis.set_yticks(places, own["tasks"])
        axis.grid(visible=False)
        axis.tick_params(length=0)
        for (i, j), value in np.ndenumerate(np.asarray(matrix)):
            colour = "white" if abs(value) > 0.6 else "black"
            axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    figure.colorbar(image, ax=axes.tolist(), shrink=0.7).outline.set_visible(False)
    return save(figure, path, DPI)


def _training(report: Report, path: Path) -> Path:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "curves.json"
        file.write_text(json.dumps(report["analyses"]["curves"]), encoding="utf-8")
        return training_picture(read_curves(file), path)


def _speed(report: Report, path: Path) -> Path:
    """Fused beside serial (Figure 4), the router (Figure 10) and whole models (Figures 8, 12)."""
    plt = pyplot()
    families = [name for name, found in report["speed"].items() if found]
    figure, axes = plt.subplots(
        1, len(families), figsize=(3.6 * len(families), 3.4), squeeze=False, layout="constrained"
    )
    drawing = {"attention": _attention_speed, "router": _router_speed, "e2e": _model_speed}
    for axis, family in zip(axes[0], families, strict=True):
        drawing[family](axis, report["speed"][family]["rows"])
        rows = report["speed"][family]["rows"]
        _token_axis(axis, sorted({row["length"] for row in rows}))
        axis.set_xlabel("tokens")
        axis.set_ylim(0, axis.get_ylim()[1] * 1.25)  # room for the legend
        axis.legend(loc="upper right", ncols=2)
    return save(figure, path, DPI)


def _token_axis(axis: Any, lengths: Sequence[int]) -> None:
    """Lengths in powers of two, with their names."""
    axis.set_xscale("log", base=2)
    names = [f"{one // 1024}K" if one >= 1024 else str(one) for one in lengths]
    axis.set_xticks(lengths, [name.replace("1024K", "1M") for name in names])


def _attention_speed(axis: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """How much faster the fused call is than the serial one."""
    found: dict[float, list[tuple[int, float]]] = {}
    for row in rows:
        if {"serial", "triton"} <= row["ms"].keys():
            ratio = row["ms"]["serial"] / row["ms"]["triton"]
            found.setdefault(row["share"], []).append((row["length"], ratio))
    for share, points in sorted(found.items()):
        axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=f"Ω = {share:g}")
    axis.set_title("serial time / fused time")


def _router_speed(axis: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    points = sorted((row["length"], row["ms"]) for row in rows)
    for engine, name in (("router", "one by one"), ("router-graph", "in a CUDA graph")):
        own = [(length, ms[engine]) for length, ms in points if engine in ms]
        if own:
            axis.plot(*zip(*own, strict=True), "o-", markersize=4, label=name)
    axis.set_title("router, ms per layer")


def _model_speed(axis: Any, rows: Iterable[Mapping[str, Any]]) -> None:
    """How much faster elastic prefill is than the unchanged model's best."""
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        plain = [ms for name, ms in row["ms"].items() if name.startswith("sdpa")]
        for name, ms in row["ms"].items():
            if not name.startswith("sdpa") and plain:
                found.setdefault(name, []).append((row["length"], min(plain) / ms))
    for name, points in found.items():
        axis.plot(*zip(*sorted(points), strict=True), "o-", markersize=4, label=name)
    axis.axhline(1, color="#999999", linewidth=0.8)
    axis.set_title("prefill speed-up, whole model")
