"""The RULER suite without a download: thirteen tasks at any length, for any tokenizer.

Eight needles in a haystack, variable tracking, two counts of words, and questions with one and two
hops, laid into the interpreter's own documentation. The numbers are those of RULER (Hsieh et al.
2024, arXiv 2404.06654); texts, words and questions are not, so scores are not comparable with
published ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from elasticore.data.prompting import first_tokens
from elasticore.eval.corpus import Split
from elasticore.eval.metrics import contains_all, contains_any
from elasticore.eval.ruler_like.counts import common_words, frequent_words
from elasticore.eval.ruler_like.tasks import (
    HOPS,
    Draft,
    Maker,
    TooShortError,
    needles,
    questions,
    variables,
)
from elasticore.eval.ruler_like.text import Piece, Tokenizer, encode, encode_after_line, lay
from elasticore.eval.ruler_like.words import Source
from elasticore.eval.tasks import Sample

__all__ = ["RULER_LIKE", "RulerSample", "RulerTask", "make_ruler_sample"]

Metric = Callable[[str, Sequence[str]], float]


@dataclass(frozen=True)
class RulerTask:
    """A task of the suite.

    Attributes
    ----------
    make : callable
        Drafts a sample.
    metric : callable
        ``metric(prediction, references)``, from 0 to 1.
    tokens : int
        How many to generate.
    sensitive : bool
        Whether answering needs tokens far back.
    statements : int
        How many lines of evidence a sample has; 0 where the whole text is the evidence.
    """

    make: Maker
    metric: Metric
    tokens: int
    sensitive: bool
    statements: int


def _needles(statements: int = 1, **settings: Any) -> RulerTask:
    return RulerTask(needles(**settings), contains_all, 128, True, statements)


RULER_LIKE: dict[str, RulerTask] = {
    "niah_single_1": _needles(haystack="noise"),
    "niah_single_2": _needles(haystack="prose"),
    "niah_single_3": _needles(haystack="prose", value="uuid"),
    "niah_multikey_1": _needles(haystack="prose", keys=4),
    "niah_multikey_2": _needles(haystack="needles"),
    "niah_multikey_3": _needles(haystack="needles", key="uuid", value="uuid"),
    "niah_multivalue": _needles(4, haystack="prose", values=4),
    "niah_multiquery": _needles(4, haystack="prose", keys=4, asked=4),
    "vt": RulerTask(variables, contains_all, 30, True, HOPS + 1),
    "cwe": RulerTask(common_words, contains_all, 120, True, 0),
    # A Zipf law looks the same in any part of the text that is not too short.
    "fwe": RulerTask(frequent_words, contains_all, 50, False, 0),
    "qa_1": RulerTask(questions(hops=1), contains_any, 32, True, 1),
    "qa_2": RulerTask(questions(hops=2), contains_any, 32, True, 2),
}
"""The tasks by RULER's names."""


@dataclass(frozen=True, eq=False, kw_only=True)
class RulerSample(Sample):
    """A sample with several answers; ``input_ids`` holds them in a row, after the prompt.

    Attributes
    ----------
    references : tuple of str
        The answers, for the task's metric.
    depths : tuple of float
        Share of the text that lies before each line of evidence; empty for ``cwe`` and ``fwe``.
    user, prefix : str
        The prompt as text: what the user says, and how the model's answer begins.
    """

    references: tuple[str, ...]
    depths: tuple[float, ...]
    user: str
    prefix: str


