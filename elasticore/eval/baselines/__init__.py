"""Sparse methods that fit none of the three lanes: plain PyTorch, to compare with, not fast."""

from elasticore.eval.baselines.attach import Call, attend_with
from elasticore.eval.baselines.nsa import NativeSparseAttention, load_nsa
from elasticore.eval.baselines.per_query import PerQuery

__all__ = ["Call", "NativeSparseAttention", "PerQuery", "attend_with", "load_nsa"]
