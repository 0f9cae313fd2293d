"""Policies: what decides, per layer and input, which heads are sparse.

A :class:`Policy` is a value that makes one module for every elastic layer. Such a module is called
as ``module(keys, segments)`` and returns a :class:`~elasticore.Routing`. Its attribute ``boundary``
says how many keys it wants to see at each end of a sequence: 0 for none, None (or no such
attribute) for all. A list of modules of one's own is a policy as well.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from elasticore.checks import check_int
from elasticore.errors import RouterMismatch
from elasticore.layout import Segments
from elasticore.router.router import AttentionRouter
from elasticore.router.routing import Routing
from elasticore.router.sampling import SAMPLERS

__all__ = [
    "AllRetrieval",
    "AllSparse",
    "FixedPolicy",
    "LayerShape",
    "Modules",
    "Policy",
    "Router",
    "as_policy",
]


@dataclass(frozen=True)
class LayerShape:
    """What a policy is told of a layer: its KV heads, the size of a key, and where it computes."""

    kv_heads: int
    head_dim: int
    device: torch.device


class Policy(ABC):
    """Makes the modules that decide; a frozen dataclass whose fields are its settings."""

    @abstractmethod
    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """One module per elastic layer, in order, on the layer's device.

        Raises
        ------
        RouterMismatch
            If the policy does not fit these layers.
        """

    def settings(self) -> dict[str, Any]:
        """The fields that a file holds, as plain JSON values."""
        return {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)  # type: ignore[arg-type]
            if f.init and f.metadata.get("saved", True)
        }

    def tensors(self) -> dict[str, Tensor]:
        """What a file holds beside the settings, as ``layers.INDEX.NAME``."""
        return {}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Policy:
        """The policy that :meth:`settings` and :meth:`tensors` are of.

        Raises
        ------
        TypeError, ValueError
            If they are of none.
        """
        if tensors:
            raise ValueError(f"{cls.__name__} has no tensors, got {', '.join(sorted(tensors))}")
        return cls(**settings)


@dataclass(frozen=True, eq=False)
class Router(Policy):
    """An :class:`AttentionRouter` in every layer: trained ones out of a file, or new ones.

    Parameters
    ----------
    boundary
        Tokens that a router pools at each end of a prompt; None pools all.
    hidden_multiplier
        Size of its hidden layers, in multiples of the head dimension.
    sampler
        How training samples decisions: ``"gumbel-softmax"`` or ``"gumbel-sigmoid"``.
    by
        What decides as one: ``"head"``, as in the paper, or ``"layer"``.
    weights
        A ``state_dict`` per layer; None for new routers, which are not trained.
    """

    boundary: int | None = 100
    hidden_multiplier: int = 4
    sampler: str = "gumbel-softmax"
    by: str = "head"
    weights: Sequence[Mapping[str, Tensor]] | None = field(
        default=None, repr=False, metadata={"saved": False}
    )

    def __post_init__(self) -> None:
        check_int("boundary", self.boundary, 1, optional=True)
        check_int("hidden_multiplier", self.hidden_multiplier, 1)
        if not isinstance(self.sampler, str) or self.sampler not in SAMPLERS:
            raise ValueError(f"sampler must be one of {', '.join(SAMPLERS)}, got {self.sampler!r}.")
        if self.by not in ("head", "layer"):
            raise ValueError(f"by must be 'head' or 'layer', got {self.by!r}.")

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """See :class:`Policy`."""
        weights = self.weights
        if weights is not None and len(weights) != len(layers):
            raise RouterMismatch(
                f"policy holds routers for {len(weights)} layers; model has {len(layers)} elastic "
                "ones."
            )
        made: list[nn.Module] = []
        for index, layer in enumerate(layers):
            # In float32, whatever the backbone's dtype.
            router = AttentionRouter(
                layer.head_dim,
                self.hidden_multiplier,
                self.boundary,
                SAMPLERS[self.sampler](),
                self.by,
                device=layer.device,
            )
            if weights is not None:
                if "scale" in weights[index]:  # it was calibrated
                    router.calibrate(torch.zeros(2, layer.kv_heads, layer.head_dim))
                try:
                    router.load_state_dict(dict(weights[index]))
                except RuntimeError as error:
                    raise RouterMismatch(
                        f"policy holds weights that do not fit its own settings: {error}"
                    ) from error
            made.append(router)
        return made

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`Policy`."""
        return {
            f"layers.{index}.{name}": tensor.detach()
            for index, layer in enumerate(self.weights or ())
            for name, tensor in layer.items()
        }

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Router:
        """See :class:`Policy`."""
        return cls(**settings, weights=by_layer(tensors) if tensors else None)


