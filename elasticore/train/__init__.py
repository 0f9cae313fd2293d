"""Training routers: the objective, and what runs it. Each name loads its module on first use."""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "BASELINES": "elasticore.train.baselines",
    "Collator": "elasticore.train.data",
    "DuoAttention": "elasticore.train.baselines",
    "DuoTrainer": "elasticore.train.baselines",
    "JsonLines": "elasticore.train.jsonl",
    "LagrangianObjective": "elasticore.train.objective",
    "OfflineTasks": "elasticore.train.data",
    "PackedSamples": "elasticore.train.data",
    "PruLong": "elasticore.train.baselines",
    "PruLongTrainer": "elasticore.train.baselines",
    "Recipe": "elasticore.train.recipe",
    "RouterTrainer": "elasticore.train.trainer",
    "SparsityPenalty": "elasticore.train.objective",
    "TrainingSample": "elasticore.train.data",
    "blocked_cross_entropy": "elasticore.train.loss",
    "checkpoint_layers": "elasticore.train.checkpointing",
    "train": "elasticore.train.run",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'elasticore.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
