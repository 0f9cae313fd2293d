"""RULER tasks as drafts: what is hidden, what is asked, and the text around it.

After RULER (Hsieh et al. 2024, arXiv 2404.06654): numbers of keys, values, queries, chains and
hops, kinds of text, keys and values, and frequencies of words are its own; every sentence is ours.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice

from elasticore.eval.ruler_like.text import (
    NOISE,
    Piece,
    Tokenizer,
    encode_after_line,
    fill,
    noise,
    prose,
    remember,
)
from elasticore.eval.ruler_like.words import Source

__all__ = ["Draft", "Maker", "TooShortError", "needles", "questions", "variables"]

Fill = Callable[[Tokenizer, int], list[Piece]]


class TooShortError(ValueError):
    """The text needs `missing` more tokens than there is room for."""

    def __init__(self, missing: int) -> None:
        super().__init__(f"{missing} tokens are missing")
        self.missing = missing


@dataclass(frozen=True)
class Draft:
    """A sample before it has a length.

    Attributes
    ----------
    head, question, prefix : str
        What comes before the text, after it, and how the answer begins.
    references : tuple of str
        The answers, as the metrics take them.
    fill : callable
        ``fill(tokenizer, room)`` makes a text of at most `room` tokens.
    evidence : tuple of str
        Lines to lay into the text that hold the answer. Empty if the text itself is what is asked
        about; then the evidence is every place where it says an answer.
    others : tuple of str
        Lines to lay into the text that look like evidence.
    ordered : bool
        Whether the lines of evidence have to come in their order.
    """

    head: str
    question: str
    prefix: str
    references: tuple[str, ...]
    fill: Fill
    evidence: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    ordered: bool = False


Maker = Callable[[Source, int], Draft]  # the length is that of the whole sample, in tokens


# ---- Needles in a haystack ----


def needles(
    haystack: str,
    key: str = "key",
    value: str = "number",
    keys: int = 1,
    values: int = 1,
    asked: int = 1,
) -> Maker:
    """Hide `keys` × `values` secrets in noise, prose or more secrets; ask for `asked` keys."""

    def make(source: Source, length: int) -> Draft:
        kind = "uuid" if value == "uuid" else "number"
        names = source.draw(key, keys)
        secrets = [source.draw(value, values) for _ in names]

        def line(name: str, secret: str) -> str:
            return f"The secret {kind} of {name} is {secret}.\n"

        def more(tokenizer: Tokenizer) -> Iterator[Piece]:
            while True:
                pairs = zip(source.draw(key, 128), source.draw(value, 128), strict=True)
                yield from encode_after_line(tokenizer, [line(*pair) for pair in pairs])

        def text(tokenizer: Tokenizer, room: int) -> list[Piece]:
            if haystack == "needles":
                return fill(tokenizer, more(tokenizer), room, rest=3 * NOISE)
            lines = noise(tokenizer) if haystack == "noise" else prose(tokenizer, source)
            return fill(tokenizer, lines, room)

        lines = [[line(name, s) for s in own] for name, own in zip(names, secrets, strict=True)]
        what = " and ".join(filter(None, [", ".join(names[: asked - 1]), names[asked - 1]]))
        one = asked * values == 1
        ask = f"What is the secret {kind}" if one else f"What are all the secret {kind}s"
        return Draft(
            head=f"The text below hides secret {kind}s. You will be asked for them later.\n",
            question=f"Question: {ask} of {what} in the text above?",
            prefix=f"Answer: The secret {kind} of {what} is"
            if one
            else f"Answer: The secret {kind}s of {what} are",
            references=tuple(s for own in secrets[:asked] for s in own),
            fill=text,
            evidence=tuple(s for own in lines[:asked] for s in own),
            others=tuple(s for own in lines[asked:] for s in own),
        )

    return make


# ---- Variable tracking ----

HOPS = 4


def variables(source: Source, length: int) -> Draft:
    """Hide a chain of assignments in noise; ask for all five variables that have its value."""
    first, value = source.draw("variable", HOPS + 1), *source.draw("value", 1)
    shown, other = source.draw("variable", HOPS + 1), *source.draw("value", 1)
    head = "The text below assigns values to variables. Keep track of them.\n"

    def chain(names: list[str], start: str) -> list[str]:
        sources = [start, *(f"VAR {name}" for name in names)]
        return [f"VAR {name} = {s}\n" for name, s in zip(names, sources, strict=False)]

    def question(value: str) -> str:
        return f"Question: Which variables have the value {value} in the text above?"

    def prefix(value: str) -> str:
        return f"Answer: The {HOPS + 1} variables with the value {value} are"

    example = [head, NOISE, *chain(shown, other), NOISE, question(other), "\n"]
    return Draft(
        head="".join(example) + f"{prefix(other)} {', '.join(shown)}\n" + head,
        question=question(value),
        prefix=prefix(value),
        references=tuple(first),
        fill=lambda tokenizer, room: fill(tokenizer, noise(tokenizer), room),
        evidence=tuple(chain(first, value)),
        ordered=True,
    )


# ---- Questions ----

# A statement about x and y, and a question about x whose answer is y.
_FACTS = (
    ("{x} was born in the town of {y}.", "What is the birthplace of {x}?"),
    ("{x} works for the company {y}.", "Who is the employer of {x}?"),
    ("{x} is married to {y}.", "What is the name of the spouse of {x}?"),
    ("{x} wrote the book {y}.", "What is the title of the book by {x}?"),
)
# A statement about x and m, one about m and y, and a question about x whose answer is y.
_CHAINS = (
    (
        "{x} works for the company {m}.",
        "The company {m} has its head office in {y}.",
        "In which town is the head office of the employer of {x}?",
    ),
    (
        "{x} is married to {m}.",
        "The birthplace of {m} is the town of {y}.",
        "In which town was the spouse of {x} born?",
    ),
    (
        "{x} wrote the book {m}.",
        "The hero of the book {m} is called {y}.",
        "What is the name of the hero in the book by {x}?",
    ),
)
PARAGRAPHS = 3  # of real text in a document


def questions(hops: int) -> Maker:
    """Documents of real text with a made-up fact in each; ask for one, or one by way of another."""
    forms = _FACTS if hops == 1 else _CHAINS

    def make(source: Source, length: int) -> Draft:
        def one() -> tuple[list[str], str, str]:
            """Statements, a question and its answer."""
            *statements, question = forms[source.rng.integers(len(forms))]
            names = dict(zip("xmy", source.draw("name", 3), strict=True))
            lines = [statement.format(**names) + "\n" for statement in statements]
            return lines, question.format(**names), names["y"]

        evidence, question, answer = one()

        def stated() -> Iterator[str]:
            while True:
                yield from one()[0]

        def library(tokenizer: Tokenizer) -> Iterator[Piece]:
            text, facts = prose(tokenizer, source), stated()
            for number in count(2):
                document = list(islice(text, PARAGRAPHS))
                place = source.rng.integers(PARAGRAPHS + 1)
                document[place:place] = encode_after_line(tokenizer, [next(facts)])
                yield from document
                yield from remember(tokenizer, [f"Document {number}\n"])

        return Draft(
            head="Answer the question below the documents with a name only.\nDocument 1\n",
            question=f"Question: {question}",
            prefix="Answer:",
            references=(answer,),
            fill=lambda tokenizer, room: fill(tokenizer, library(tokenizer), room),
            evidence=tuple(evidence),
        )

    return make
