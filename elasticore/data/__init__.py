"""Training data, from sources to packed parquet. Each name loads its module on first use."""

from __future__ import annotations

import importlib
from typing import Any

_MODULE_OF = {
    "Encoder": "elasticore.data.encoding",
    "Example": "elasticore.data.sources",
    "PackedParquet": "elasticore.data.parquet",
    "Packer": "elasticore.data.packing",
    "SOURCES": "elasticore.data.sources",
    "Source": "elasticore.data.sources",
    "Span": "elasticore.data.sequence",
    "TASKS": "elasticore.data.sources",
    "TokenSequence": "elasticore.data.sequence",
    "build": "elasticore.data.building",
    "show": "elasticore.data.card",
}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'elasticore.data' has no attribute {name!r}")
    return getattr(importlib.import_module(_MODULE_OF[name]), name)
