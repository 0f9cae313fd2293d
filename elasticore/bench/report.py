"""What a run leaves behind: a table for people, and JSON with everything that it was run on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from elasticore.bench.cases import Case, case_type
from elasticore.bench.run import Record

__all__ = ["Results", "read_json", "table", "write_json"]

Results = Sequence[tuple[Case, Sequence[Record]]]
"""Every case that was run, with a record per engine."""


def write_json(results: Results, about: Mapping[str, Any], path: Path) -> None:
    """Write everything: ``cases.<case>.engines.<engine>.ms`` is a median.

    Every engine of a case is there, with None for what was not measured and the reason beside it.
    """
    cases = {
        str(case): {
            "suite": case.suite,
            "parameters": case.parameters(),
            "engines": {record.engine: _entry(record) for record in records},
        }
        for case, records in results
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({**about, "cases": cases}, indent=1, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Results:
    """Read back what :func:`write_json` wrote.

    Raises
    ------
    ValueError
        If the file holds anything else.
    """
    try:
        cases = json.loads(path.read_text(encoding="utf-8"))["cases"]
        return [
            (
                case_type(one["suite"])(**one["parameters"]),
                [Record(engine, **entry) for engine, entry in one["engines"].items()],
            )
            for one in cases.values()
        ]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is no file of this version's `elasticore bench --json` "
            f"({type(error).__name__}: {error})."
        ) from error


def _entry(record: Record) -> dict[str, Any]:
    entry = dataclasses.asdict(record)
    del entry["engine"]
    return {key: _rounded(value) for key, value in entry.items()}


def _rounded(value: Any) -> Any:
    """Five digits: a time has no more."""
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    return float(f"{value:.5g}") if isinstance(value, float) else value


def table(results: Results, suite: str) -> Group:
    """The records of one suite that have a time, case by case, and why the others have none.

    Times are in milliseconds, and the most memory of a run in GiB. The last columns hold how many
    times faster an engine is than the fastest peer that did the same work, and than the fastest
    that read everything.
    """
    ours = [(case, records) for case, records in results if case.suite == suite]
    unit = ours[0][0].unit if ours else "ms"
    shown = Table(title=suite, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    shown.add_column("", no_wrap=True)
    rated = [unit] if unit != "ms" else []
    for heading in ("ms", "min", "runs", *rated, "plan", "GiB", "× peer", "× dense"):
        shown.add_column(heading, justify="right", no_wrap=True)
    reasons: dict[tuple[str, str, str], list[str]] = {}
    for case, records in ours:
        shown.add_row(f"[bold]{case}[/]")
        peers = {record.engine for record in records if record.peer}
        here = {record.engine for record in records}
        for record in records:
            if reason := record.failed or record.skipped:
                style = "red" if record.failed else "dim"
                reasons.setdefault((record.engine, reason, style), []).append(str(case))
                continue
            same = [ratio for name, ratio in record.ratios.items() if name in peers]
            dense = [ratio for name, ratio in record.ratios.items() if name not in here]
            rate = {"TFLOP/s": record.tflops, "GB/s": record.gb_s}
            cells = [record.ms, record.min_ms, record.runs, *(rate[name] for name in rated)]
            cells += [record.plan_ms, record.peak_gib]
            if not record.peer:
                cells += [min(same, default=None), min(dense, default=None)]
            texts = [_number(value) for value in cells]
            shown.add_row(f"  {record.engine}", *texts, style="dim" if record.peer else "")
    notes = []
    for (engine, reason, style), names in reasons.items():
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        notes.append(Text(f"{engine}: {reason} [{names[0]}{more}]", style))
    return Group(shown, *notes)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 or isinstance(value, int) else f"{value:.3g}"
