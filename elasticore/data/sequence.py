"""One tokenized sample, as it lies in a packed row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

__all__ = ["IGNORED", "Span", "TokenSequence"]

IGNORED = -100
"""Label of a token that is not to be predicted, as everywhere in PyTorch."""


class Span(NamedTuple):
    """Tokens ``start`` to ``stop`` (exclusive) of a sequence, counted from its own first token.

    ``kind`` is ``"answer"``, or ``"evidence"`` for text that the answer needs.
    """

    kind: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class TokenSequence:
    """One sample in tokens.

    Attributes
    ----------
    input_ids, labels
        int32 ``[tokens]``; a label is the token itself, or -100 where nothing is to be learnt.
    task, source
        Names of its task and of where it came from.
    spans
        Where the answer and its evidence lie.
    """

    input_ids: NDArray[np.int32]
    labels: NDArray[np.int32]
    task: str
    source: str
    spans: tuple[Span, ...] = ()

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def prompt(self) -> int:
        """How many tokens come before its first answer; 0 if none says where that is."""
        return min((start for kind, start, _ in self.spans if kind == "answer"), default=0)

    @property
    def learnt(self) -> int:
        """How many tokens are learnt; the first never is, as nothing comes before it."""
        return int(np.count_nonzero(self.labels[1:] != IGNORED))

    def on_answers(self) -> TokenSequence:
        """The same sequence with labels on its answer spans only."""
        labels = np.full_like(self.input_ids, IGNORED)
        for kind, start, stop in self.spans:
            if kind == "answer":
                labels[start:stop] = self.input_ids[start:stop]
        return TokenSequence(self.input_ids, labels, self.task, self.source, self.spans)
