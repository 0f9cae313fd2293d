"""Candidate tasks for a real model, in its chat template, over real texts.

Each is a question on a text, with the start of the answer given, so that there is one way to go on.
What the answer needs stands far back (``far``: in the first 80 % of the text) or close by
(``near``: in its last 180 tokens). Which of them count as sensitive and as robust is not said here:
``recipes/smollm2`` measures it for a model, by the rule in its README.

The texts are those of :mod:`elasticore.eval.texts` and programs of the standard library.
Held-out samples use texts, keys, values and seeds that no training sample uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from elasticore.eval.corpus import Split, documents
from elasticore.eval.facts import ADJECTIVES, NOUNS, draw
from elasticore.eval.tasks import Build, Built, Sample, Task, Tokens, encode, weave
from elasticore.eval.texts import Country, countries, speeches

__all__ = ["FAR", "NEAR", "TASKS", "as_in_chat"]

NEAR_TOKENS = 180
FAR_SHARE = 0.8
LAST_OF_TURN = 3
ROOM = 240
"""Tokens of the longest question, with the template and its answer."""
Rng = np.random.Generator


@lru_cache(maxsize=8)
def _frame(tokenizer: Any) -> tuple[str, str]:
    """What the chat template writes before a user's words, and between them and the answer."""
    mark = "\u2063words\u2063"
    whole = tokenizer.apply_chat_template(
        [{"role": "user", "content": mark}], tokenize=False, add_generation_prompt=True
    )
    before, _, after = whole.partition(mark)
    return before, after


def as_in_chat(sample: Sample, tokenizer: Any) -> Sample:
    """The same sample with a prompt as a user's, which ends before the start of the answer.

    The start belongs to the answer then, and does not count.

    Parameters
    ----------
    sample
        Of one of these tasks.
    tokenizer
        The one that it was made with.

    Raises
    ------
    ValueError
        If its prompt does not hold what the chat template writes before an answer.
    """
    # Tokens of a question and of the template may have grown together: its last line has not.
    turn = encode(tokenizer, _frame(tokenizer)[1])[-LAST_OF_TURN:]
    for end in range(sample.start, len(turn) - 1, -1):
        if np.array_equal(sample.input_ids[end - len(turn) : end], turn):
            return replace(sample, start=end, given=sample.start - end)
    raise ValueError(f"sample of task {sample.task!r} has no turn of the chat template.")


def _speech(tokenizer: Any, rng: Rng, split: Split, length: int) -> Tokens:
    return _stretch(tokenizer, rng, speeches(split), length)


def _code(tokenizer: Any, rng: Rng, split: Split, length: int) -> Tokens:
    return _stretch(tokenizer, rng, [d.text for d in documents(split, "code")], length)


def _stretch(tokenizer: Any, rng: Rng, texts: Any, length: int) -> Tokens:
    """``length`` tokens of texts in a row, the first from a random place on."""
    parts: list[Tokens] = []
    missing = length
    between = encode(tokenizer, "\n\n")
    while missing > 0:
        tokens = encode(tokenizer, texts[int(rng.integers(len(texts)))])
        if not parts:
            tokens = tokens[rng.integers(len(tokens)) :]
        parts.append(np.concatenate([tokens, between])[:missing])
        missing -= len(parts[-1])
    return np.concatenate(parts) if parts else np.empty(0, np.int64)


class _Question:
    """The question, the start of the answer, and the answer, ready to be put after a text."""

    def __init__(self, tokenizer: Any, question: str, start: str, answer: str) -> None:
        before, after = _frame(tokenizer)
        self.start = start
        self.before = encode(tokenizer, before)
        self.after = np.concatenate(
            [encode(tokenizer, f"\n\n{question}{after}"), encode(tokenizer, start)]
        )
        self.answer = encode(tokenizer, answer)

    def room(self, length: int) -> int:
        """Tokens for the text."""
        room = length - len(self.before) - len(self.after) - len(self.answer)
        if room < 2 * NEAR_TOKENS:
            raise ValueError(
                f"length={length} is too short for this task; use at least "
                f"{length - room + 2 * NEAR_TOKENS} tokens."
            )
        return room

    def sample(self, text: Tokens, evidence: tuple[tuple[int, int], ...] = ()) -> Built:
        """All tokens, where the answer starts, and where its evidence lies."""
        ids = np.concatenate([self.before, text, self.after, self.answer])
        shift = len(self.before)
        spans = tuple((first + shift, last + shift) for first, last in evidence)
        return ids, len(ids) - len(self.answer), spans


