"""Sampling hard decisions from logits, with a gradient (Section 3.2, Appendix F)."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from elasticore.router.noise import sample_gumbel

__all__ = ["SAMPLERS", "GumbelSigmoid", "GumbelSoftmax", "Sampler"]


class Sampler(Protocol):
    """Draws a gate from a router's logits while it trains."""

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """Sample a gate.

        Parameters
        ----------
        logits
            float32 ``[..., 2]``; column 0 is retrieval, column 1 sparse.
        temperature
            τ > 0. It shapes the gradient only: the decision does not depend on it.

        Returns
        -------
        Tensor
            float32 ``[...]``, exactly 0.0 (retrieval) or 1.0 (sparse), with the gradient of the
            soft sample behind it.
        """


@dataclass(frozen=True)
class GumbelSoftmax:
    """Gumbel-softmax with a straight-through gradient (Eqs. 6 and 7; Jang et al., 2016).

    One Gumbel per logit; the soft sample is ``softmax((logits + g) / τ)`` and the decision its
    argmax, so sparse is drawn with exactly its softmax probability, whatever τ.

    Parameters
    ----------
    eps
        ε of Eq. 12.
    generator
        The source of the noise; None for PyTorch's global generator. One of its own needs
        :func:`~elasticore.router.checkpoint_contexts` under gradient checkpointing.
    """

    eps: float = 1e-10
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """Sample a gate; see :class:`Sampler`."""
        noisy = logits + sample_gumbel(logits, self.eps, self.generator)
        # A softmax over two is the sigmoid of their difference.
        return _straight_through(noisy[..., 1] - noisy[..., 0], temperature)


@dataclass(frozen=True)
class GumbelSigmoid:
    """Gumbel-sigmoid with a straight-through gradient (Eqs. 12 and 13, as printed).

    The soft sample is ``sigmoid((z + g) / τ)`` with one Gumbel g and the logit
    ``z = logits[..., 1] - logits[..., 0]``, which is positive where sparse is preferred.

    Parameters
    ----------
    eps
        ε of Eq. 12.
    generator
        The source of the noise; see :class:`GumbelSoftmax`.

    Notes
    -----
    Eq. 13 adds one Gumbel, where Gumbel-softmax has the difference of two. A Gumbel's mean is
    +0.577, so this sampler leans towards 1 (sparse): it draws sparse with probability
    ``1 - exp(-exp(z))``, which is 0.632 at z = 0 and not 0.5.
    """

    eps: float = 1e-10
    generator: torch.Generator | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_eps(self.eps)

    def __call__(self, logits: Tensor, temperature: float) -> Tensor:
        """Sample a gate; see :class:`Sampler`."""
        z = logits[..., 1] - logits[..., 0]
        return _straight_through(z + sample_gumbel(z, self.eps, self.generator), temperature)


def _straight_through(margin: Tensor, temperature: float) -> Tensor:
    """``margin >= 0`` as 0.0 or 1.0, with the gradient of ``sigmoid(margin / temperature)``."""
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be finite and above 0, got {temperature!r}.")
    soft = torch.sigmoid(margin / temperature)
    hard = (margin >= 0).to(soft.dtype)
    # Eq. 7's brackets matter: the difference is exactly 0, so the gate is exactly 0 or 1;
    # hard + soft - soft would round.
    return hard + (soft - soft.detach())


def _check_eps(eps: float) -> None:
    if isinstance(eps, bool) or not isinstance(eps, float):
        raise TypeError(f"eps must be a float, got {eps!r}.")
    smallest = torch.finfo(torch.float32).tiny
    if not smallest <= eps < 1e-2:
        raise ValueError(f"eps must be from {smallest:.3g} to below 0.01, got {eps!r}.")


SAMPLERS: dict[str, type[Sampler]] = {
    "gumbel-softmax": GumbelSoftmax,
    "gumbel-sigmoid": GumbelSigmoid,
}
"""By the name that settings have for them."""
