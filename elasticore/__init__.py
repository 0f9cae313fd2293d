"""elasticore: decoder LLMs whose attention heads choose, per input, between full and sparse.

Everything public is importable from here; each name loads its module when it is first used, so
``import elasticore`` is quick and pulls in no engine and no model library.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "elasticore.attention": (
        "AttentionRequest",
        "HybridHeadAttention",
        "Verdict",
        "hybrid_head_attention",
        "straight_through",
    ),
    "elasticore.backends.registry": (
        "current_backend",
        "register_backend",
        "use_backend",
    ),
    "elasticore.errors": (
        "ElasticoreError",
        "UnknownBackend",
        "UnsupportedModel",
        "UnsupportedRequest",
    ),
    "elasticore.layout": ("Segments", "SequenceLayout"),
    "elasticore.models.config": ("ElasticConfig",),
    "elasticore.models.elastic": ("elasticize", "is_elastic", "restore", "routers", "routings"),
    "elasticore.models.families": ("FAMILIES", "KeyTap"),
    "elasticore.models.files": (
        "RouterMismatch",
        "RouterNotFound",
        "fingerprint",
        "load_router",
        "save_router",
    ),
    "elasticore.models.recording": ("Pass", "Trace", "record"),
    "elasticore.patterns": (
        "BlockLists",
        "BlockSelector",
        "InfLLMV2",
        "MoBA",
        "NSASelected",
        "Streaming",
        "TriangleMix",
        "XAttention",
    ),
    "elasticore.patterns.registry": ("register_selector",),
    "elasticore.plan": ("HeadMode", "HeadPlan"),
    "elasticore.router": (
        "AllRetrieval",
        "AllSparse",
        "AttentionRouter",
        "CosineTemperature",
        "ExponentialTemperature",
        "FixedPolicy",
        "GumbelSigmoid",
        "GumbelSoftmax",
        "Routing",
        "fixed_policies",
        "pool_boundary",
        "random_head_table",
    ),
    "elasticore.train.objective": ("LagrangianObjective", "SparsityPenalty"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", "backends", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name == "backends":  # the room of the engines, which is callable
        return importlib.import_module("elasticore.backends")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'elasticore' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
