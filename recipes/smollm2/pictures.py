"""Which tasks keep their score without the far text, and what pooled keys tell, as pictures.

python -m recipes.smollm2.pictures       # from benchmarks/results to docs/images
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from elasticore.drawing import pyplot, save
from recipes.smollm2.retention import ROBUST, SENSITIVE

COLOURS = {"sensitive": "#D55E00", "robust": "#0072B2", "": "#999999"}


def retention_picture(found: dict[str, Any], path: Path) -> Path:
    """Bars of retention, sorted, in the colour of what the rule calls the task.

    Parameters
    ----------
    found
        Of one length, as in the result file: retention, kind and both scores by task.
    path
        Where it goes.
    """
    plt = pyplot()
    rows = sorted(found.items(), key=lambda item: -item[1]["retention"])
    figure, axes = plt.subplots(figsize=(7, 0.28 * len(rows) + 1.2), layout="constrained")
    seen = set()
    for place, (_, row) in enumerate(rows):
        kind = row["kind"]
        label = (kind or "neither") if kind not in seen else None
        seen.add(kind)
        axes.barh(place, 100 * row["retention"], color=COLOURS[kind], label=label)
        scores = f"{row['streaming']['score']:.0f} of {row['full']['score']:.0f}"
        axes.text(100 * row["retention"] + 1, place, scores, va="center", fontsize=8)
    for share in (SENSITIVE, ROBUST):
        axes.axvline(100 * share, color="black", linewidth=0.8, linestyle=":")
    axes.set_yticks(range(len(rows)), [name for name, _ in rows])
    axes.set_xlim(0, 122)
    axes.set_xlabel("score with all heads streaming, in % of the score with full attention")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    return save(figure, path, 140)


def ends_picture(found: dict[str, Any], path: Path) -> Path:
    """How well prompts are told apart, by layer and by what is pooled: all tasks, and same words.

    Parameters
    ----------
    found
        By layer, as :mod:`recipes.smollm2.ends` writes it.
    path
        Where it goes.
    """
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(7.5, 3.4), sharey=True, layout="constrained")
    image = None
    for one, (which, title) in zip(
        axes, (("all", "all tasks"), ("same words", "asked in the same words")), strict=True
    ):
        boundaries = list(next(iter(found.values()))[which])
        table = [[row[which][boundary] for row in found.values()] for boundary in boundaries]
        image = one.imshow(table, aspect="auto", vmin=0.5, vmax=1, cmap="cividis")
        one.set_title(title, fontsize=10)
        one.set_xlabel("layer")
        one.set_yticks(range(len(boundaries)), boundaries)
    axes[0].set_ylabel("tokens pooled at each end")
    figure.colorbar(image, ax=axes, label="pairs ranked rightly (.5: a guess)")
    return save(figure, path, 140)


if __name__ == "__main__":
    results, images = Path("benchmarks/results"), Path("docs/images")
    retention = json.loads((results / "smollm2-retention.json").read_text("utf-8"))
    print(retention_picture(retention["lengths"]["4096"], images / "smollm2-retention.png"))
    ends = json.loads((results / "smollm2-ends.json").read_text("utf-8"))
    print(ends_picture(ends["layers"], images / "smollm2-ends.png"))
