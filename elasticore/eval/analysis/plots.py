"""Pictures of heads and tasks; that of routing frequencies is in `elasticore.eval.plots`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from elasticore.drawing import pyplot, save
from elasticore.eval.analysis.fidelity import HeadFidelity
from elasticore.eval.analysis.retrieval import RetrievalScores
from elasticore.eval.analysis.similarity import Activations, task_similarity
from elasticore.eval.analysis.sparsification import Step

__all__ = [
    "fidelity_picture",
    "retrieval_picture",
    "similarity_picture",
    "sparsification_picture",
]

COLOURS = ("#c0392b", "#2e6da4", "#5d8a66", "#8e7cc3", "#d4ac0d", "#999999", "#e59866", "#1b3f60")


def retrieval_picture(scores: RetrievalScores, path: str | Path, *, title: str = "") -> Path:
    """Draw the retrieval scores: layers × query heads, and all heads in falling order beside.

    Parameters
    ----------
    scores
        What to draw.
    path
        Where the picture goes; its suffix is the format.
    title
        Text above.
    """
    plt = pyplot()
    table = np.asarray(scores.heads)
    figure, (heat, curve) = plt.subplots(
        1,
        2,
        figsize=(3.4 + 0.22 * table.shape[1] + 3.4, 1.4 + max(2.2, 0.22 * table.shape[0])),
        width_ratios=(1.2, 1),
        layout="constrained",
    )
    image = heat.imshow(table, vmin=0, cmap="Reds", aspect="auto")
    heat.set_xlabel("query head")
    heat.set_ylabel("layer")
    _sparse_ticks(heat, [str(layer) for layer in scores.layers], "y")
    _sparse_ticks(heat, [str(head) for head in range(table.shape[1])], "x")
    bar = figure.colorbar(image, ax=heat, shrink=0.8)
    bar.outline.set_visible(False)
    bar.set_label("attention on the evidence", fontsize=8)
    for edge in heat.spines.values():
        edge.set_visible(False)
    ranked = np.sort(table.ravel())[::-1]
    curve.plot(np.arange(1, ranked.size + 1), ranked, color=COLOURS[0], marker="o", markersize=2)
    curve.set_xlabel("rank of the head")
    curve.set_ylabel("score")
    curve.set_ylim(bottom=0)
    curve.grid(alpha=0.3)
    if title:
        figure.suptitle(title, fontsize=11)
    return save(figure, Path(path), 150)


def sparsification_picture(
    steps: Sequence[Step],
    path: str | Path,
    *,
    sensitive: Mapping[str, bool] | None = None,
    title: str = "",
) -> Path:
    """Draw what each task keeps over the share of sparse heads, as in Figure 2.

    Parameters
    ----------
    steps
        What to draw. Tasks without any score at Ω_MSR = 0 have nothing to keep and are left out.
    path
        Where the picture goes; its suffix is the format.
    sensitive
        Per task, whether it is sparsity-sensitive: the others are dashed.
    title
        Text above.

    Raises
    ------
    ValueError
        If no task has anything to keep.
    """
    tasks = dict.fromkeys(step.task for step in steps if not np.isnan(step.retention))
    if not tasks:
        raise ValueError("steps must hold a task with a score above 0 where no head is sparse.")
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(5.6, 3.6), layout="constrained")
    for i, task in enumerate(tasks):
        points = [(step.msr, step.retention) for step in steps if step.task == task]
        robust = sensitive is not None and not sensitive.get(task, True)
        axis.plot(
            *zip(*points, strict=True),
            color=COLOURS[i % len(COLOURS)],
            linestyle="--" if robust else "-",
            marker="o",
            markersize=3,
            label=task,
        )
    axis.set_xlabel("Ω_MSR, the share of sparse heads")
    axis.set_ylabel("% of the score with full attention")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    figure.legend(loc="outside right upper", fontsize=8, frameon=False)
    if title:
        axis.set_title(title, fontsize=11)
    return save(figure, Path(path), 150)


def fidelity_picture(found: Sequence[HeadFidelity], path: str | Path, *, title: str = "") -> Path:
    """Draw what heads keep in their sparse mode, and its error: layers × query heads, per task.

    Dots are the heads that the router made sparse in at least half of the prompts.

    Parameters
    ----------
    found
        What to draw.
    path
        Where the picture goes; its suffix is the format.
    title
        Text above.
    """
    plt = pyplot()
    tasks = list(dict.fromkeys(one.task for one in found))
    layers = list(dict.fromkeys(one.layer for one in found))
    heads = 1 + max(one.head for one in found)
    figure, axes = plt.subplots(
        len(tasks),
        2,
        figsize=(2.4 + 0.44 * heads, (0.9 + max(1.8, 0.2 * len(layers))) * len(tasks)),
        squeeze=False,
        sharex=True,
        sharey=True,
        layout="constrained",
    )
    worst = max(one.output_error for one in found)
    columns = (
        ("kept_mass", "attention kept", "Blues", 1.0),
        ("output_error", "error of the output", "Reds", worst or 1.0),
    )
    for column, (name, said, colours, most) in enumerate(columns):
        for axis, task in zip(axes[:, column], tasks, strict=True):
            own = [one for one in found if one.task == task]
            values, sparse = (
                np.array([getattr(one, field) for one in own]).reshape(len(layers), heads)
                for field in (name, "sparse")
            )
            image = axis.imshow(values, vmin=0, vmax=most, cmap=colours, aspect="auto")
            chosen_y, chosen_x = (sparse >= 0.5).nonzero()
            axis.plot(chosen_x, chosen_y, "o", color="black", markersize=3, markeredgecolor="white")
            axis.set_title(f"{task}: {said}", fontsize=9)
            _sparse_ticks(axis, [str(layer) for layer in layers], "y")
            _sparse_ticks(axis, [str(head) for head in range(heads)], "x")
            for edge in axis.spines.values():
                edge.set_visible(False)
        axes[-1, column].set_xlabel("query head")
        bar = figure.colorbar(image, ax=axes[:, column].tolist(), shrink=0.8)
        bar.outline.set_visible(False)
    for axis in axes[:, 0]:
        axis.set_ylabel("layer")
    if title:
        figure.suptitle(title, fontsize=11)
    return save(figure, Path(path), 150)


def similarity_picture(activations: Activations, path: str | Path, *, title: str = "") -> Path:
    """Draw the tasks' similarity before and after the task MLP: plain cosines, and rescaled ones.

    Parameters
    ----------
    activations
        What to compare.
    path
        Where the picture goes; its suffix is the format.
    title
        Text above.
    """
    plt = pyplot()
    tasks = list(activations.before)
    size = 1.5 + 0.55 * len(tasks)
    figure, axes = plt.subplots(
        2, 2, figsize=(2 * size + 1.2, 2 * size), sharex=True, sharey=True, layout="constrained"
    )
    for row, rescaled in zip(axes, (False, True), strict=True):
        for axis, (place, vectors) in zip(row, activations._asdict().items(), strict=True):
            matrix = task_similarity(vectors, rescaled=rescaled)
            image = _matrix(axis, matrix, tasks)
            kind = "rescaled (Eq. 16)" if rescaled else "cosine"
            axis.set_title(f"{place} the task MLP, {kind}", fontsize=9)
    bar = figure.colorbar(image, ax=axes.ravel().tolist(), shrink=0.6)
    bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    return save(figure, Path(path), 150)


def _matrix(axis: Any, matrix: Tensor, tasks: list[str]) -> Any:
    table = np.asarray(matrix)
    image = axis.imshow(table, vmin=-1, vmax=1, cmap="RdBu_r")
    axis.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right", fontsize=8)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.tick_params(length=0)
    for (i, j), value in np.ndenumerate(table):
        colour = "white" if abs(value) > 0.6 else "black"
        axis.text(j, i, f"{value:.2f}", ha="center", va="center", fontsize=7, color=colour)
    for edge in axis.spines.values():
        edge.set_visible(False)
    return image


def _sparse_ticks(axis: Any, labels: list[str], which: str) -> None:
    """At most about a dozen labels, so that large models stay readable."""
    every = max(1, len(labels) // 12)
    places = range(0, len(labels), every)
    getattr(axis, f"set_{which}ticks")(places, labels[::every], fontsize=8)
    axis.tick_params(length=0)
