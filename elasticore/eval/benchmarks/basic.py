"""Five basic tasks at any length: three that retrieve, two that continue a real text."""

from __future__ import annotations

from collections.abc import Sequence
from difflib import SequenceMatcher

from elasticore.data.prompting import first_tokens
from elasticore.eval.benchmarks.data import Row
from elasticore.eval.benchmarks.task import Average, BenchmarkTask, Tokenizer, check_names
from elasticore.eval.metrics import contains_all
from elasticore.eval.tasks import TASKS, make_sample

__all__ = ["Basic", "load_basic"]

MAX_NEW_TOKENS = 32
SHORTEST = 256
_PREFIX = "\nAnswer:"


class Basic(BenchmarkTask):
    """One task of :data:`~elasticore.eval.tasks.TASKS` at one length.

    Retrieval scores 1 if the answer contains the number that was asked for; ``exact`` also wants
    it to begin with the expected words. A continuation scores its similarity to the true one:
    twice the characters that both have in the same order over the characters of both (`difflib`).

    Parameters
    ----------
    task
        Its name.
    length
        Tokens of prompt and answer.
    rows
        ``prompt``, ``prefix`` and ``answer``.
    """

    def __init__(self, task: str, length: int, rows: list[Row]) -> None:
        self.retrieves = TASKS[task].sensitive
        self.chat = self.retrieves  # a text goes on as it has begun
        self.metrics = ("exact",) if self.retrieves else ()
        super().__init__(f"basic-{length}-{task}", rows, MAX_NEW_TOKENS)

    def doc_to_text(self, doc: Row) -> str:
        """The sample's text, with its question."""
        prompt: str = doc["prompt"]
        return prompt

    def answer_prefix(self, doc: Row) -> str:
        """How the answer begins."""
        prefix: str = doc["prefix"]
        return prefix

    def doc_to_target(self, doc: Row) -> list[str]:
        """The expected answer."""
        return [doc["answer"]]

    def score(self, prediction: str, doc: Row) -> dict[str, float]:
        """By the number and the words, or by similarity."""
        said, wanted = prediction.strip(), doc["answer"].strip()
        if not self.retrieves:
            return {"score": SequenceMatcher(None, said, wanted, autojunk=False).ratio()}
        found = contains_all(said, [wanted.split()[-1]])
        return {"score": found, "exact": float(said.startswith(wanted))}


def load_basic(
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    tasks: Sequence[str] = tuple(TASKS),
) -> list[Average]:
    """The tasks, held out: per length a group of those that retrieve and one of the others.

    Parameters
    ----------
    tokenizer
        The model's.
    lengths
        Tokens of prompt and answer, without a chat template.
    samples
        Of each task and length.
    seed
        Of the first sample; the others follow.
    tasks
        Which of the five.

    Raises
    ------
    ValueError
        If a task is unknown or a length too short.
    """
    check_names(tasks, TASKS)
    short = [length for length in lengths if length < SHORTEST]
    if short:
        raise ValueError(f"lengths {short} are too short for the basic tasks; use {SHORTEST} up.")
    groups, numbers = [], range(samples)
    for length in lengths:
        made = {
            task: Basic(task, length, [_row(task, tokenizer, length, seed + i) for i in numbers])
            for task in tasks
        }
        for kind, retrieves in (("retrieval", True), ("text", False)):
            members = [one for one in made.values() if one.retrieves == retrieves]
            if members:
                groups.append(Average.of(f"basic-{length}-{kind}", members))
    return groups


def _row(task: str, tokenizer: Tokenizer, length: int, seed: int) -> Row:
    retrieves = TASKS[task].sensitive
    # A continuation leaves room for more tokens than are generated; an answer is a short one.
    sample = make_sample(task, tokenizer, length - MAX_NEW_TOKENS * retrieves, seed)
    begin = len(first_tokens(tokenizer))  # which are no text; who asks puts them there
    text = tokenizer.decode(sample.input_ids[begin : sample.start].tolist())
    if retrieves:
        at = text.rindex(_PREFIX)
        return {"prompt": text[:at], "prefix": text[at:], "answer": sample.answer}
    shown = sample.input_ids[sample.start : sample.start + MAX_NEW_TOKENS]
    return {"prompt": text, "prefix": "", "answer": tokenizer.decode(shown.tolist())}