def _depth(rng: Rng, far: bool, room: int) -> float:
    """Where in the text something is hidden, 0 to 1."""
    return float(FAR_SHARE * rng.random() if far else 1 - NEAR_TOKENS / room * rng.random())


# ---- Facts that are hidden in speeches ----

Facts = Callable[[Rng, Split], tuple[list[str], str, str, str]]


def _hidden(make: Facts, far: bool) -> Build:
    """Statements in a speech; ``make`` gives them, the question, its start and the answer."""

    def build(tokenizer: Any, rng: Rng, length: int, split: Split) -> Built:
        statements, question, start, answer = make(rng, split)
        asked = _Question(tokenizer, question, start, answer)
        inserts = [encode(tokenizer, one) for one in statements]
        room = asked.room(length) - sum(map(len, inserts))
        text = _speech(tokenizer, rng, split, room)
        depths = np.array([_depth(rng, far, room) for _ in inserts])
        body, starts = weave(text, inserts, depths)
        return asked.sample(body, ((int(starts[0]), int(starts[0]) + len(inserts[0])),))

    return build


def _numbers(count: int) -> Facts:
    def make(rng: Rng, split: Split) -> tuple[list[str], str, str, str]:
        keys, values = draw(rng, "key", split, count), draw(rng, "value", split, count)
        said = [
            f"\nThe secret number of {key} is {value}.\n"
            for key, value in zip(keys, values, strict=True)
        ]
        question = f"What is the secret number of {keys[0]}?"
        return said, question, f"The secret number of {keys[0]} is", f" {values[0]}"

    return make


def _two_values(rng: Rng, split: Split) -> tuple[list[str], str, str, str]:
    (key, other), values = draw(rng, "key", split, 2), draw(rng, "value", split, 2)
    said = [
        f"\nThe secret numbers of {key} are {values[0]} and {values[1]}.\n",
        f"\nThe secret numbers of {other} are {values[1][::-1]} and {values[0][::-1]}.\n",
    ]
    question = f"What are the two secret numbers of {key}?"
    return said, question, f"The secret numbers of {key} are", f" {values[0]} and {values[1]}"


def _words(rng: Rng, split: Split) -> tuple[list[str], str, str, str]:
    keys = draw(rng, "key", split, 4)
    said = [f"\nThe password of the {keys[0]} is {keys[1]}.\n"]
    said.append(f"\nThe password of the {keys[2]} is {keys[3]}.\n")
    question = f"What is the password of the {keys[0]}?"
    return said, question, f"The password of the {keys[0]} is", f" {keys[1]}"


def _records(rng: Rng, split: Split) -> tuple[list[str], str, str, str]:
    """Eight lines of a table in one place."""
    keys, values = draw(rng, "key", split, 8), draw(rng, "value", split, 8)
    lines = [f"{key.replace(' ', '_')} = {value}" for key, value in zip(keys, values, strict=True)]
    at = int(rng.integers(8))
    name = keys[at].replace(" ", "_")
    said = ["\n" + "\n".join(lines) + "\n"]
    return said, f"What is the value of {name}?", f"{name} =", f" {values[at]}"


def _shots(rng: Rng, split: Split) -> tuple[list[str], str, str, str]:
    """Words sorted into two boxes by a rule that stands beside them."""
    boxes = draw(rng, "key", split, 2)
    kinds = [list(rng.permutation(ADJECTIVES)[:9]), list(rng.permutation(NOUNS)[:9])]
    order = [int(x) for x in rng.permutation([0] * 8 + [1] * 8)]
    lines = [f"{kinds[kind].pop()} -> the {boxes[kind]} box" for kind in order]
    asked = int(rng.integers(2))
    word = kinds[asked].pop()
    said = ["\n" + "\n".join(lines) + "\n"]
    question = f"Into which box does the word {word} go, sorted like the words above?"
    return said, question, f"{word} -> the", f" {boxes[asked]} box"


