"""Which tasks keep their score without the far text, as a picture.

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


if __name__ == "__main__":
    results = json.loads(Path("benchmarks/results/smollm2-retention.json").read_text("utf-8"))
    print(retention_picture(results["lengths"]["4096"], Path("docs/images/smollm2-retention.png")))
