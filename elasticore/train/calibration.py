"""What the pooled keys of typical inputs look like, so that routers start by seeing the input."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from elasticore.checks import check_int
from elasticore.layout import Segments
from elasticore.models.elastic import Elastic, routers
from elasticore.router import Routing, pool_boundary
from elasticore.router.policies import LayerShape, Policy
from elasticore.train.data import TrainingSample

__all__ = ["pooled_keys"]


class _Observer(nn.Module):
    """Keeps the pooled keys that a router would read; every head is in its retrieval mode."""

    def __init__(self, boundary: int | None) -> None:
        super().__init__()
        self.boundary = boundary
        self.seen: list[Tensor] = []

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`."""
        self.seen.append(pool_boundary(keys, segments, self.boundary))
        shape = segments.row.numel(), keys.shape[2]
        return Routing(torch.zeros(shape, dtype=torch.int8, device=keys.device))


@dataclass(frozen=True)
class _Observing(Policy):
    """An :class:`_Observer` in every layer."""

    boundary: int | None

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        return [_Observer(self.boundary) for _ in layers]


@torch.no_grad()
def pooled_keys(
    model: Any, samples: Dataset[Any], count: int, boundary: int | None
) -> list[Tensor]:
    """The pooled keys of prompts, with full attention.

    Parameters
    ----------
    model
        The backbone, not elastic.
    samples
        Training data; the first ``count`` of its samples are read.
    count
        How many, at least 2.
    boundary
        As the routers' own.

    Returns
    -------
    list of Tensor
        Per elastic layer, float32 ``[count, Hkv, D]``: what
        :meth:`AttentionRouter.calibrate <elasticore.router.AttentionRouter.calibrate>` takes.

    Raises
    ------
    ValueError
        If there are fewer samples.
    """
    check_int("count", count, 2)
    found: list[TrainingSample] = []
    for index in range(len(samples)):  # type: ignore[arg-type]
        one = samples[index]
        found += [one] if isinstance(one, TrainingSample) else one  # packed rows hold several
        if len(found) >= count:
            break
    if len(found) < count:
        raise ValueError(f"calibration wants {count} samples, but there are {len(found)}.")
    with Elastic(_Observing(boundary)).on(model, check_base=False):
        for sample in found[:count]:
            prompt = sample.input_ids[None, : sample.prompt].to(model.device)
            model.base_model(prompt, use_cache=False)
        return [torch.cat(observer.seen) for observer in routers(model)]  # type: ignore[arg-type]
