"""The benchmarks' prompt formats; they, and where they come from, are in `prompts.json`."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files

__all__ = ["prompts"]


@cache
def prompts(benchmark: str) -> dict[str, str]:
    """The prompt formats of "longbench-e" by task, or of "longbench-v2" by setting."""
    text = (files(__package__) / "prompts.json").read_text(encoding="utf-8")
    found: dict[str, str] = json.loads(text)[benchmark]["prompts"]
    return found
