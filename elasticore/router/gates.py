"""Static gates with something to learn: DuoAttention's and PruLong's, one module per layer.

A gate ``z`` from 0 to 1 belongs to a KV head, whatever the input. While it is trained, the head
runs both modes and gives ``z · O_retrieval + (1 - z) · O_sparse``. Afterwards the heads with the
largest gates keep the retrieval mode: :meth:`HeadTable.of_scores` makes a policy of them.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn

from elasticore.checks import check_int, check_number
from elasticore.layout import Segments
from elasticore.router.routing import Routing

__all__ = [
    "DuoGate",
    "HardConcreteGate",
    "StaticGate",
    "head_scores",
    "retrieval_only",
]


class StaticGate(nn.Module):
    """One trainable gate per KV head of a layer, called like a router.

    Attributes
    ----------
    threshold
        Heads that score below it are sparse, until :meth:`HeadTable.of_scores` has decided.
    retrieval_only
        Whether every head runs its retrieval mode for now; see :func:`retrieval_only`.
    """

    threshold: ClassVar[float]
    boundary: ClassVar[int] = 0

    def __init__(self) -> None:
        super().__init__()
        self.retrieval_only = False

    @abstractmethod
    def sample(self) -> Tensor:
        """z as training uses it: float32 ``[kv_heads]``, from 0 (sparse) to 1 (retrieval)."""

    @abstractmethod
    def scores(self) -> Tensor:
        """What heads are ranked by, larger for retrieval: float32 ``[kv_heads]``, no gradient."""

    def forward(self, keys: Tensor, segments: Segments) -> Routing:
        """Decide as :meth:`AttentionRouter.forward <elasticore.router.AttentionRouter.forward>`.

        In training mode the routing holds a ``mix``.

        Raises
        ------
        ValueError
            If the keys have another number of KV heads than there are gates.
        """
        scores = self.scores()
        if keys.shape[2] != scores.numel():
            raise ValueError(
                f"keys have {keys.shape[2]} KV heads but there are gates for {scores.numel()}; "
                "make one gate per KV head, not per query head."
            )
        sparse = (scores < self.threshold) & (not self.retrieval_only)
        decisions = sparse.to(torch.int8).expand(segments.row.numel(), -1)
        mixing = self.training and not self.retrieval_only
        return Routing(decisions, mix=1 - self.sample() if mixing else None)


class DuoGate(StaticGate):
    """DuoAttention's gate α of each head, the weight of full attention.

    Parameters
    ----------
    kv_heads
        How many.
    initial
        α at the start.

    Notes
    -----
    DuoAttention (arXiv 2410.10819), Section 2: the output of a head in training is
    ``α · full + (1 - α) · streaming``. α is kept in [0, 1] by :meth:`clamp`.
    """

    threshold = 0.5

    def __init__(self, kv_heads: int, initial: float = 1.0) -> None:
        super().__init__()
        check_int("kv_heads", kv_heads, 1)
        check_number("initial", initial, 0, 1)
        self.alpha = nn.Parameter(torch.full((kv_heads,), float(initial)))

    def sample(self) -> Tensor:
        """α itself: nothing is random."""
        return self.alpha

    def scores(self) -> Tensor:
        """α, within [0, 1]."""
        return self.alpha.detach().clamp(0, 1)

    @torch.no_grad()
    def clamp(self) -> None:
        """Put α back into [0, 1], as after every optimizer step."""
        self.alpha.clamp_(0, 1)


class HardConcreteGate(StaticGate):
    """PruLong's gate of each head: a hard-concrete variable, 0 or 1 with a probability each.

    With ``u`` uniform in (0, 1): ``s = sigmoid((log(u / (1 - u)) + log α) / T)``, stretched to
    (γ, ζ) and cut to [0, 1]: ``z = min(1, max(0, s (ζ - γ) + γ))``.

    Parameters
    ----------
    kv_heads
        How many.
    initial
        log α at the start.

    Notes
    -----
    Louizos et al. (arXiv 1712.01312), Section 2.2, with T = 2/3, γ = -0.1 and ζ = 1.1, as PruLong
    (arXiv 2506.17121) uses it. One z serves all sequences of a forward pass.
    """

    threshold = 0.0  # an odds ratio of one
    temperature = 2 / 3
    low, high = -0.1, 1.1

    def __init__(self, kv_heads: int, initial: float = 4.0) -> None:
        super().__init__()
        check_int("kv_heads", kv_heads, 1)
        check_number("initial", initial)
        self.log_alpha = nn.Parameter(torch.full((kv_heads,), float(initial)))

    def sample(self) -> Tensor:
        """One draw from PyTorch's global generator, which gradient checkpointing replays."""
        # Neither 0 nor 1, whose logits are infinite.
        uniform = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((torch.logit(uniform) + self.log_alpha) / self.temperature)
        return (s * (self.high - self.low) + self.low).clamp(0, 1)

    def scores(self) -> Tensor:
        """log α, which does not saturate as a probability would."""
        return self.log_alpha.detach()


@contextmanager
def retrieval_only(gates: Iterable[nn.Module]) -> Iterator[None]:
    """Run every head of these gates in its retrieval mode inside the ``with`` block."""
    own = [gate for gate in gates if isinstance(gate, StaticGate)]
    for gate in own:
        gate.retrieval_only = True
    try:
        yield
    finally:
        for gate in own:
            gate.retrieval_only = False


def head_scores(gates: Iterable[nn.Module]) -> Tensor:
    """Scores of all layers: float32 ``[layers, kv_heads]`` on the CPU.

    Raises
    ------
    TypeError
        If one of them is no :class:`StaticGate`.
    """
    rows = []
    for gate in gates:
        if not isinstance(gate, StaticGate):
            raise TypeError(f"gates must be StaticGates, got {type(gate).__name__}.")
        rows.append(gate.scores().float().cpu())
    return torch.stack(rows)