# ---- Countries ----


def _fact(far: bool) -> Build:
    """A number in a country's profile, among others."""

    def build(tokenizer: Any, rng: Rng, length: int, split: Split) -> Built:
        found = countries(split)
        order = [found[i] for i in rng.permutation(len(found))]
        for country in order:
            # Numbers that nobody knows by heart, and that no other line of the entry repeats.
            values = [value for _, value in country.fields]
            known = [
                (field, value)
                for field, value in country.fields
                if re.search(r"\d\d", value) and len(value) <= 24 and values.count(value) == 1
            ]
            if known:
                break
        field, value = known[int(rng.integers(len(known)))]
        asked = _Question(
            tokenizer,
            f"What does the profile of {country.name} say for {field}?",
            f"{country.name}, {field}:",
            f" {value}",
        )
        room = asked.room(length)
        entry = _profile(tokenizer, rng, country, f"{field}: {value}\n", 150)
        parts: list[Tokens] = []
        missing = room - len(entry)
        for other in (one for one in order if one is not country):
            parts.append(_profile(tokenizer, rng, other, "", 250)[:missing])
            missing -= len(parts[-1])
            if not missing:
                break
        place = int(rng.integers(int(FAR_SHARE * len(parts)))) if far else len(parts)
        before = sum(len(part) for part in parts[:place])
        text = np.concatenate([*parts[:place], entry, *parts[place:]])
        return asked.sample(text, ((before, before + len(entry)),))

    return build


def _profile(tokenizer: Any, rng: Rng, country: Country, line: str, tokens: int) -> Tokens:
    """A country's profile of about so many tokens, which holds ``line``."""
    lines = [f"{field}: {value}\n" for field, value in country.fields]
    lines = [lines[i] for i in rng.permutation(len(lines)) if lines[i] != line]
    head = encode(tokenizer, f"\nProfile of {country.name}\n")
    chosen = [line] if line else []
    size = len(head) + sum(len(encode(tokenizer, one)) for one in chosen)
    for one in lines:
        size += len(encode(tokenizer, one))
        if size > tokens:
            break
        chosen.append(one)
    chosen = [chosen[i] for i in rng.permutation(len(chosen))]
    return np.concatenate([head, *(encode(tokenizer, one) for one in chosen)])


# ---- What the text itself says ----


def _found(draw_text: Callable[..., Tokens], find: Callable[[str], Any], far: bool) -> Build:
    """Draw texts until ``find`` finds something to ask about in the right part of one."""

    def build(tokenizer: Any, rng: Rng, length: int, split: Split) -> Built:
        for _ in range(200):
            text = draw_text(tokenizer, rng, split, length)
            first = length - NEAR_TOKENS
            if far:  # but for the front, which makes room for the question
                first = int(
                    rng.integers(ROOM, int(max(ROOM + 1, FAR_SHARE * length - NEAR_TOKENS)))
                )
            found = find(tokenizer.decode(text[first : first + NEAR_TOKENS].tolist()))
            if found is None:
                continue
            asked = _Question(tokenizer, *found)
            cut = length - asked.room(length)
            words = tokenizer.decode(text[cut:].tolist())
            if cut <= ROOM and words.count(asked.start.split('"')[-1].strip()) == 1:
                return asked.sample(text[cut:], ((first - cut, first - cut + NEAR_TOKENS),))
        raise ValueError("no text has anything to ask about; give other texts.")

    return build


def _sentence(words: str) -> tuple[str, str, str] | None:
    for sentence in re.findall(r"(?<=[.;] )[A-Z][^.;\"]{110,400}[.;]", words):
        parts = sentence.split(" ")
        if len(parts) >= 20:
            start, rest = " ".join(parts[:9]), " " + " ".join(parts[9:19])
            question = f'How does the sentence of the text go on that begins with "{start}"?'
            return question, f'It goes on like this: "{start}', rest
    return None


