"""What routers could know: can sensitive and robust prompts be told apart by their pooled keys?

A linear reader of a layer's pooled keys, fitted on some samples, ranks others. Its figure is the
share of pairs (a sensitive prompt, a robust one) that it ranks rightly: .5 is a guess. Once over
all tasks, and once over pairs of tasks that ask in the same words, far and near.

python -m recipes.smollm2.ends                # 20 minutes on two cores, less on a GPU
python -m recipes.smollm2.ends --samples 8    # to try it
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from rich.progress import track

from elasticore.eval.chat_tasks import TASKS
from elasticore.eval.tasks import make_sample
from elasticore.models.families import attention_layers
from elasticore.models.loading import load_backbone
from elasticore.train import Recipe
from recipes.smollm2.levers import CONFIG
from recipes.study.about import about
from recipes.study.runs import console
from recipes.study.scores import UNSEEN

BOUNDARIES = (1, 4, 8, 16, 32, 64, 100, 256)
SAME_WORDS = (
    ("needle", "near-needle"),
    ("far-sentence", "near-sentence"),
    ("far-signature", "near-signature"),
)
FITTED = 0.6  # of the samples; the others are ranked
RIDGE = 90.0
Floats = NDArray[np.float64]


@torch.no_grad()
def pooled(model: Any, ids: torch.Tensor) -> Floats:
    """Means of the keys at both ends of a prompt, ``[layers, boundaries, features]``."""
    layers = attention_layers(model)
    found: list[Floats] = []

    def note(module: Any, inputs: Any, keys: torch.Tensor) -> None:
        ends = [torch.cat((keys[0, :b], keys[0, -b:])).float().mean(0) for b in BOUNDARIES]
        found.append(torch.stack(ends).double().cpu().numpy())

    hooks = [layer.k_proj.register_forward_hook(note) for layer in layers]
    try:
        model.base_model(ids.to(model.device), use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return np.stack(found)


def ranked(features: Floats, wanted: NDArray[np.bool_], fitted: NDArray[np.bool_]) -> Floats:
    """What a ridge regression on the fitted samples gives the others, both kinds counting alike."""
    mean, spread = features[fitted].mean(0), features[fitted].std(0) + 1e-6
    x = (features - mean) / spread
    own, sign = x[fitted], 2.0 * wanted[fitted] - 1
    weight = np.where(wanted[fitted], 1 / wanted[fitted].sum(), 1 / (~wanted[fitted]).sum())
    weighted = own * weight[:, None] * len(own)
    normal = weighted.T @ own + RIDGE * np.eye(own.shape[1])
    return np.asarray(x[~fitted] @ np.linalg.solve(normal, weighted.T @ sign))


def right_pairs(values: Floats, wanted: NDArray[np.bool_]) -> float:
    """Share of pairs whose wanted one has the larger value; ties count half."""
    gaps = values[wanted][:, None] - values[~wanted][None]
    return float((gaps > 0).mean() + (gaps == 0).mean() / 2)


def run(
    samples: Annotated[int, typer.Option(min=4, help="Of each task.")] = 40,
    length: Annotated[int, typer.Option(help="Their tokens.")] = 2048,
    output: Annotated[Path, typer.Option(help="Where the figures go.")] = Path(
        "runs/smollm2/ends.json"
    ),
) -> None:
    """Pool the keys of unseen training samples, fit, rank."""
    recipe = Recipe.load(CONFIG)
    names = list(recipe.targets)
    model, tokenizer = load_backbone(recipe.backbone, "bfloat16")
    keys, tasks, fitted = [], [], []
    for number in track(range(samples), "samples of each task", console=console, transient=True):
        for name in names:
            sample = make_sample(name, tokenizer, length, UNSEEN + number, "train", TASKS)
            keys.append(pooled(model, torch.as_tensor(sample.input_ids[: sample.start])[None]))
            tasks.append(name)
            fitted.append(number < FITTED * samples)
    table, part, task = np.stack(keys), np.array(fitted), np.array(tasks)
    wanted = np.isin(task, [name for name in names if float(recipe.targets[name]) < 1])
    rows = {}
    for layer in range(table.shape[1]):
        row: dict[str, dict[str, float]] = {"all": {}, "same words": {}}
        for place, boundary in enumerate(BOUNDARIES):
            values = ranked(table[:, layer, place], wanted, part)
            row["all"][str(boundary)] = round(right_pairs(values, wanted[~part]), 3)
            pairs = []
            for far, near in SAME_WORDS:
                asked = np.isin(task[~part], [far, near])
                pairs.append(right_pairs(values[asked], task[~part][asked] == far))
            row["same words"][str(boundary)] = round(float(np.mean(pairs)), 3)
        rows[str(layer)] = row
    report = {
        **about("prompts told apart by pooled keys", "python -m recipes.smollm2.ends"),
        "settings": {"samples": samples, "length": length, "fitted": FITTED, "ridge": RIDGE},
        "layers": rows,
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    console.print(f"Figures: [bold]{output}[/]")


if __name__ == "__main__":
    typer.run(run)
