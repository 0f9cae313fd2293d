"""elasticore: decoder LLMs whose attention heads choose, per input, between full and sparse.

Everything public is importable from here; each name loads its module when it is first used, so
``import elasticore`` is quick and pulls in no engine and no model library.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_EXPORTS = {
    "elasticore.assets": ("fetch",),
    "elasticore.attention": (
        "AttentionRequest",
        "HybridHeadAttention",
        "Verdict",
        "straight_through",
    ),
    "elasticore.backends.registry": ("list_backends", "register_backend"),
    "elasticore.call": ("hybrid_head_attention", "paged_attention"),
    "elasticore.choice": ("current_backend", "use_backend"),
    "elasticore.errors": (
        "ElasticoreError",
        "OutdatedPackage",
        "RouterMismatch",
        "RouterNotFound",
        "UnknownBackend",
        "UnsupportedModel",
        "UnsupportedRequest",
    ),
    "elasticore.layout": ("Segments", "SequenceLayout"),
    "elasticore.models.ahead": ("generate",),
    "elasticore.models.passes": ("Pass",),
    "elasticore.models.elastic": (
        "Elastic",
        "elasticize",
        "is_elastic",
        "restore",
        "routers",
        "way_of",
    ),
    "elasticore.models.families": ("FAMILIES", "Family"),
    "elasticore.models.fingerprint": ("fingerprint",),
    "elasticore.models.recording": ("PassRecord", "Trace", "record"),
    "elasticore.pages": ("Pages",),
    "elasticore.patterns": (
        "BlockLists",
        "BlockSelector",
        "Full",
        "HeadMode",
        "InfLLMV2",
        "MoBA",
        "NSASelected",
        "Pattern",
        "Streaming",
        "TriangleMix",
        "XAttention",
    ),
    "elasticore.patterns.registry": (
        "pattern_from_dict",
        "pattern_to_dict",
        "register_pattern",
    ),
    "elasticore.plan": ("HeadPlan",),
    "elasticore.router": (
        "AllRetrieval",
        "AllSparse",
        "AttentionRouter",
        "CosineTemperature",
        "ExponentialTemperature",
        "GumbelSigmoid",
        "GumbelSoftmax",
        "HeadTable",
        "LayerShape",
        "Policy",
        "Router",
        "Routing",
        "pool_boundary",
        "register_policy",
    ),
    "elasticore.train.objective": ("LagrangianObjective", "SparsityPenalty"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *_MODULE_OF]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'elasticore' has no attribute {name!r}")
    if name not in _EXPORTS["elasticore.errors"]:
        from elasticore.requirements import check_packages

        check_packages("torch")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
