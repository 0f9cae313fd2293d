"""Pictures of what routers decide."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from elasticore.drawing import pyplot, save

__all__ = ["routing_picture"]


def routing_picture(
    frequency: Mapping[str, Tensor], path: str | Path, *, title: str = "", layer_offset: int = 0
) -> Path:
    """Draw how often each head is sparse: layers × heads, one panel per task (as in Figure 6).

    Parameters
    ----------
    frequency
        Per task, ``[layers, kv_heads]`` from 0 (always retrieval, red) to 1 (always sparse, blue).
    path
        Where the picture goes; its suffix is the format.
    title
        Text above the panels.
    layer_offset
        Index of the first layer shown.

    Raises
    ------
    ValueError
        If there is no task.
    """
    if not frequency:
        raise ValueError("frequency must hold at least one task.")
    plt = pyplot()
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Patch

    colours = LinearSegmentedColormap.from_list("routing", ["#c0392b", "#f4f1ee", "#2e6da4"])
    figure, axes = plt.subplots(
        1,
        len(frequency),
        figsize=(1.2 + 1.9 * len(frequency), 3.6),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axis, (task, values) in zip(axes[0], frequency.items(), strict=True):
        table = np.asarray(values.double().cpu())
        image = axis.imshow(table, vmin=0, vmax=1, cmap=colours, aspect="auto")
        axis.set_title(f"{task}\nΩ = {table.mean():.2f}", fontsize=10)
        axis.set_xticks(range(table.shape[1]))
        layers = range(0, table.shape[0], -(-table.shape[0] // 12))
        axis.set_yticks(layers, [str(layer + layer_offset) for layer in layers])
        axis.set_xlabel("KV head")
        for edge in axis.spines.values():
            edge.set_visible(False)
        axis.set_xticks(np.arange(-0.5, table.shape[1]), minor=True)
        axis.set_yticks(np.arange(-0.5, table.shape[0]), minor=True)
        axis.grid(which="minor", color="white", linewidth=1.5)
        axis.tick_params(which="both", length=0)
    axes[0][0].set_ylabel("layer")
    if all(bool(((x == 0) | (x == 1)).all()) for x in frequency.values()):  # of one prompt each
        names = {"sparse": colours(1.0), "retrieval": colours(0.0)}
        keys = [Patch(color=colour, label=name) for name, colour in names.items()]
        figure.legend(handles=keys, loc="outside right center", frameon=False)
    else:
        bar = figure.colorbar(image, ax=axes[0].tolist(), shrink=0.8, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["retrieval", "", "sparse"])
        bar.outline.set_visible(False)
    if title:
        figure.suptitle(title, fontsize=11)
    return save(figure, Path(path), dpi=150)
