"""The two RULER tasks that count words: the text itself is what is asked about."""

from __future__ import annotations

import math
from bisect import bisect_right

import numpy as np
from numpy.typing import NDArray

from elasticore.eval.ruler_like.tasks import Draft, TooShortError
from elasticore.eval.ruler_like.text import Piece, Tokenizer, encode_after_line, remember
from elasticore.eval.ruler_like.words import Source

__all__ = ["common_words", "frequent_words"]

COMMON = 10
SHORT = 4096  # below this length, words come less often


def common_words(source: Source, length: int) -> Draft:
    """A numbered list in random order in which ten words come 30 times and the others 3 times.

    Below 4,096 tokens they come 6 times and once. The last of the other words may come less often.
    """
    often, seldom = (30, 3) if length >= SHORT else (6, 1)
    example = source.words(2 * COMMON)
    shown, others = example[:COMMON], example[COMMON:]
    # No answer may be part of another word: it would count as found.
    common: list[str] = []
    rest: list[str] = []
    entries = length // 4  # at most: a number, a dot, a word and a line break
    for word in source.words(entries // seldom + 4 * COMMON):
        if not any(word in c or c in word for c in common):
            (common if len(common) < COMMON else rest).append(word)
    head = "Below is a numbered list of words. Some of them come more often than others.\n"
    question = f"Question: Which {COMMON} words come most often in the list above?"
    prefix = f"Answer: The {COMMON} words that come most often are"

    def mixed(words: list[str]) -> list[str]:
        return [words[i] for i in source.rng.permutation(len(words))]

    def text(tokenizer: Tokenizer, room: int) -> list[Piece]:
        words = [*common * often, *(word for word in rest for _ in range(seldom))]
        numbers = remember(tokenizer, [f"{i + 1}." for i in range(len(words))])
        once = list(dict.fromkeys(words))
        pieces = dict(
            zip(once, encode_after_line(tokenizer, [f" {w}\n" for w in once]), strict=True)
        )
        # The tokens of the numbers and of the words add up to the same in any order.
        sizes = [len(n.ids) + len(pieces[w].ids) for n, w in zip(numbers, words, strict=True)]
        ends = np.cumsum(sizes)
        least = len(common) * often
        if ends[least - 1] > room:
            raise TooShortError(int(ends[least - 1]) - room)
        words = mixed(words[: np.searchsorted(ends, room, "right")])
        return [p for n, w in zip(numbers, words, strict=False) for p in (n, pieces[w])]

    listed = "".join(f"{i + 1}. {w}\n" for i, w in enumerate(mixed([*shown * 3, *others])))
    return Draft(
        head=f"{head}{listed}{question}\n{prefix} {', '.join(shown)}\n{head}",
        question=question,
        prefix=prefix,
        references=tuple(common),
        fill=text,
    )


ASKED = 3
NOISE_WORD = " ...."


def frequent_words(source: Source, length: int) -> Draft:
    """Made-up words by a Zipf law with exponent 2, the first rank dots; ask for the next three."""
    coded = source.draw("coded", max(length // 50, 2 * ASKED))

    def text(tokenizer: Tokenizer, room: int) -> list[Piece]:
        vocabulary = remember(tokenizer, [NOISE_WORD])
        vocabulary += encode_after_line(tokenizer, [f" {word}" for word in coded])
        (end,) = remember(tokenizer, ["\n"])
        sizes = np.array([len(piece.ids) for piece in vocabulary])
        shares = 6 / (math.pi * np.arange(1, len(vocabulary) + 1)) ** 2  # 1 / (k² ζ(2))
        least = math.ceil(1 / (shares[ASKED] - shares[ASKED + 1]))  # then the third word leads

        def times(words: int) -> NDArray[np.int64]:
            return (words * shares).astype(np.int64)

        def tokens(words: int) -> int:
            return int(times(words) @ sizes) + len(end.ids)

        if tokens(least) > room:
            raise TooShortError(tokens(least) - room)
        fits = bisect_right(range(4 * room), room, lo=least, key=tokens) - 1
        counts = times(fits)
        counts[0] += (room - tokens(fits)) // sizes[0]  # to be ignored, so it may fill up
        order = source.rng.permutation(np.repeat(np.arange(len(vocabulary)), counts))
        last = np.flatnonzero(order)[-1]  # a word, as some tokenizers join dots and a line break
        order[[last, -1]] = order[[-1, last]]
        return [*(vocabulary[i] for i in order), end]

    return Draft(
        head="Below are made-up words. Some come more often than others. Ignore the dots.\n",
        question=f"Question: Which {ASKED} words come most often in the text above?",
        prefix=f"Answer: The {ASKED} words that come most often are",
        references=tuple(coded[:ASKED]),
        fill=text,
    )
