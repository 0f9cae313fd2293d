"""The matrix: which problems a backend is tried on."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

from elasticore.patterns import HeadMode, Streaming

__all__ = ["Case", "PAGED", "PAIRS", "PRESETS", "SHORT", "matrix"]

LAYOUTS = ("dense", "left", "right", "packed")
PAGED = ("dense", "packed")
"""Layouts of sequences whose keys and values are in pages."""
GROUPS = (1, 4, 7, 8)
HEAD_DIMS = (32, 64, 128)
LENGTHS = (1, 127, 128, 129, 2047, 2048, 2049, 2175, 2176, 2177)
QUERIES = ("all", "some", "one")
PRESETS = {
    "128": (128, Streaming(128, 2048), Streaming(0, 128)),
    "64": (64, Streaming(64, 256), Streaming(64, 64)),
    "32": (32, Streaming(0, 128), Streaming(32, 64)),
}
"""Block size, what STREAMING heads read, and what they read in short cases: less than all."""

PAIRS = (
    (HeadMode.FULL, HeadMode.STREAMING),
    (HeadMode.FULL, HeadMode.SELECTED),
    (HeadMode.SELECTED, HeadMode.STREAMING),
)
"""The lanes (retrieval, sparse) that meet in a call."""

SHORT = 300
"""Tokens below which a case is short."""


@dataclass(frozen=True)
class Case:
    """One problem of the matrix; ``queries`` says whether ``Tq`` is ``Tk``, shorter, or 1."""

    layout: str
    group: int
    head_dim: int
    length: int
    queries: str
    preset: str

    def __str__(self) -> str:
        return (
            f"{self.layout}-g{self.group}-d{self.head_dim}-t{self.length}-{self.queries}"
            f"-b{self.preset}"
        )


def matrix(full: bool = False) -> list[Case]:
    """The cases: every pair of values of any two axes at least once, or every combination.

    Parameters
    ----------
    full
        All combinations (some thousand; minutes on a GPU) instead of the pairwise cover.
    """
    axes: tuple[tuple[object, ...], ...] = (
        LAYOUTS,
        GROUPS,
        HEAD_DIMS,
        LENGTHS,
        QUERIES,
        tuple(PRESETS),
    )
    every = [Case(*values) for values in itertools.product(*axes)]  # type: ignore[arg-type]
    if full:
        return every
    # Greedy pairwise cover, deterministic: the case that adds the most pairs for its price, so that
    # long sequences meet wide heads where the queries are few; among equals, the one whose values
    # have been used least.
    pairs = [_pairs(case) for case in every]
    price = [_operations(case) ** 0.25 for case in every]
    missing = frozenset().union(*pairs)
    cover: list[Case] = []
    used: Counter[tuple[str, object]] = Counter()
    while missing:
        gain = [len(new & missing) / cost for new, cost in zip(pairs, price, strict=True)]
        most = max(gain)
        equals = [index for index, value in enumerate(gain) if value == most]
        best = min(equals, key=lambda i: sum(used[item] for item in vars(every[i]).items()))
        cover.append(every[best])
        used.update(vars(every[best]).items())
        missing -= pairs[best]
    return cover


def _pairs(case: Case) -> frozenset[tuple[tuple[str, object], ...]]:
    """The pairs of axis values that ``case`` puts to the test.

    With one token, or one query, most of what can go wrong cannot show: such a case counts only for
    pairs with its length (one query: or its queries).
    """
    tested = frozenset(itertools.combinations(vars(case).items(), 2))
    if case.length > 1 and case.queries != "one":
        return tested
    telling = {"length"} if case.length == 1 else {"length", "queries"}
    return frozenset(pair for pair in tested if telling & {axis for axis, _ in pair})


def _operations(case: Case) -> int:
    """Multiply-adds of a case, up to a factor."""
    queries = {"all": case.length, "some": max(1, case.length // 3), "one": 1}[case.queries]
    return queries * case.length * case.group * case.head_dim
