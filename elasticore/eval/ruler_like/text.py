"""Long text in lines, as pieces with their tokens: repeated noise, real prose, cut to any length.

A line ends with its line break and is encoded as it stands after another line, so that the tokens
of the pieces in a row are those of the whole text.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from elasticore.eval.corpus import Split, documents
from elasticore.eval.ruler_like.words import Source

Tokens = NDArray[np.int64]
Tokenizer = Any  # any transformers tokenizer

NOISE = (
    "Rain fell on the roof. The kettle was warm. A clock ticked. Nobody came. The day went on.\n"
)
_PARAGRAPH = re.compile(r"[A-Z].{58,498}[.:!?]")
_NUMBER = re.compile(r"\d{4}")  # could be taken for an answer


class Piece(NamedTuple):
    """A piece of text and its tokens."""

    text: str
    ids: Tokens


_REMEMBERED: WeakKeyDictionary[Tokenizer, dict[str, Piece]] = WeakKeyDictionary()


def encode(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Piece]:
    """Tokens of texts as each stands at the very beginning, without special ones."""
    texts = list(texts)
    return _pieces(texts, _ids(tokenizer, texts))


def encode_after_line(tokenizer: Tokenizer, texts: Iterable[str]) -> list[Piece]:
    """Tokens of texts as they stand after a line break.

    Tokenizers of the SentencePiece kind put a space before the beginning of a text; behind a line
    break they do not.
    """
    texts = list(texts)
    (line_break,) = _ids(tokenizer, ["\n"])
    size = len(line_break)
    found = _ids(tokenizer, ["\n" + text for text in texts])
    # A tokenizer that merges the line break into what follows gets the texts as they are.
    if any(ids[:size] != line_break for ids in found):
        return encode(tokenizer, texts)
    return _pieces(texts, [ids[size:] for ids in found])


def _ids(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _pieces(texts: list[str], ids: list[list[int]]) -> list[Piece]:
    return [Piece(text, np.asarray(own, np.int64)) for text, own in zip(texts, ids, strict=True)]


def remember(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Piece]:
    """As :func:`encode_after_line`, for pieces that come back in every sample."""
    known = _REMEMBERED.setdefault(tokenizer, {})
    new = [text for text in dict.fromkeys(texts) if text not in known]
    known.update(zip(new, encode_after_line(tokenizer, new), strict=True))
    return [known[text] for text in texts]


# ---- Lines without end ----


def noise(tokenizer: Tokenizer) -> Iterator[Piece]:
    """The same line again and again."""
    (line,) = remember(tokenizer, [NOISE])
    while True:
        yield line


def prose(tokenizer: Tokenizer, source: Source) -> Iterator[Piece]:
    """Paragraphs of the interpreter's documentation, a line each, in a new order in each round."""
    lines = remember(tokenizer, _paragraphs(source.split))
    while True:
        for i in source.rng.permutation(len(lines)):
            yield lines[i]


def fill(tokenizer: Tokenizer, lines: Iterator[Piece], room: int, rest: str = "") -> list[Piece]:
    """Whole lines until one does not fit, then as many of its words as do (or words of `rest`)."""
    taken: list[Piece] = []
    for line in lines:
        if len(line.ids) > room:
            break
        taken.append(line)
        room -= len(line.ids)
    return taken + _cut(tokenizer, rest or line.text, room)


class Laid(NamedTuple):
    """A text with lines laid into it.

    Attributes
    ----------
    pieces : list of Piece
        The text and the lines.
    places : list of int
        The index of each line in `pieces`.
    depths : list of float
        Share of the text's tokens before each line.
    """

    pieces: list[Piece]
    places: list[int]
    depths: list[float]


def lay(body: Sequence[Piece], lines: Sequence[Piece], depths: Sequence[float]) -> Laid:
    """Lay `lines` between the pieces of `body`, as near to `depths` (0 to 1) as these allow."""
    ends = np.cumsum([0, *(len(piece.ids) for piece in body)], dtype=np.float64)
    ends /= max(1.0, ends[-1])
    cuts = [int(np.abs(ends - depth).argmin()) for depth in depths]
    order = sorted(range(len(lines)), key=lambda i: depths[i])
    pieces: list[Piece] = []
    places = [0] * len(lines)
    last = 0
    for i in order:
        pieces += body[last : cuts[i]]
        last = cuts[i]
        places[i] = len(pieces)
        pieces.append(lines[i])
    return Laid([*pieces, *body[last:]], places, [float(ends[cut]) for cut in cuts])


def _cut(tokenizer: Tokenizer, text: str, room: int) -> list[Piece]:
    """The longest beginning of a line, in words, that has at most `room` tokens."""
    words = text.split()

    def start(count: int) -> Piece:
        return encode_after_line(tokenizer, [" ".join(words[:count]) + "\n"])[0]

    fits = bisect_right(range(1, len(words) + 1), room, key=lambda count: len(start(count).ids))
    return [start(fits)] if fits else []


@lru_cache
def _paragraphs(split: Split) -> tuple[str, ...]:
    """English paragraphs of the split's prose; no lists, tables or examples of code."""
    found = []
    for document in documents(split, "prose"):
        for paragraph in re.split(r"\n\s*\n", document.text):
            line = " ".join(paragraph.split())
            letters = sum(character.isalpha() or character == " " for character in line)
            if (
                _PARAGRAPH.fullmatch(line)
                and line.isascii()
                and letters >= 0.88 * len(line)
                and not _NUMBER.search(line)
            ):
                found.append(line + "\n")
    return tuple(found)
