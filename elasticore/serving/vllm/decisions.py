"""What was decided for the requests that run, and how it is decided."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.models.elastic import Elastic
from elasticore.serving.vllm.backbone import Backbone
from elasticore.serving.vllm.step import Step

__all__ = ["Decisions"]


class Decisions:
    """The routers of a model, and by page what they decided.

    A decision is kept for the page in which a request's prompt ends (:attr:`Step.page`), and
    written whenever a prompt ends in it; so nothing of another request is ever read.

    Parameters
    ----------
    way
        How the model attends.
    backbone
        Its layers.
    layers
        The numbers of those that this is about.

    Attributes
    ----------
    layers
        The same, in order.
    """

    def __init__(self, way: Elastic, backbone: Backbone, layers: Collection[int]) -> None:
        self.backbone = backbone
        modules = dict(zip(backbone.elastic, way.policy.modules(backbone.shapes), strict=True))
        self._shape = dict(zip(backbone.elastic, backbone.shapes, strict=True))
        self.layers = tuple(sorted(layers))
        self._routers = {layer: modules[layer].eval() for layer in self.layers}
        self._boundary = getattr(modules[min(layers)], "boundary", None)
        self._sparse: dict[int, Tensor] = {}  # int8 [pages, Hkv], or [1, Hkv] for all

    @torch.no_grad()
    def decide(
        self, layer: int, step: Step, read: Callable[[int, Tensor], Tensor], pages: int
    ) -> None:
        """Decide for the prompts that end in a step.

        Parameters
        ----------
        layer
            The layer's number.
        read
            ``(row, positions [n]) -> rotated keys [n, Hkv, D]``.
        pages
            How many pages there are.
        """
        shape = self._shape[layer]
        if self._boundary == 0:  # the prompt does not matter
            if layer not in self._sparse:
                nothing = torch.empty(0, shape.kv_heads, shape.head_dim)
                self._sparse[layer] = self._route(layer, nothing, [0])
            return
        if layer not in self._sparse:
            self._sparse[layer] = torch.zeros(pages, shape.kv_heads, dtype=torch.int8)
        if not step.ended:
            return
        positions = [_ends(step.lengths[row], self._boundary) for row in step.ended]
        keys = [
            self.backbone.before_rotation(layer, read(row, position), position)
            for row, position in zip(step.ended, positions, strict=True)
        ]
        decided = self._route(layer, torch.cat(keys), [len(position) for position in positions])
        self._sparse[layer][step.page[list(step.ended)]] = decided

    def _route(self, layer: int, keys: Tensor, counts: list[int]) -> Tensor:
        """Decisions int8 ``[n, Hkv]`` from the keys ``[tokens, Hkv, D]`` of ``n`` sequences."""
        count = torch.tensor(counts)
        start = count.cumsum(0) - count
        row = torch.zeros_like(count)
        segments = Segments(row, start, count, start, count)
        return self._routers[layer](keys[None], segments).decisions

    def of(self, layer: int, page: Tensor) -> Tensor:
        """Decisions int8 ``[n, Hkv]`` of the requests whose prompts end in these pages."""
        known = self._sparse[layer]
        return known.expand(len(page), -1) if self._boundary == 0 else known[page]

    def share(self, page: Tensor) -> Tensor:
        """Ω_MSR, float ``[n]``, of these requests, over the layers."""
        every = [self.of(layer, page) for layer in self.layers]
        return torch.stack(every).float().mean((0, 2))


def _ends(length: int, boundary: int | None) -> Tensor:
    """The positions that a router reads of a prompt: its first and last ``boundary`` tokens."""
    if boundary is None or length <= 2 * boundary:
        return torch.arange(length)
    return torch.cat((torch.arange(boundary), torch.arange(length - boundary, length)))
