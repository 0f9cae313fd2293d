"""Backends that are no use but to see which one ran."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from elasticore import (
    AttentionRequest,
    HeadMode,
    HeadPlan,
    HybridHeadAttention,
    Verdict,
    hybrid_head_attention,
)

__all__ = ["Absent", "Ones", "call"]


class Ones(HybridHeadAttention):
    """A backend whose every output is one, to see that it ran."""

    name = "ones"
    lanes = frozenset({HeadMode.FULL})
    devices = ("cpu",)

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(True)

    def supports(self, request: AttentionRequest) -> Verdict:
        return Verdict(request.head_dim == 16, "head_dim must be 16.")

    def attend(self, q: Tensor, k: Tensor, v: Tensor, plan: HeadPlan, **_: Any) -> Tensor:
        return torch.ones_like(q)


class Absent(Ones):
    """A backend whose engine is not installed."""

    @classmethod
    def available(cls) -> Verdict:
        return Verdict(False, "package 'absent' is not installed; pip install absent.")


def call(backend: str | None = None, dim: int = 16) -> Tensor:
    q = torch.zeros(1, 2, 4, dim)
    plan = HeadPlan(torch.zeros(1, 2, dtype=torch.int8))
    return hybrid_head_attention(q, q, q, plan, backend=backend)
