"""The data card: what a build holds, as JSON for programs and as Markdown for people."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from elasticore.data.layouts import FORMAT, VERSION
from elasticore.data.parquet import CARD, PackedParquet
from elasticore.data.sequence import TokenSequence

__all__ = ["Tally", "make_card", "show", "write_card"]

README = "README.md"


class Tally:
    """Counts of rows and their sequences, per task, source and length."""

    def __init__(self) -> None:
        self.rows = 0
        self.all = _nothing()
        self.tasks: dict[str, dict[str, int]] = {}
        self.sources: dict[str, dict[str, int]] = {}
        self.lengths: dict[int, int] = {}

    def add(self, row: Sequence[TokenSequence]) -> None:
        """Count a row."""
        self.rows += 1
        for one in row:
            for counts in (
                self.all,
                self.tasks.setdefault(one.task, _nothing()),
                self.sources.setdefault(one.source, _nothing()),
            ):
                counts["sequences"] += 1
                counts["tokens"] += len(one)
                counts["learnt_tokens"] += one.learnt
            least = 1 << (len(one).bit_length() - 1)
            self.lengths[least] = self.lengths.get(least, 0) + 1


def _nothing() -> dict[str, int]:
    return {"sequences": 0, "tokens": 0, "learnt_tokens": 0}


def make_card(
    tally: Tally,
    *,
    files: Sequence[Mapping[str, Any]],
    capacity: int | None,
    tokenizer: Mapping[str, Any] | None,
    settings: Mapping[str, Any],
    origins: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """All that is known of the data, ready for JSON.

    ``origins`` says of each source where it is from, its licence, the records read and dropped.
    """
    from elasticore import __version__

    return {
        "format": FORMAT,
        "version": VERSION,
        "elasticore": __version__,
        "files": list(files),
        "rows": tally.rows,
        **tally.all,
        "capacity": capacity,
        "fill": tally.all["tokens"] / (tally.rows * capacity) if capacity else None,
        "tasks": dict(sorted(tally.tasks.items())),
        "sources": {
            name: {**counts, **origins.get(name, {})}
            for name, counts in sorted(tally.sources.items())
        },
        "lengths": [
            {"from": least, "below": 2 * least, "sequences": tally.lengths[least]}
            for least in sorted(tally.lengths)
        ],
        "tokenizer": tokenizer,
        "settings": dict(settings),
    }


def show(path: str | Path) -> dict[str, Any]:
    """The card of packed data; data without one, as the official code's, is counted.

    Raises
    ------
    FileNotFoundError, ValueError
        As :class:`PackedParquet`.
    """
    data = PackedParquet(path)
    if data.card is not None:
        return data.card
    tally = Tally()
    for row in data:
        tally.add(row)
    files = [
        {"name": file.name, "rows": metadata.num_rows}
        for file, metadata in zip(data.files, data._metadata, strict=True)
    ]
    card = make_card(
        tally,
        files=files,
        capacity=data.header.capacity,
        tokenizer=data.header.tokenizer,
        settings={},
        origins={},
    )
    return card if data.layout == "elasticore" else {**card, "format": "official", "version": None}


def write_card(card: Mapping[str, Any], folder: Path) -> None:
    """Write it into a folder, as ``card.json`` and as ``README.md``."""
    (folder / README).write_text(_markdown(card), encoding="utf-8")
    (folder / CARD).write_text(json.dumps(card, indent=2) + "\n", encoding="utf-8")


def _markdown(card: Mapping[str, Any]) -> str:
    fill = "" if card["fill"] is None else f", {card['fill']:.1%} full"
    longest = max((one["sequences"] for one in card["lengths"]), default=1)
    parts = [
        "# Packed training data for elasticore",
        f"{card['sequences']:,} sequences with {card['tokens']:,} tokens, of which "
        f"{card['learnt_tokens']:,} are learnt, in {card['rows']:,} rows of at most "
        f"{card['capacity']:,} tokens{fill}. Format {card['format']}, version {card['version']}; "
        f"made by elasticore {card['elasticore']}.",
        "## Tasks",
        _table(
            "task, sequences, tokens, learnt tokens",
            ([name, *_figures(counts)] for name, counts in card["tasks"].items()),
        ),
        "## Sources",
        _table(
            "source, sequences, tokens, learnt tokens, records read, too short, too long, "
            "unusable, from, licence",
            (
                [name, *_figures(one), f"{one['records']:,}"]
                + [f"{one['dropped'][why]:,}" for why in ("short", "long", "unusable")]
                + [one["origin"], one["licence"]]
                for name, one in card["sources"].items()
            ),
        ),
        "The licences of the sources hold for this data.",
        "## Lengths",
        _table(
            "tokens, sequences, ",
            (
                [
                    f"{one['from']:,} to {one['below'] - 1:,}",
                    f"{one['sequences']:,}",
                    "█" * round(30 * one["sequences"] / longest),
                ]
                for one in card["lengths"]
            ),
        ),
        "## Settings",
        _table("setting, value", ([k, f"`{v}`"] for k, v in card["settings"].items())),
        "## Tokenizer",
        _table("fingerprint, value", ([k, f"`{v}`"] for k, v in (card["tokenizer"] or {}).items())),
    ]
    return "\n\n".join(parts) + "\n"


def _figures(counts: Mapping[str, int]) -> list[str]:
    return [f"{counts[key]:,}" for key in _nothing()]


def _table(heads: str, rows: Iterable[Sequence[str]]) -> str:
    first = heads.split(", ")
    lines = [first, ["---"] * len(first), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
