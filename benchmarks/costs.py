"""What ``auto`` knows of the backends' speed: from benchmark results to ``costs.json``.

python benchmarks/costs.py
python benchmarks/costs.py --check

The first reads what ``elasticore bench --suite attention`` and ``--suite decode`` wrote. An engine
enters at a length where it was measured at every share of sparse heads that any backend was: a
figure is the mean over them, as ``auto`` cannot know the share, and includes what the engine does
once per routing. Files of other GPUs can be named; a capability that none of the files is about
keeps its figures.

The second lists what ``auto`` would run in every prefill case, beside the fastest dense SDPA, and
ends with exit code 1 if it is more than 2 % slower anywhere.
"""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from collections import defaultdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table

from elasticore.backends.costs import HEADS, KV_HEADS
from elasticore.backends.registry import BACKENDS
from elasticore.bench.attention import PREPARING
from elasticore.choice import fastest

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
TABLE = HERE.parent / "elasticore" / "backends" / "costs.json"
SOURCES = [RESULTS / "bench-attention.json", RESULTS / "bench-decode.json"]
ALLOWED = 1.02
CAPABILITIES = {"NVIDIA H200": "9.0"}
"""Of GPUs in files that do not say it."""

Kinds = dict[str, dict[str, dict[str, float]]]
"""Milliseconds by kind of call, engine and tokens."""


def main(
    sources: Annotated[list[Path] | None, typer.Argument(help="JSON files of the bench.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Compare auto with dense SDPA.")] = False,
) -> None:
    """Write elasticore/backends/costs.json."""
    files = {path: json.loads(path.read_text("utf-8")) for path in sources or SOURCES}
    if check:
        raise typer.Exit(int(not all([never_slower(path.name, f) for path, f in files.items()])))
    old = json.loads(TABLE.read_text("utf-8")) if TABLE.is_file() else {"milliseconds": {}}
    found: dict[str, Kinds] = defaultdict(dict)
    measured = []
    for path, file in files.items():
        found[capability(file)] |= kinds(file["cases"])
        facts = {key: file[key] for key in ("gpu", "date", "commit")}
        measured.append({"file": path.name, **facts})
    table = {
        "what": "mean over the shares of sparse heads, in milliseconds, by compute capability, "
        f"kind of call, backend and tokens; one sequence, {HEADS} query and {KV_HEADS} KV heads",
        "command": shlex.join(["python", "benchmarks/costs.py", *sys.argv[1:]]),
        "measured": measured,
        "milliseconds": {**old["milliseconds"], **found},
    }
    TABLE.write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def capability(file: dict[str, Any]) -> str:
    """The compute capability of the GPU that a file is about."""
    known = file.get("capability") or CAPABILITIES.get(file["gpu"])
    if known is None:
        raise typer.BadParameter(f"the capability of {file['gpu']!r} is in no file; run it again.")
    return known


def kind(parameters: dict[str, Any], suite: str) -> str:
    """The name that ``elasticore.backends.costs.kind`` gives to calls like a case's."""
    name = {"STREAMING": "prefill", "SELECTED": "selected"}[parameters["sparse"]]
    return f"{'decode' if suite == 'decode' else name}-d{parameters['head_dim']}"


def kinds(cases: dict[str, Any]) -> Kinds:
    """The mean over the shares of every backend that was measured at them all."""
    times: dict[tuple[str, int], dict[str, dict[float, float]]] = defaultdict(
        lambda: defaultdict(dict)
    )
    for case in cases.values():
        parameters = case["parameters"]
        shape = parameters["heads"], parameters["kv_heads"], parameters["block_size"]
        decoding = case["suite"] == "decode"
        if shape != (HEADS, KV_HEADS, 128) or parameters["share"] is None:
            continue
        if parameters["batch"] > 1 and not decoding:
            continue
        tokens = parameters["length"] * parameters["batch"]  # only decoding has batches here
        for name, engine in case["engines"].items():
            if name not in BACKENDS.built_in or not engine["ms"]:
                continue
            # Every layer of a model has a routing of its own, so the time to prepare for it counts.
            prepares = name in PREPARING and parameters["sparse"] == "STREAMING" and not decoding
            if prepares and engine["plan_ms"] is None:
                continue
            ms = engine["ms"] + (engine["plan_ms"] or 0)
            place = kind(parameters, case["suite"]), tokens
            times[place][name][parameters["share"]] = ms
    table: Kinds = defaultdict(lambda: defaultdict(dict))
    for (name, tokens), engines in sorted(times.items()):
        every = set().union(*engines.values())
        for engine, shares in engines.items():
            if set(shares) == every:
                mean = statistics.mean(shares.values())
                table[name][engine][str(tokens)] = float(f"{mean:.4g}")
    return table


def never_slower(name: str, file: dict[str, Any]) -> bool:
    """Show auto's engine beside dense SDPA in every prefill case; whether it keeps up in all."""
    shown = Table(title=f"{name}, {file['gpu']}", title_justify="left", box=box.SIMPLE_HEAD)
    for heading in ("case", "auto", "ms", "dense SDPA", "ms", "auto / dense"):
        number = heading in ("ms", "auto / dense")
        shown.add_column(heading, justify="right" if number else "left", no_wrap=True)
    cases = file["cases"]
    means = kinds(cases)
    worst = 0.0
    for case, entry in cases.items():
        parameters = entry["parameters"]
        if entry["suite"] != "attention" or parameters["share"] is None:
            continue
        # With a selector, the case that reads everything is that of the other family.
        dense = cases.get(case.rpartition("-")[0].replace("-xa-", "-") + "-0")
        peers = {
            engine: one["ms"]
            for engine, one in (dense or entry)["engines"].items()
            if engine.startswith("sdpa-") and one["ms"]
        }
        mean = means.get(kind(parameters, entry["suite"]), {})
        here = {
            engine: mean.get(engine, {}).get(str(parameters["length"]))
            for engine in BACKENDS.built_in
            if entry["engines"].get(engine, {}).get("ms")
        }
        if not here or not peers:
            continue
        best, peer = fastest(here), min(peers, key=peers.__getitem__)
        ms = entry["engines"][best]["ms"]
        ratio = ms / peers[peer]
        worst = max(worst, ratio)
        style = "red" if ratio > ALLOWED else ""
        cells = f"{ms:.4g}", peer, f"{peers[peer]:.4g}", f"{ratio:.3f}"
        shown.add_row(case, best, *cells, style=style)
    if shown.row_count:
        Console().print(shown)
    return worst <= ALLOWED


if __name__ == "__main__":
    typer.run(main)
