"""What an elastic model and its attention modules know of themselves, and by which names."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import nn

from elasticore.models.families import Family

if TYPE_CHECKING:
    from elasticore.models.elastic import Elastic
    from elasticore.models.parallel import SequenceParallel

__all__ = ["IMPLEMENTATION", "PARALLEL", "ROUTER", "STATE", "LayerState", "ModelState"]

IMPLEMENTATION = "elasticore"
"""What elastic layers are called among transformers' attention implementations."""
STATE = "_elasticore"
"""Attribute that holds the state of an elastic model, and of its attention modules."""
PARALLEL = "_elasticore_parallel"
"""Attribute of a base model whose passes see a slice of the tokens each."""
ROUTER = "attention_router"
"""Submodule of an attention module that routes its heads."""


@dataclass(eq=False)
class ModelState:
    """That a model is elastic, and how to undo it.

    Attributes
    ----------
    way
        How it attends.
    original
        The model's own config object, which :func:`elasticore.restore` puts back.
    reconfigured
        Modules whose ``config`` was replaced.
    snapshot
        The elastic config as it was made, to notice what a user changes in it.
    handles
        Hooks to remove.
    layers
        The elastic attention modules, in order.
    local_layers
        How many layers the model keeps inside a window of its own.
    """

    way: Elastic
    original: Any
    reconfigured: list[nn.Module] = field(default_factory=list)
    snapshot: dict[str, Any] = field(default_factory=dict)
    handles: list[Any] = field(default_factory=list)
    layers: list[nn.Module] = field(default_factory=list)
    local_layers: int = 0


@dataclass(eq=False)
class LayerState:
    """What an elastic attention module knows of its place.

    Attributes
    ----------
    index, local_layers
        Its number among the elastic layers, and how many layers are none.
    way
        How the model attends.
    family
        How the module makes its keys.
    owner
        Digest of the model and its way: whose cache it may read.
    parallel
        The processes that hold a batch together with this one, or None.
    """

    index: int
    local_layers: int
    way: Elastic
    family: Family
    owner: str
    parallel: SequenceParallel | None = None
