"""Long-context tasks laid into real text, at an exact token length for any tokenizer.

Three tasks need what lies far back (sparsity-sensitive; after RULER, Hsieh et al. 2024):

- ``needle``: one secret number is hidden in the text and asked for at the end;
- ``multikey``: eight are hidden, one is asked for;
- ``tracking``: four chains ``VAR kx7 = 48213``, ``VAR bq2 = kx7`` are scattered over the text; the
  answer spells one chain from its last name to its value, so that every hop is one retrieval.

Two are mostly local (sparsity-robust): ``code`` and ``prose`` continue real documents. Held-out
samples use documents, keys, names, values and seeds that no training sample uses.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from elasticore.data.prompting import first_tokens
from elasticore.eval.corpus import Document, Kind, Split, documents
from elasticore.eval.facts import FactMaker, chains, needles

Tokens = NDArray[np.int64]
Tokenizer = Any  # any transformers tokenizer

NEEDLES, CHAINS = 8, 4
CONTINUATION = 256  # tokens of a document that `code` and `prose` ask for


@dataclass(frozen=True, eq=False)
class Sample:
    """One sample: a prompt, its answer, and where both lie.

    Attributes
    ----------
    task : str
        Name of the task.
    input_ids : ndarray of int64, shape (length,)
        Prompt ``input_ids[:start]``, answer ``input_ids[start:stop]``; `stop` is the length. The
        prompt begins with the tokenizer's first token, if it has one.
    start, stop : int
        Span of the answer, in tokens.
    answer : str
        The answer as text.
    sensitive : bool
        Whether answering needs tokens far back.
    evidence : tuple of (int, int)
        Token spans of the statements that hold the answer; empty for ``code`` and ``prose``.
    given : int
        Tokens at the start of the answer that do not count, as there are other ways to begin it.
    """

    task: str
    input_ids: Tokens
    start: int
    stop: int
    answer: str
    sensitive: bool
    evidence: tuple[tuple[int, int], ...] = ()
    given: int = 0


_ENCODED: WeakKeyDictionary[Tokenizer, dict[str, Tokens]] = WeakKeyDictionary()


def encode(tokenizer: Tokenizer, text: str) -> Tokens:
    """Tokens of a text without special ones; remembered, as the same pieces come back."""
    cache = _ENCODED.setdefault(tokenizer, {})
    if text not in cache:
        encoded = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        cache[text] = np.asarray(encoded, dtype=np.int64)
    return cache[text]


def _join(tokenizer: Tokenizer, pieces: Sequence[str]) -> Tokens:
    return np.concatenate([encode(tokenizer, piece) for piece in pieces])


def _first(tokenizer: Tokenizer) -> Tokens:
    """What some models need before every text."""
    return np.asarray(first_tokens(tokenizer), dtype=np.int64)


def _pick(tokenizer: Tokenizer, rng: np.random.Generator, found: Sequence[Document]) -> Tokens:
    """Tokens of a document, drawn in proportion to its length."""
    ends = np.cumsum([len(document.text) for document in found])
    return encode(
        tokenizer, found[int(np.searchsorted(ends, rng.integers(ends[-1]), "right"))].text
    )


def filler(
    tokenizer: Tokenizer, rng: np.random.Generator, split: Split, length: int, kind: Kind
) -> Tokens:
    """`length` tokens of real text: documents in a row, the first from a random place on."""
    parts: list[Tokens] = []
    missing = length
    between = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while missing > 0:
        tokens = _pick(tokenizer, rng, documents(split, kind))
        if not parts:
            tokens = tokens[rng.integers(len(tokens)) :]
        parts.append(np.concatenate([tokens, np.asarray(between, dtype=np.int64)])[:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


def weave(
    text: Tokens, inserts: Sequence[Tokens], depths: NDArray[np.float64]
) -> tuple[Tokens, NDArray[np.int64]]:
    """Lay `inserts` into `text` at `depths` (0 to 1); return all tokens and where each starts."""
    order = np.argsort(depths, kind="stable")
    cuts = np.rint(depths[order] * len(text)).astype(np.int64)
    sizes = np.array([len(inserts[i]) for i in order], dtype=np.int64)
    starts = np.empty(len(inserts), np.int64)
    starts[order] = cuts + np.cumsum(sizes) - sizes
    parts: list[Tokens] = []
    for piece, i in zip(np.split(text, cuts), [*order, -1], strict=True):
        parts += [piece] if i < 0 else [piece, inserts[i]]
    return np.concatenate(parts), starts


# ---- The tasks ----

Spans = tuple[tuple[int, int], ...]
Built = tuple[Tokens, int, Spans]  # the tokens, where the answer starts, where its evidence lies
Build = Callable[[Tokenizer, np.random.Generator, int, Split], Built]


def _retrieval(make: FactMaker, count: int) -> Build:
    """A task that hides `count` facts at uniform depths and asks for one of them at the end."""

    def build(tokenizer: Tokenizer, rng: np.random.Generator, length: int, split: Split) -> Built:
        facts = make(rng, split, count)
        asked = facts[0]  # facts are drawn in random order
        statements = [_join(tokenizer, s) for fact in facts for s in fact.statements]
        question, answer = _join(tokenizer, asked.question), _join(tokenizer, asked.answer)
        first = _first(tokenizer)
        room = length - sum(map(len, (first, question, answer, *statements)))
        if room < 0:
            raise ValueError(
                f"length={length} is too short for this task with this tokenizer; "
                f"use at least {length - room} tokens"
            )
        # A chain is assigned before it is used: the depths of its statements ascend.
        depths = np.concatenate([np.sort(rng.random(len(fact.statements))) for fact in facts])
        text = filler(tokenizer, rng, split, room, "code" if rng.random() < 0.5 else "prose")
        body, starts = weave(text, statements, depths)
        evidence = tuple(
            (len(first) + int(starts[i]), len(first) + int(starts[i]) + len(statements[i]))
            for i in range(len(asked.statements))
        )
        return np.concatenate([first, body, question, answer]), length - len(answer), evidence

    return build


def _continuation(kind: Kind) -> Build:
    """A task that continues a real document; other documents come first where it is too short."""

    def build(tokenizer: Tokenizer, rng: np.random.Generator, length: int, split: Split) -> Built:
        asked = min(CONTINUATION, length // 4)
        if asked < 1:
            raise ValueError(f"length={length} is too short to continue a document; use at least 4")
        tokens = _pick(tokenizer, rng, documents(split, kind))
        while len(tokens) < 2 * asked:  # the answer must have a beginning in its own document
            tokens = _pick(tokenizer, rng, documents(split, kind))
        stop = int(rng.integers(2 * asked, len(tokens) + 1))
        first = _first(tokenizer)
        room = length - len(first)
        tokens = tokens[max(0, stop - room) : stop]
        before = filler(tokenizer, rng, split, room - len(tokens), kind)
        return np.concatenate([first, before, tokens]), length - asked, ()

    return build


@dataclass(frozen=True)
class Task:
    """A kind of sample.

    Attributes
    ----------
    sensitive : bool
        Whether it needs far-back tokens.
    build : callable
        Builds one.
    tokens : bool
        Whether an answer counts by its share of right tokens, as of a text that goes on; else it
        is right or wrong.
    """

    sensitive: bool
    build: Build
    tokens: bool = False


TASKS: dict[str, Task] = {
    "needle": Task(True, _retrieval(needles, 1)),
    "multikey": Task(True, _retrieval(needles, NEEDLES)),
    "tracking": Task(True, _retrieval(chains, CHAINS)),
    "code": Task(False, _continuation("code"), tokens=True),
    "prose": Task(False, _continuation("prose"), tokens=True),
}


def make_sample(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    seed: int,
    split: Split = "heldout",
    tasks: Mapping[str, Task] | None = None,
) -> Sample:
    """Build one sample; the same arguments always give the same sample.

    Parameters
    ----------
    task : str
        A name in `tasks`.
    tokenizer : PreTrainedTokenizerBase
        Any transformers tokenizer.
    length : int
        Tokens of prompt and answer together.
    seed : int
        At least 0. The two splits draw from different streams and different spaces.
    split : {"heldout", "train"}
        Which documents, keys, names and values to use.
    tasks : mapping, optional
        What tasks there are, by name, in an order that does not change; `TASKS` by default.

    Returns
    -------
    Sample

    Raises
    ------
    ValueError
        If the task or the split is unknown, the seed negative, or the length too short.
    """
    tasks = TASKS if tasks is None else tasks
    if task not in tasks:
        raise ValueError(f"task={task!r} is unknown; use one of {', '.join(tasks)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'heldout'")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    stream = (seed, list(tasks).index(task), int(split == "heldout"))
    ids, start, evidence = tasks[task].build(
        tokenizer, np.random.default_rng(stream), length, split
    )
    answer = tokenizer.decode(ids[start:].tolist())
    return Sample(task, ids, start, length, answer, tasks[task].sensitive, evidence)


# ---- Dense supervision, to train a backbone from scratch ----

TEXT, TEMPLATE, ANSWER = 0, 1, 2  # what a token of a dense sequence is


def dense_sequence(
    tokenizer: Tokenizer, text: Tokens, length: int, rng: np.random.Generator, count: int
) -> tuple[Tokens, NDArray[np.uint8]]:
    """A training sequence with many facts in it, each asked for once somewhere after it is stated.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        The backbone's tokenizer.
    text : ndarray of int64, shape (>= length,)
        Text to lay the facts into.
    length : int
        Tokens to return.
    rng : numpy.random.Generator
        Source of every draw; facts come from the training spaces.
    count : int
        Facts to try for; fewer where they do not fit.

    Returns
    -------
    ids : ndarray of int64, shape (length,)
    roles : ndarray of uint8, shape (length,)
        `TEXT`, `TEMPLATE` (statements and questions: they are random, so nothing to predict) or
        `ANSWER`.

    Raises
    ------
    ValueError
        If `text` is shorter than `length`.
    """
    if len(text) < length:
        raise ValueError(f"text has {len(text)} tokens; give at least length={length}")
    chained = int(rng.binomial(count, 0.4))
    facts = needles(rng, "train", count - chained) + chains(rng, "train", chained)
    inserts: list[Tokens] = []
    depths: list[float] = []
    answers: dict[int, int] = {}  # the index of a question -> the size of its answer
    room = length
    for i in rng.permutation(len(facts)):
        fact = facts[i]
        events = [_join(tokenizer, s) for s in fact.statements]
        answer = _join(tokenizer, fact.answer)
        events.append(np.concatenate([_join(tokenizer, fact.question), answer]))
        room -= sum(map(len, events))
        if room < 0:
            room += sum(map(len, events))
            break
        inserts += events
        depths += np.sort(rng.random(len(events))).tolist()
        answers[len(inserts) - 1] = len(answer)
    ids, starts = weave(text[:room], inserts, np.asarray(depths))
    roles = np.full(length, TEXT, np.uint8)
    for i, (start, insert) in enumerate(zip(starts, inserts, strict=True)):
        stop = start + len(insert)
        roles[start:stop] = TEMPLATE
        if i in answers:
            roles[stop - answers[i] : stop] = ANSWER
    return ids, roles
