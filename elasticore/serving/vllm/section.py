"""The name of what is ours in the configuration of vLLM; nothing else, so that it costs nothing."""

from __future__ import annotations

__all__ = ["SECTION"]

SECTION = "elasticore"
"""The section of vLLM's ``--additional-config``."""
