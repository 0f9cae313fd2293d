"""What the retrieval tasks hide in a text: secret numbers under two-word keys, chains of variables.

Keys, names and values are each split once and for all: about 80 % to train on, 20 % held out.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from itertools import product

import numpy as np

from elasticore.eval.corpus import Split, is_heldout

_ADJECTIVES = """
amber ancient autumn bitter bold brave bright broken calm candid clever cold copper crimson
curious dusty eager early faint fancy fierce frozen gentle giant golden grand happy heavy hollow
humble icy jolly keen lively lonely lucky mellow mighty misty modest noble odd pale patient
polite proud purple quiet rapid royal rusty salty scarlet shiny silent silver sleepy smooth
solemn spicy steady sturdy sunny tender tidy
"""
_NOUNS = """
acorn anchor apple badger barrel beacon bridge candle canyon castle cellar cherry comet compass
coral cottage cricket dragon eagle ember falcon feather ferry forest fountain garden glacier
goblet hammer harbor hermit island jacket kettle ladder lantern lemon lizard magnet maple meadow
mirror mountain needle ocean orchard otter parrot pebble pencil pepper pilot pirate planet
pumpkin rabbit raven ribbon river saddle sailor sparrow teapot tiger
"""
ADJECTIVES, NOUNS = tuple(_ADJECTIVES.split()), tuple(_NOUNS.split())
LETTERS = "abcdefghijklmnopqrstuvwxyz"
HOPS = 2
Pieces = tuple[str, ...]


@dataclass(frozen=True)
class Fact:
    """Statements to hide, a question about them and its answer, each as pieces of text."""

    statements: tuple[Pieces, ...]
    question: Pieces
    answer: Pieces


FactMaker = Callable[[np.random.Generator, Split, int], list[Fact]]


@lru_cache
def _space(name: str, split: Split) -> tuple[str, ...]:
    """The keys, names or values of one split: about 80 % to train on, 20 % held out."""
    if name == "key":
        words = (f"{a} {n}" for a, n in product(ADJECTIVES, NOUNS))
    elif name == "name":
        words = ("".join(w) for w in product(LETTERS, LETTERS, "0123456789"))
    else:
        words = (str(number) for number in range(10_000, 100_000))
    return tuple(word for word in words if is_heldout(word, 20) == (split == "heldout"))


def draw(rng: np.random.Generator, name: str, split: Split, count: int) -> list[str]:
    """`count` different keys, names or values (`name`: "key", "name" or "value") of a split."""
    space = _space(name, split)
    return [space[i] for i in rng.choice(len(space), count, replace=False, shuffle=True)]


def needles(rng: np.random.Generator, split: Split, count: int) -> list[Fact]:
    """`count` secret numbers, each under its own two-word key."""
    facts = []
    keys, values = draw(rng, "key", split, count), draw(rng, "value", split, count)
    for key, value in zip(keys, values, strict=True):
        statement: Pieces = (f"\nThe secret number of {key} is", f" {value}", ".\n")
        question: Pieces = (
            f"\nQuestion: What is the secret number of {key}?",
            f"\nAnswer: The secret number of {key} is",
        )
        facts.append(Fact((statement,), question, (f" {value}",)))
    return facts


def chains(rng: np.random.Generator, split: Split, count: int, hops: int = HOPS) -> list[Fact]:
    """`count` chains of assignments; the answer of each takes `hops` retrievals."""
    facts = []
    names, values = draw(rng, "name", split, count * hops), draw(rng, "value", split, count)
    for i, value in enumerate(values):
        chain = names[i * hops : (i + 1) * hops]  # the value goes to the first, the last is asked
        sources = [value, *chain[:-1]]
        statements = tuple(
            (f"\nVAR {name} =", f" {source}", "\n")
            for name, source in zip(chain, sources, strict=True)
        )
        question = (
            f"\nQuestion: What is the value of VAR {chain[-1]}?",
            f"\nAnswer: VAR {chain[-1]} =",
        )
        answer: list[str] = []
        for name in reversed(chain[:-1]):
            answer += (f" {name}", f"\nVAR {name} =")
        facts.append(Fact(statements, question, (*answer, f" {value}")))
    return facts
