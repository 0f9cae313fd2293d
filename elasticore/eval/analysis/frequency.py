"""How often each head is sparse, per task and over all tasks (Figures 6 and 11)."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elasticore.eval.analysis.rows import Row
from elasticore.eval.evaluate import SAMPLES
from elasticore.eval.tasks import Sample
from elasticore.models.recording import record

__all__ = [
    "ALL_TASKS",
    "frequency_rows",
    "prompt_decisions",
    "read_decisions",
    "routing_frequency",
]

ALL_TASKS = "all tasks"


@torch.no_grad()
def prompt_decisions(
    model: Any,
    samples: Sequence[Sample],
    progress: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> list[tuple[str, Tensor]]:
    """Every prompt's task and what an elastic model's routers decide for it.

    Parameters
    ----------
    model
        An elastic model in evaluation mode.
    samples
        Their prompts are read, not their answers.
    progress
        Wraps the samples, for a progress bar.

    Returns
    -------
    list of (str, Tensor)
        int8 ``[layers, kv_heads]``: 1 = sparse.
    """
    found = []
    for sample in progress(samples):
        prompt = torch.as_tensor(sample.input_ids[: sample.start], device=model.device)
        with record() as trace:
            model(prompt[None], use_cache=False, logits_to_keep=1)
        found.append((sample.task, trace.decisions[:, 0]))
    return found


def read_decisions(folder: str | Path) -> list[tuple[str, Sequence[str]]]:
    """The same of a finished evaluation, from the folder of one of its methods.

    Raises
    ------
    FileNotFoundError
        If the folder holds no finished evaluation.
    ValueError
        If the method has no routers.
    """
    file = Path(folder) / SAMPLES
    if not file.is_file():
        raise FileNotFoundError(
            f"{folder} holds no {SAMPLES}; name RUN/METHOD, with the folder of a finished "
            "`elasticore eval` and a method in it."
        )
    try:
        with file.open(encoding="utf-8") as lines:  # answers may hold other marks of a line's end
            rows = [json.loads(line) for line in lines]
        decided = bool(rows) and all(row["decisions"] for row in rows)
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{file} is damaged: {error!r}; start the same `elasticore eval` again."
        ) from error
    if not decided:
        raise ValueError(f"{folder} is of a method that decides nothing; name one with routers.")
    return [(row["task"], row["decisions"]) for row in rows]


def routing_frequency(
    decisions: Iterable[tuple[str, Tensor | Sequence[str]]],
) -> dict[str, Tensor]:
    """Share of a task's prompts for which each head was sparse.

    Parameters
    ----------
    decisions
        For every prompt its task and what was decided: ``[layers, kv_heads]`` with 1 = sparse, as
        ``trace.decisions[:, i]``, or a string of 0 and 1 for each layer, as records keep it.

    Returns
    -------
    dict
        Per task, float64 ``[layers, kv_heads]``; behind them, where there are several tasks, their
        mean under `ALL_TASKS`, in which every task weighs the same.

    Raises
    ------
    ValueError
        If there is no prompt, or shapes differ.
    """
    found: dict[str, list[Tensor]] = {}
    for task, decided in decisions:
        if not isinstance(decided, Tensor):
            decided = torch.tensor([[int(head) for head in layer] for layer in decided])
        found.setdefault(task, []).append(decided.double().cpu())
    shapes = {tuple(one.shape) for own in found.values() for one in own}
    if len(shapes) != 1:
        raise ValueError(
            "decisions must hold prompts of one model, all [layers, kv_heads], got shapes "
            f"{sorted(shapes)}."
        )
    shares = {task: torch.stack(own).mean(0) for task, own in found.items()}
    if len(shares) > 1:
        shares[ALL_TASKS] = torch.stack(list(shares.values())).mean(0)
    return shares


def frequency_rows(frequency: Mapping[str, Tensor], layer_offset: int = 0) -> list[Row]:
    """One row per task and head: task, layer, kv_head, sparse (from 0 to 1)."""
    return [
        {"task": task, "layer": layer + layer_offset, "kv_head": head, "sparse": share}
        for task, shares in frequency.items()
        for layer, heads in enumerate(shares.tolist())
        for head, share in enumerate(heads)
    ]
