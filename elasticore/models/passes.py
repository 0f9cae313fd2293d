"""One forward pass of an elastic model: what its layers share, and what a caller may tell it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elasticore.choice import current_backend
from elasticore.errors import ElasticoreError
from elasticore.models.cache import ElasticCacheLayer
from elasticore.models.layouts import PassLayout
from elasticore.models.recording import Trace, active_traces
from elasticore.plan import HeadPlan
from elasticore.router.routing import Routing

__all__ = ["PASS", "Pass", "Planned", "pass_of"]

PASS = "elastic"
"""The argument of a model's forward that holds its :class:`Pass`."""


class Pass:
    """One forward pass of an elastic model: what it is told, and what was decided in it.

    A pass makes its own; give one, as ``model(input_ids, elastic=one)``, to tell it something or to
    read the routings afterwards, with their gradients. It serves one forward.

    Parameters
    ----------
    prompt
        How many of each sequence's tokens in this pass belong to the prompt, from the first on: an
        int, or int64 ``[sequences]``. Decisions are made from these alone. None: all, but for the
        tokens that logits are asked for: ``logits_to_keep=n`` keeps the last ``n - 1`` out, which
        are drafts in assisted decoding, and the answer where one is scored.
    backend
        The backend of this pass; None for the one of :func:`elasticore.use_backend`.

    Attributes
    ----------
    routings
        What each elastic layer's policy decided, in order; empty if nothing was decided, as in a
        step of decoding.
    """

    def __init__(self, prompt: int | Tensor | None = None, *, backend: str | None = None) -> None:
        if isinstance(prompt, bool) or not isinstance(prompt, (int, Tensor, type(None))):
            raise TypeError(f"prompt must be an int, a tensor or None, got {prompt!r}.")
        self.prompt = prompt
        self.backend = backend
        self._routings: dict[int, Routing] = {}
        self._kept = 0
        self._begun = False
        # For the layers, from the start of the pass on.
        self.plans: dict[int, Planned] = {}
        self.layouts: dict[torch.device, PassLayout] = {}
        self.past: int | None = None
        self.traces: tuple[Trace, ...] = ()
        self.prompts: list[tuple[ElasticCacheLayer, HeadPlan | None, Tensor | None]] = []
        self.gradients = False
        self.started = 0.0

    @property
    def routings(self) -> list[Routing]:
        """What each elastic layer's policy decided, in order."""
        return [self._routings[index] for index in sorted(self._routings)]

    def __deepcopy__(self, memo: Any) -> Pass:
        return Pass(self.prompt, backend=self.backend)

    def begin(self, gradients: bool) -> None:
        """The base model starts."""
        if self._begun:
            raise ValueError(f"{PASS} has served a forward pass already; make a Pass for each.")
        self._begun, self.gradients = True, gradients
        self.backend = current_backend() if self.backend is None else self.backend
        self.traces = active_traces()

    def decided(self, index: int, routing: Routing) -> bool:
        """Note what a layer's policy decided; False if that is made again for a backward."""
        again = index in self._routings
        if not again:
            self._routings[index] = routing
        return not again

    def check_past(self, past: int, layer: object) -> None:
        """Raise unless all layers of a cache hold ``past`` tokens."""
        if self.past is None:
            self.past = past
        elif self.past != past:
            raise ElasticoreError(
                f"the cache holds {self.past} tokens in some layers and {past} in layer {layer}: "
                "a pass failed midway; prefill the prompt again."
            )

    def prompt_lengths(self, layout: PassLayout) -> Tensor:
        """How many of each sequence's tokens in this pass are prompt, int64 ``[S]``."""
        if isinstance(self.prompt, int):  # nothing is sent to the device, in any layer
            return layout.length.clamp(max=max(self.prompt, 0))
        if self.prompt is not None:
            prompt = self.prompt.to(layout.length.device)
            return torch.minimum(prompt.clamp(min=0), layout.length)
        if self._kept <= 1:
            return layout.length
        if layout.valid is None:
            return (layout.length - (self._kept - 1)).clamp(min=0)
        drafts = layout.valid[:, -(self._kept - 1) :].sum(1)
        return layout.length - drafts

    def prompt_columns(self, queries: int) -> int:
        """The columns that the prompt reaches into, as far as the host knows."""
        if isinstance(self.prompt, int):
            return min(max(self.prompt, 0), queries)
        return queries if self.prompt is not None else max(queries - max(self._kept - 1, 0), 0)

    def leaves_out(self, queries: int) -> bool:
        """Whether tokens of this pass may be no prompt."""
        return isinstance(self.prompt, Tensor) or self.prompt_columns(queries) < queries

    def reads_prompt(self, queries: int) -> bool:
        """Whether a pass on a filled cache goes on with a prompt: one token does not, unasked."""
        if queries == 1 and self.prompt is None:
            return False
        columns = self.prompt_columns(queries)
        return columns > 0 if self.prompt is not None else columns > 1


@dataclass(eq=False)
class Planned:
    """What a layer's routing leaves to its attention.

    Attributes
    ----------
    plan
        What its heads run.
    layout
        Where the sequences lie.
    seen
        Positions on the key axis that are filled, this pass's among them.
    layer
        Where they are, or None without a cache.
    decisions
        int8 ``[sequences, kv_heads]``.
    decided
        Whether they were made in this pass.
    mix
        The soft gate of :class:`~elasticore.router.Routing`, or None.
    recomputing
        Whether the layer runs again, for gradient checkpointing.
    answers
        Which queries are no prompt, bool ``[B, T]``, where a prompt is read in full and they are
        read as routed; else None.
    """

    plan: HeadPlan
    layout: PassLayout
    seen: int
    layer: ElasticCacheLayer | None
    decisions: Tensor
    decided: bool = False
    mix: Tensor | None = None
    recomputing: bool = False
    answers: Tensor | None = None

    def room(self) -> int:
        """Positions on the key axis, filled or not."""
        return self.seen if self.layer is None else int(self.layer.get_mask_sizes(0)[0])


def pass_of(kwargs: Mapping[str, Any]) -> Pass:
    """The pass that was given, or a new one; with the logits that are asked for."""
    one = kwargs.get(PASS)
    if one is None:
        one = Pass()
    elif not isinstance(one, Pass):
        raise TypeError(f"{PASS} must be an elasticore.Pass, got {one!r}.")
    kept = kwargs.get("logits_to_keep")
    if isinstance(kept, int):
        one._kept = kept
    return one
