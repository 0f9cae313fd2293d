"""Speed as the library's benchmarks have measured it, for the report: it is not measured again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["FILES", "measured_speed"]

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results"
FILES = {
    "attention": "bench-attention.json",
    "router": "bench-router.json",
    "e2e": "bench-e2e.json",
}
"""Family of cases, and the file that holds them."""


def measured_speed(folder: Path = RESULTS) -> dict[str, Any]:
    """Median milliseconds per length, share of sparse heads and engine; None without a file."""
    return {family: _read(folder / name, family) for family, name in FILES.items()}


def _read(file: Path, family: str) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    content = json.loads(file.read_text(encoding="utf-8"))
    rows = []
    for case in content["cases"].values():
        sizes = case["parameters"]
        if sizes.get("family", case["suite"]) != family or sizes.get("batch", 1) != 1:
            continue
        ms = {name: one["ms"] for name, one in case["engines"].items() if one["ms"] is not None}
        rows.append({"length": sizes["length"], "share": sizes.get("share"), "ms": ms})
    about = {key: content.get(key) for key in ("gpu", "date", "command")}
    return {"file": file.name, **about, "rows": rows}