class _Constant(nn.Module):
    """Every head of a layer alike."""

    boundary: ClassVar[int] = 0

    def __init__(self, decision: int) -> None:
        super().__init__()
        self.decision = decision

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`."""
        shape = segments.row.numel(), keys.shape[2]
        return Routing(torch.full(shape, self.decision, dtype=torch.int8, device=keys.device))


@dataclass(frozen=True)
class AllRetrieval(Policy):
    """Every head in its retrieval way: the backbone itself, where that is full attention."""

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """See :class:`Policy`."""
        return [_Constant(0) for _ in layers]


@dataclass(frozen=True)
class AllSparse(Policy):
    """Every head in its sparse way, as training-free methods run."""

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """See :class:`Policy`."""
        return [_Constant(1) for _ in layers]


@dataclass(frozen=True, eq=False)
class Modules(Policy):
    """Modules of one's own, one per elastic layer; what a plain list of them means."""

    own: Sequence[nn.Module]

    def __post_init__(self) -> None:
        for module in self.own:
            if not isinstance(module, nn.Module):
                raise TypeError(
                    "policy must be a Policy such as Router() or AllSparse(), or a list of "
                    f"nn.Modules, one per layer; got {module!r} in it."
                )
        seen: dict[int, int] = {}
        for index, module in enumerate(self.own):
            first = seen.setdefault(id(module), index)
            if first != index and module.state_dict():
                raise ValueError(
                    f"policy has one {type(module).__name__} for the layers {first} and {index}, "
                    "which could not be saved; give each layer its own (copy.deepcopy), or the "
                    "whole table as HeadTable(...)."
                )

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """See :class:`Policy`."""
        if len(self.own) != len(layers):
            raise RouterMismatch(
                f"policy must hold one module per elastic layer ({len(layers)}), got "
                f"{len(self.own)}."
            )
        return [module.to(layer.device) for module, layer in zip(self.own, layers, strict=True)]

    def settings(self) -> dict[str, Any]:
        """The modules' types; they cannot be made from these again."""
        return {"own": [type(module).__name__ for module in self.own]}

    def tensors(self) -> dict[str, Tensor]:
        """Raise, as modules of one's own cannot be saved."""
        kinds = ", ".join(sorted({type(module).__name__ for module in self.own}))
        raise ValueError(
            f"policy runs modules of its own ({kinds}), which no file can hold; save routers or a "
            "HeadTable."
        )


class FixedPolicy(nn.Module):
    """One layer of a head table: the same decisions for every sequence.

    Parameters
    ----------
    decisions
        Bool or integer tensor (or nested sequence) ``[kv_heads]``: 0 = retrieval, 1 = sparse. Kept
        as an int8 buffer of the ``state_dict``.

    Raises
    ------
    TypeError, ValueError
        On another dtype, shape or value.
    """

    boundary: ClassVar[int] = 0
    decisions: Tensor

    def __init__(self, decisions: Tensor | Sequence[int]) -> None:
        super().__init__()
        self.register_buffer("decisions", integers("decisions", decisions, 1))

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`.

        Raises
        ------
        ValueError
            If the keys have another number of KV heads than the table.
        """
        if keys.shape[2] != self.decisions.numel():
            raise ValueError(
                f"keys have {keys.shape[2]} KV heads but decisions are for "
                f"{self.decisions.numel()}; give one entry per KV head, not per query head."
            )
        decisions = self.decisions.to(keys.device)
        return Routing(decisions.expand(segments.row.numel(), -1))


def as_policy(policy: object) -> Policy:
    """``policy``, or the :class:`Modules` of a list of them.

    Raises
    ------
    TypeError
        If it is neither.
    """
    if isinstance(policy, Policy):
        return policy
    if isinstance(policy, (list, tuple, nn.ModuleList)):
        return Modules(list(policy))
    raise TypeError(
        "policy must be a Policy such as Router() or AllSparse(), or a list of nn.Modules, one per "
        f"layer; got {policy!r}."
    )


def by_layer(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """``layers.INDEX.NAME`` as a list of ``{NAME: tensor}``; raises ``ValueError`` on others."""
    layers: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        kind, _, rest = name.partition(".")
        index, _, own = rest.partition(".")
        if kind != "layers" or not index.isdecimal() or not own:
            raise ValueError(f"unexpected tensor {name!r}")
        layers.setdefault(int(index), {})[own] = tensor
    if sorted(layers) != list(range(len(layers))):
        raise ValueError(f"tensors of the layers {sorted(layers)}, where some are missing")
    return [layers[index] for index in range(len(layers))]


def integers(name: str, value: object, ndim: int) -> Tensor:
    """``value`` as an int8 copy with ``ndim`` axes and values 0 and 1."""
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be a tensor or a sequence of ints, got {value!r}.") from None
    if tensor.is_floating_point() or tensor.is_complex():
        raise TypeError(f"{name} must be bool or integer, got {tensor.dtype}; threshold it first.")
    if tensor.ndim != ndim or tensor.numel() == 0:
        wanted = "[kv_heads]" if ndim == 1 else "[layers, kv_heads]"
        raise ValueError(f"{name} must be {wanted}, got shape {list(tensor.shape)}.")
    if int(tensor.min()) < 0 or int(tensor.max()) > 1:
        raise ValueError(f"{name} must hold values from 0 to 1, got {tensor.tolist()}.")
    return tensor.to(torch.int8, copy=True)