def make_ruler_sample(
    task: str,
    tokenizer: Tokenizer,
    length: int,
    seed: int,
    split: Split = "heldout",
    *,
    depths: Sequence[float] | None = None,
    template: Mapping[str, Any] | None = None,
) -> RulerSample:
    """Build one sample; the same arguments always give the same sample.

    Parameters
    ----------
    task : str
        A name in `RULER_LIKE`.
    tokenizer : PreTrainedTokenizerBase
        Any transformers tokenizer.
    length : int
        Tokens of the prompt and of what is to be generated, at most. A text of lines is cut between
        words, so that a sample may have a few tokens less.
    seed : int
        At least 0. The two splits draw from different streams and different spaces.
    split : {"heldout", "train"}
        Which documents, words, names and numbers to use.
    depths : Sequence[float], optional
        Where in the text each line of evidence goes, from 0 to 1; at random by default.
    template : mapping, optional
        Write the prompt with the tokenizer's chat template and these options of it, such as
        ``{"enable_thinking": False}`` or ``{}``; plain text for a base model by default.

    Returns
    -------
    RulerSample

    Raises
    ------
    ValueError
        If the task or the split is unknown, the seed negative, the length too short, a depth not
        as described, or the tokenizer without a chat template.
    """
    if task not in RULER_LIKE:
        raise ValueError(f"task={task!r} is unknown; use one of {', '.join(RULER_LIKE)}")
    if split not in ("train", "heldout"):
        raise ValueError(f"split={split!r} is unknown; use 'train' or 'heldout'")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    about = RULER_LIKE[task]
    stream = (seed, int.from_bytes(task.encode(), "big"), int(split == "heldout"))
    source = Source(np.random.default_rng(stream), split)
    draft = about.make(source, length)
    places = _places(draft, source, depths)
    others = [float(depth) for depth in source.rng.random(len(draft.others))]

    start, end = _frame(tokenizer, template)
    # After a template's beginning, as after a line break, comes no space of the tokenizer's own.
    head = (encode_after_line if template is not None else encode)(tokenizer, [draft.head])
    ask = draft.question + ("\n" if template is None else "")
    answer = " " + ", ".join(draft.references)
    evidence, distractors, tail, (written,) = (
        encode_after_line(tokenizer, texts)
        for texts in (draft.evidence, draft.others, [ask], [answer])
    )
    tail += [*end, *encode_after_line(tokenizer, [draft.prefix])]
    lines = [*evidence, *distractors]
    fixed = _size([*start, *head, *lines, *tail])
    room = length - fixed - max(about.tokens, len(written.ids))
    try:
        if room < 0:
            raise TooShortError(-room)
        body = draft.fill(tokenizer, room)
    except TooShortError as error:
        raise ValueError(
            f"length={length} is too short for task={task!r} with this tokenizer; "
            f"use at least {length + error.missing} tokens"
        ) from None
    laid = lay(body, lines, [*places, *others])

    pieces = [*start, *head, *laid.pieces, *tail]
    stops = np.cumsum([len(piece.ids) for piece in pieces]).tolist()
    starts = [0, *stops]
    first = len(start) + len(head)
    wanted = [first + i for i in laid.places[: len(evidence)]]
    if not evidence:  # the text says the answers here and there
        said = set(draft.references)
        wanted = [first + i for i, p in enumerate(laid.pieces) if p.text.strip() in said]
    return RulerSample(
        task=task,
        input_ids=np.concatenate([piece.ids for piece in [*pieces, written]]),
        start=stops[-1],
        stop=stops[-1] + len(written.ids),
        answer=answer,
        sensitive=about.sensitive,
        evidence=tuple((starts[i], stops[i]) for i in wanted),
        references=draft.references,
        depths=tuple(laid.depths[: len(evidence)]),
        user="".join(p.text for p in [*head, *laid.pieces]) + draft.question,
        prefix=draft.prefix,
    )


def _size(pieces: Sequence[Piece]) -> int:
    return sum(len(piece.ids) for piece in pieces)


def _places(draft: Draft, source: Source, depths: Sequence[float] | None) -> list[float]:
    """The depth of each line of evidence: as asked for, or drawn."""
    drawn = source.rng.random(len(draft.evidence)).tolist()
    if depths is None:
        return sorted(drawn) if draft.ordered else drawn
    chosen = [float(depth) for depth in depths]
    fits = len(chosen) == len(drawn) and all(0 <= depth <= 1 for depth in chosen)
    if not fits or (draft.ordered and chosen != sorted(chosen)):
        raise ValueError(
            f"depths={chosen} must be {len(drawn)} numbers from 0 to 1"
            f"{' that ascend' if draft.ordered else ''}, one per line of evidence of this task"
        )
    return chosen


_PROMPT = "PROMPT-GOES-HERE"


def _frame(
    tokenizer: Tokenizer, template: Mapping[str, Any] | None
) -> tuple[list[Piece], list[Piece]]:
    """What comes before and after the user's text: a chat template's tokens, or a first token."""
    if template is None:
        return [Piece("", np.asarray(first_tokens(tokenizer), np.int64))], []
    if not tokenizer.chat_template:
        raise ValueError(
            f"template={dict(template)} needs a chat template, which this tokenizer does not have; "
            "leave it out for a base model"
        )
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": _PROMPT}],
        tokenize=False,
        add_generation_prompt=True,
        **template,
    )
    before, found, after = text.partition(_PROMPT)
    if not found:
        raise ValueError(
            f"template={dict(template)}: the chat template leaves out what a user says"
        )
    return encode(tokenizer, [before]), encode_after_line(tokenizer, [after])
