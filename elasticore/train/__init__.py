"""Training routers: the objective, and what runs it. Each name loads its module on first use."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from elasticore.train.objective import LagrangianObjective, SparsityPenalty

_MODULE_OF = {
    "LagrangianObjective": "elasticore.train.objective",
    "SparsityPenalty": "elasticore.train.objective",
}

__all__ = ["LagrangianObjective", "SparsityPenalty"]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'elasticore.train' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