def _signature(words: str) -> tuple[str, str, str] | None:
    for name, arguments in re.findall(r"\n *def (\w{4,})\(([^()\n]{8,60})\):", words):
        if arguments.count(",") >= 1 and not name.startswith("__"):
            question = f"Which parameters does the function {name} take?"
            return question, f"def {name}(", f"{arguments})"
    return None


# ---- Going on ----


def _next_line(tokenizer: Any, rng: Rng, length: int, split: Split) -> Built:
    """The next line of a program."""
    for _ in range(200):
        text = _code(tokenizer, rng, split, length)
        words = tokenizer.decode(text[-400:].tolist())
        lines = words.split("\n")[1:-1]  # whole lines
        at = [
            i
            for i in range(len(lines) // 2, len(lines))
            if 16 <= len(lines[i].strip()) <= 70 and not lines[i].strip().startswith(("#", '"'))
        ]
        if not at:
            continue
        index = at[int(rng.integers(len(at)))]
        line = lines[index]
        tail = encode(tokenizer, "\n".join(lines[:index]) + "\n")
        indent = line[: len(line) - len(line.lstrip())]
        asked = _Question(
            tokenizer, "What is the next line of this program?", f"```\n{indent}", line.strip()
        )
        room = asked.room(length)
        body = np.concatenate([text[:-400], tail])
        if len(body) < room:
            body = np.concatenate([_code(tokenizer, rng, split, room - len(body)), body])
        return asked.sample(body[-room:])
    raise ValueError("no program has a line to ask for; give other texts.")


def _next_words(tokenizer: Any, rng: Rng, length: int, split: Split) -> Built:
    """The next words of a speech."""
    text = _speech(tokenizer, rng, split, length)
    answer = tokenizer.decode(text[-24:].tolist())
    before = tokenizer.decode(text[-44:-24].tolist())
    asked = _Question(tokenizer, "How does this speech go on?", f"...{before}", answer)
    return asked.sample(text[:-24][-asked.room(length) :])


def _kind(tokenizer: Any, rng: Rng, length: int, split: Split) -> Built:
    """What the last part of the text is, which is of another kind than the rest."""
    kinds = ["speech", "program", "profile"]
    kind = kinds[int(rng.integers(3))]
    asked = _Question(
        tokenizer,
        "The last lines above: are they part of a speech, of a program, or of a country profile?",
        "The last lines are part of a",
        {"speech": " speech", "program": " program", "profile": " country profile"}[kind],
    )
    room = asked.room(length)
    rest = _code if kind == "speech" else _speech
    if kind == "profile":
        found = countries(split)
        country = found[int(rng.integers(len(found)))]
        last = _profile(tokenizer, rng, country, "", NEAR_TOKENS)
    else:
        own = _speech if kind == "speech" else _code
        last = own(tokenizer, rng, split, NEAR_TOKENS)
    body = rest(tokenizer, rng, split, room - len(last))
    return asked.sample(np.concatenate([body, last]))


FAR: dict[str, Task] = {
    "needle": Task(True, _hidden(_numbers(1), True)),
    "password": Task(True, _hidden(_words, True)),
    "multikey": Task(True, _hidden(_numbers(8), True)),
    "two-values": Task(True, _hidden(_two_values, True)),
    "table": Task(True, _hidden(_records, True)),
    "far-fact": Task(True, _fact(True)),
    "far-sentence": Task(True, _found(_speech, _sentence, True), tokens=True),
    "far-signature": Task(True, _found(_code, _signature, True), tokens=True),
}
NEAR: dict[str, Task] = {
    "near-needle": Task(False, _hidden(_numbers(1), False)),
    "near-table": Task(False, _hidden(_records, False)),
    "near-fact": Task(False, _fact(False)),
    "near-sentence": Task(False, _found(_speech, _sentence, False), tokens=True),
    "near-signature": Task(False, _found(_code, _signature, False), tokens=True),
    "shots": Task(False, _hidden(_shots, False)),
    "kind": Task(False, _kind),
    "next-line": Task(False, _next_line, tokens=True),
    "next-words": Task(False, _next_words, tokens=True),
}
TASKS: dict[str, Task] = FAR | NEAR
