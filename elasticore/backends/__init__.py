"""Engines behind the attention interface: one engine, one file or folder.

The package is callable: ``elasticore.backends()`` lists the engines, so that the name serves both
the table that users ask for and the room that the engines live in.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elasticore.backends.registry import BackendTable


class _Backends(ModuleType):
    def __call__(self) -> BackendTable:
        """Every known backend: name, whether it is available, why not, lanes and devices."""
        from elasticore.backends.registry import backends

        return backends()


sys.modules[__name__].__class__ = _Backends
