"""The words, numbers and names that the RULER tasks hide: never the same twice in a sample.

Words come from the interpreter's own prose. Those of held-out documents are for held-out samples
only, and everything that is made of letters or digits is split by a hash, about 80 % to train on.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import lru_cache
from uuid import UUID

import numpy as np

from elasticore.eval.corpus import Split, documents, is_heldout

_WORD = re.compile(r"(?<![\w.'-])[a-z]{4,9}(?![\w'-])")
_CONSONANTS, _VOWELS = tuple("bdfgklmnprstvz"), tuple("aeiou")


@lru_cache
def words(split: Split) -> tuple[str, ...]:
    """English words of four to nine letters in the prose of one split, in alphabetical order."""
    found = {
        word for document in documents(split, "prose") for word in _WORD.findall(document.text)
    }
    if split == "train":
        found.difference_update(words("heldout"))
    return tuple(sorted(found))


class Source:
    """Draws from one generator for one sample; what it has given, it never gives again.

    Parameters
    ----------
    rng : numpy.random.Generator
        Source of every draw.
    split : {"train", "heldout"}
        Which members of each space may be drawn.
    """

    def __init__(self, rng: np.random.Generator, split: Split) -> None:
        self.rng = rng
        self.split = split
        self._given: set[str] = set()

    def draw(self, kind: str, count: int) -> list[str]:
        """`count` new members of a space.

        Parameters
        ----------
        kind : {"key", "number", "value", "uuid", "variable", "coded", "name"}
            Two words; a number of seven or of five digits; a UUID of version 4; five capital or six
            small letters; a name of seven letters that no language has.
        count : int
            How many.
        """
        found: list[str] = []
        while len(found) < count:
            for item in self._batch(kind, 2 * (count - len(found)) + 8):
                if item not in self._given and len(found) < count:
                    self._given.add(item)
                    found.append(item)
        return found

    def words(self, count: int) -> list[str]:
        """`count` different words; pairs of words where the corpus has too few."""
        known = words(self.split)
        mixed = [known[i] for i in self.rng.permutation(len(known))]
        chosen = [word for word in mixed if word not in self._given][:count]
        self._given.update(chosen)
        pairs = self.draw("key", count - len(chosen))
        return [*chosen, *(pair.replace(" ", "-") for pair in pairs)]

    def _batch(self, kind: str, count: int) -> list[str]:
        if kind == "key":  # made of words that are split already
            known = words(self.split)
            return [f"{known[i]} {known[j]}" for i, j in self._integers(len(known), count, 2)]
        return [
            item
            for item in _MAKERS[kind](self.rng, count)
            if is_heldout(item, 20) == (self.split == "heldout")
        ]

    def _integers(self, high: int, *shape: int) -> list[list[int]]:
        return self.rng.integers(high, size=shape).tolist()


def _numbers(digits: int) -> Callable[[np.random.Generator, int], list[str]]:
    return lambda rng, count: [
        str(number) for number in rng.integers(10 ** (digits - 1), 10**digits, count).tolist()
    ]


def _letters(*alphabets: tuple[str, ...]) -> Callable[[np.random.Generator, int], list[str]]:
    """Strings with one letter of each alphabet, in order."""

    def make(rng: np.random.Generator, count: int) -> list[str]:
        columns = [
            np.array(alphabet)[rng.integers(len(alphabet), size=count)] for alphabet in alphabets
        ]
        return ["".join(letters) for letters in zip(*columns, strict=True)]

    return make


_SMALL = tuple("abcdefghijklmnopqrstuvwxyz")
_CAPITAL = tuple(letter.upper() for letter in _SMALL)
_MAKERS: dict[str, Callable[[np.random.Generator, int], list[str]]] = {
    "number": _numbers(7),
    "value": _numbers(5),
    "uuid": lambda rng, count: [str(UUID(bytes=rng.bytes(16), version=4)) for _ in range(count)],
    "variable": _letters(*[_CAPITAL] * 5),
    "coded": _letters(*[_SMALL] * 6),
    "name": _letters(tuple(letter.upper() for letter in _CONSONANTS), *[_VOWELS, _CONSONANTS] * 3),
}
