"""The two layouts of packed parquet, and how a row of each becomes sequences.

Ours
    A row is one packed row of tokens, in the columns of :data:`COLUMNS`. The names of tasks and
    sources stand in the file's metadata, under the key ``elasticore``, as JSON: the fields of
    :class:`Header`, with ``"format": "elasticore.packed"`` and ``"version": 1``.

The official code's
    It has no metadata, and the columns of :data:`OFFICIAL_COLUMNS`. Its labels cover all tokens,
    also of prompts, as its setting for learning answers only does not reach the processes that
    pack; and its answer spans start at the template's words before the answer. It does not tell
    the tokenizer, the source or the evidence of a sequence, and a task that it has no name for
    is ``other``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from elasticore.data.sequence import Span, TokenSequence
from elasticore.data.sources import TASKS

__all__ = ["COLUMNS", "FORMAT", "KEY", "OFFICIAL_COLUMNS", "VERSION", "Header", "layout_of", "row"]

FORMAT, VERSION = "elasticore.packed", 1
KEY = b"elasticore"

COLUMNS = {
    "input_ids": "the tokens",
    "labels": "the token itself, or -100 where nothing is learnt",
    "cu_seqlens": "where the sequences start, and where the last one ends",
    "task_ids": "per sequence: its task, as an index into the metadata's tasks",
    "source_ids": "per sequence: its source, as an index into the metadata's sources",
    "spans": "{sequence, kind, start, stop}: where in their sequence answers and evidence lie",
}
"""Our columns, which are lists of int32, and for the last one a list of structs."""

OFFICIAL_COLUMNS = {
    "input_ids": "the tokens",
    "labels": "the token itself, but for the first of each sequence",
    "seq_lengths": "where the sequences start, and where the last one ends",
    "task_ids": "per sequence: 0 to 4 for the paper's tasks, 5 for others",
    "task_type": "per sequence: its task's name",
    "range_ids": "per sequence: first and last token of four parts, the last being the answer",
}
"""The official code's columns."""

Layout = Literal["elasticore", "official"]


@dataclass(frozen=True)
class Header:
    """What a file says of all its rows.

    Attributes
    ----------
    capacity
        Most tokens of a row; None if unknown.
    tasks, sources
        The names that ids stand for.
    tokenizer
        :func:`~elasticore.data.encoding.fingerprint` of the tokenizer; None if unknown.
    """

    capacity: int | None
    tasks: tuple[str, ...]
    sources: tuple[str, ...]
    tokenizer: dict[str, Any] | None

    def to_json(self) -> str:
        """The metadata of a file."""
        return json.dumps({"format": FORMAT, "version": VERSION} | vars(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: bytes) -> Header:
        """Read what :meth:`to_json` wrote."""
        about = json.loads(text)
        if about.get("format") != FORMAT or about.get("version") != VERSION:
            raise ValueError(
                f"it is {about.get('format')} version {about.get('version')}, and this elasticore "
                f"reads {FORMAT} version {VERSION}"
            )
        return cls(
            about["capacity"], tuple(about["tasks"]), tuple(about["sources"]), about["tokenizer"]
        )


OFFICIAL = Header(None, (*TASKS, "other"), ("official",), None)


def layout_of(columns: Sequence[str], metadata: Mapping[bytes, bytes]) -> tuple[Layout, Header]:
    """Which layout a file has, and its header.

    Raises
    ------
    ValueError
        If it has neither; the message ends without a full stop.
    """
    if KEY in metadata:
        missing = [name for name in COLUMNS if name not in columns]
        if missing:
            raise ValueError(f"the columns {', '.join(missing)} are missing")
        try:
            return "elasticore", Header.from_json(metadata[KEY])
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"its metadata is wrong: {error!r}") from None
    if set(OFFICIAL_COLUMNS) <= set(columns):
        return "official", OFFICIAL
    raise ValueError(
        f"it has the columns {', '.join(columns)}, which are neither those of `elasticore data "
        f"build` nor those of the official code ({', '.join(OFFICIAL_COLUMNS)})"
    )


def row(table: Any, at: int, layout: Layout, header: Header) -> list[TokenSequence]:
    """The sequences of a row of an Arrow table.

    Raises
    ------
    ValueError
        If its columns do not fit each other; the message ends without a full stop.
    """
    ids, labels = _numbers(table["input_ids"][at]), _numbers(table["labels"][at])
    tasks = _named("task", header.tasks, table["task_ids"][at].as_py())
    spans: dict[int, list[Span]] = {}
    if layout == "elasticore":
        bounds = table["cu_seqlens"][at].as_py()
        sources = _named("source", header.sources, table["source_ids"][at].as_py())
        for span in table["spans"][at].as_py():
            spans.setdefault(span.pop("sequence"), []).append(Span(**span))
    else:
        bounds = table["seq_lengths"][at].as_py()
        sources = [header.sources[0]] * len(tasks)
        ranges = table["range_ids"][at].as_py()
        if len(ranges) != len(tasks):
            raise ValueError(f"{len(tasks)} tasks, but {len(ranges)} range_ids")
        for index, parts in enumerate(ranges):
            spans[index] = [Span("answer", parts[6], parts[7] + 1)]  # it names the last token

    lengths = [stop - start for start, stop in pairwise(bounds)]
    if len(ids) != len(labels):
        raise ValueError(f"{len(ids)} input_ids, but {len(labels)} labels")
    if not lengths or min(lengths) < 1 or bounds[0] != 0 or bounds[-1] != len(ids):
        raise ValueError(f"the boundaries {bounds[:8]} do not divide its {len(ids)} tokens")
    if not len(lengths) == len(tasks) == len(sources):
        raise ValueError(f"{len(lengths)} sequences, {len(tasks)} tasks, {len(sources)} sources")
    for index, found in spans.items():
        for _, start, stop in found:
            if index >= len(lengths) or not 0 <= start <= stop <= lengths[index]:
                raise ValueError(f"the span {start} to {stop} lies outside of sequence {index}")
    return [
        TokenSequence(
            ids[start:stop],
            labels[start:stop],
            tasks[index],
            sources[index],
            tuple(spans.get(index, ())),
        )
        for index, (start, stop) in enumerate(pairwise(bounds))
    ]


def _numbers(scalar: Any) -> NDArray[np.int32]:
    """A list as an array, without a Python number per token."""
    return scalar.values.to_numpy(zero_copy_only=False).astype(np.int32, copy=False)


def _named(kind: str, names: Sequence[str], numbers: Sequence[int]) -> list[str]:
    wrong = sorted({number for number in numbers if not 0 <= number < len(names)})
    if wrong:
        raise ValueError(
            f"{kind} ids {wrong} are out of range: there are {len(names)}, {', '.join(names)}"
        )
    return [names[number] for number in numbers]
