"""How alike tasks look to a router, before and after its task MLP (Eqs. 15, 16; Figures 5, 9)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from elasticore.eval.analysis.rows import Row
from elasticore.eval.tasks import Sample
from elasticore.layout import Segments
from elasticore.models.elastic import routers
from elasticore.router.pooling import pool_boundary
from elasticore.router.router import AttentionRouter

__all__ = ["Activations", "router_activations", "similarity_rows", "task_similarity"]


class Activations(NamedTuple):
    """What one router sees of the prompts of each task: float32 ``[prompts, kv_heads * d]``."""

    before: dict[str, Tensor]
    after: dict[str, Tensor]


@torch.no_grad()
def router_activations(
    model: Any,
    samples: Sequence[Sample],
    layer: int = 0,
    *,
    progress: Callable[[Sequence[Sample]], Iterable[Sample]] = iter,
) -> Activations:
    """Pooled keys of every prompt, and what the task MLP makes of them.

    Parameters
    ----------
    model
        An elastic model with routers, in evaluation mode.
    samples
        Their prompts are read, not their answers.
    layer
        Which elastic layer's router to look at; the paper's Figure 5 shows the first.
    progress
        Wraps the samples, for a progress bar.

    Raises
    ------
    ValueError
        If the model is not elastic, or has no such layer.
    TypeError
        If there is a policy in the layer and no router.
    """
    found = routers(model)
    if not 0 <= layer < len(found):
        raise ValueError(f"layer must be from 0 to {len(found) - 1}, got {layer}.")
    router = found[layer]
    if not isinstance(router, AttentionRouter):
        raise TypeError(
            f"layer {layer} must have a router to look into, got a {type(router).__name__}."
        )
    seen: list[tuple[Tensor, Tensor]] = []

    def look(_: AttentionRouter, inputs: tuple[Tensor, Segments]) -> None:
        pooled = pool_boundary(*inputs, router.boundary)
        seen.append((pooled[0], router.task_representation(pooled)[0]))

    activations = Activations({}, {})
    handle = router.register_forward_pre_hook(look)
    try:
        for sample in progress(samples):
            prompt = torch.as_tensor(sample.input_ids[: sample.start], device=model.device)
            model(prompt[None], use_cache=False, logits_to_keep=1)
    finally:
        handle.remove()
    for side, values in zip(activations, zip(*seen, strict=True), strict=True):
        for sample, value in zip(samples, values, strict=True):
            row = value.float().flatten()[None].cpu()
            side[sample.task] = torch.cat([side[sample.task], row]) if sample.task in side else row
    return activations


def task_similarity(
    vectors: Mapping[str, Tensor], *, rescaled: bool = True, epsilon: float = 1e-6
) -> Tensor:
    """Cosine between the tasks' mean vectors.

    Parameters
    ----------
    vectors
        Per task, ``[prompts, features]``.
    rescaled
        Divide every feature by its root mean square over the prompts of both tasks of a pair
        first (Eqs. 15 and 16), so that features that are large for every task do not hide the rest;
        else the plain cosine.
    epsilon
        ε of Eq. 15.

    Returns
    -------
    Tensor
        float64 ``[tasks, tasks]`` on the CPU, symmetric, with 1 on the diagonal.
    """
    tasks = [value.double().cpu() for value in vectors.values()]
    result = torch.eye(len(tasks), dtype=torch.float64)
    for i, u in enumerate(tasks):
        for j, v in enumerate(tasks[:i]):
            sigma = torch.ones(u.shape[1], dtype=torch.float64)
            if rescaled:
                sigma = (torch.cat([u, v]).square().mean(0) + epsilon).sqrt()
            result[i, j] = result[j, i] = torch.nn.functional.cosine_similarity(
                (u / sigma).mean(0), (v / sigma).mean(0), dim=0
            )
    return result


def similarity_rows(activations: Activations, epsilon: float = 1e-6) -> list[Row]:
    """One row per pair of tasks, place (before, after) and measure (rescaled, cosine)."""
    rows: list[Row] = []
    for place, vectors in activations._asdict().items():
        for measure in ("rescaled", "cosine"):
            matrix = task_similarity(vectors, rescaled=measure == "rescaled", epsilon=epsilon)
            rows += [
                {"place": place, "measure": measure, "task": u, "other": v, "similarity": value}
                for u, line in zip(vectors, matrix.tolist(), strict=True)
                for v, value in zip(vectors, line, strict=True)
            ]
    return rows
