"""What a router, or a static policy, decided for the heads of one layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Routing", "model_msr"]


@dataclass(frozen=True, eq=False)
class Routing:
    """The decision of every KV head of one layer, for every sequence.

    Attributes
    ----------
    decisions
        int8 ``[sequences, kv_heads]``: 0 = retrieval, 1 = sparse.
    logits
        float32 ``[sequences, kv_heads, 2]``; column 0 is retrieval, column 1 sparse. None from a
        policy without logits.
    gate
        float32 ``[sequences, kv_heads]``, exactly 0.0 or 1.0 and equal to ``decisions``, with the
        straight-through gradient behind it; None when nothing is sampled (inference, static
        policies), which lets a backend compute the chosen mode only.
    mix
        float32 ``[kv_heads]`` from 0 to 1, differentiable: how much of the sparse mode's output
        each head takes, the rest being the retrieval mode's. For the training of static gates
        (:class:`StaticGate`), which are the same for every sequence; None otherwise. ``decisions``
        then say what the gates would choose.

    Raises
    ------
    TypeError, ValueError
        If a dtype or a shape is not as above.
    """

    decisions: Tensor
    logits: Tensor | None = None
    gate: Tensor | None = None
    mix: Tensor | None = None

    def __post_init__(self) -> None:
        shape = list(self.decisions.shape)
        if self.decisions.dtype != torch.int8:
            raise TypeError(f"decisions must be int8, got {self.decisions.dtype}.")
        if len(shape) != 2:
            raise ValueError(f"decisions must be [sequences, kv_heads], got shape {shape}.")
        for name, value, wanted in (
            ("logits", self.logits, [*shape, 2]),
            ("gate", self.gate, shape),
            ("mix", self.mix, shape[1:]),
        ):
            if value is None:
                continue
            if value.dtype != torch.float32:
                raise TypeError(f"{name} must be float32, got {value.dtype}.")
            if list(value.shape) != wanted:
                raise ValueError(
                    f"{name} must have shape {wanted} beside decisions {shape}, got "
                    f"{list(value.shape)}."
                )

    def msr(self) -> Tensor:
        """Ω_MSR (Eq. 4) of this layer: each sequence's share of sparse KV heads.

        Returns
        -------
        Tensor
            float32 ``[sequences]``, differentiable where there is a gate or a mix.
        """
        return model_msr([self])

    def sparse(self) -> Tensor:
        """How sparse each head is: float32 ``[sequences, kv_heads]``, 0 or 1 without a mix."""
        if self.mix is not None:
            return self.mix.expand(self.decisions.shape)
        return self.decisions.float() if self.gate is None else self.gate


def model_msr(routings: Sequence[Routing]) -> Tensor:
    """Ω_MSR (Eq. 4) of a model: each sequence's share of sparse heads over all layers.

    Parameters
    ----------
    routings
        One per layer, of the same sequences; every KV head counts the same, also when layers have
        different numbers of heads.

    Returns
    -------
    Tensor
        float32 ``[sequences]``, differentiable through every gate and mix.

    Raises
    ------
    ValueError
        If there are no routings.
    """
    if not routings:
        raise ValueError("routings must hold the Routing of at least one layer, got none.")
    return torch.cat([routing.sparse() for routing in routings], 1).mean(1)
