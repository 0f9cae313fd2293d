"""Answers on disk, a line for each, written as soon as they are there."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elasticore.eval.measuring import Measures
from elasticore.places import append

__all__ = ["Entry", "Journal", "key"]


def key(request: Any) -> str:
    """What tells requests apart: the task, the document, the prompt and how to generate.

    Parameters
    ----------
    request
        An ``Instance`` of lm-evaluation-harness.
    """
    prompt, settings = request.args
    about = [request.task_name, request.doc_id, request.idx, prompt, sorted(settings.items())]
    text = json.dumps(about, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Entry:
    """One answer.

    Attributes
    ----------
    key
        See :func:`key`.
    task, document
        The harness's name of the task, and the number of its document.
    answer
        What was generated, up to the first stop sequence.
    measures
        What it cost.
    """

    key: str
    task: str
    document: int
    answer: str
    measures: Measures


class Journal:
    """A file of JSON lines; a last line that was cut off in writing is dropped.

    Parameters
    ----------
    path
        The file; it is created with the first answer.
    others
        Files of other processes, read alone.

    Raises
    ------
    ValueError
        If a line before the last is none of ours; the message names it.
    """

    def __init__(self, path: str | Path, others: Iterable[Path] = ()) -> None:
        self.path = Path(path)
        self._entries: dict[str, Entry] = {}
        for other in others:
            self._read(other)
        if self.path.is_file():
            self._read(self.path, mend=True)

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Entry:
        return self._entries[name]

    def __len__(self) -> int:
        return len(self._entries)

    def entries(self) -> list[Entry]:
        """All answers, in the order in which they came."""
        return list(self._entries.values())

    def add(self, request: Any, answer: str, measures: Measures) -> None:
        """Write one answer; it is on disk when this returns.

        Raises
        ------
        OSError
            If the disk is full or cannot be written; the file holds the answers before.
        """
        entry = Entry(key(request), str(request.task_name), int(request.doc_id), answer, measures)
        line = json.dumps(asdict(entry), ensure_ascii=False) + "\n"
        append(self.path, line)
        self._entries[entry.key] = entry

    def _read(self, path: Path, *, mend: bool = False) -> None:
        whole = path.read_bytes()
        lines = whole.splitlines(keepends=True)
        for number, line in enumerate(lines, 1):
            try:
                if not line.endswith(b"\n"):
                    raise ValueError("cut off")
                data = json.loads(line)
                measures = Measures(
                    **{**data["measures"], "decisions": tuple(data["measures"]["decisions"])}
                )
                entry = Entry(**{**data, "measures": measures})
            except (ValueError, TypeError, KeyError) as error:
                if number < len(lines):
                    raise ValueError(
                        f"{path} line {number} is no answer of this version; move the file "
                        "away to ask everything again."
                    ) from error
                if mend:  # the run was stopped while it wrote this one
                    with path.open("r+b") as file:
                        file.truncate(len(whole) - len(line))
                break
            self._entries[entry.key] = entry
