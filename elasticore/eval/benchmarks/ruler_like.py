"""Tasks like RULER's, made here from text that every Python has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from elasticore.eval.benchmarks.data import Row
from elasticore.eval.benchmarks.task import Average, BenchmarkTask, Tokenizer
from elasticore.eval.ruler_like import RULER_LIKE, make_ruler_sample

__all__ = ["RulerLike", "load_ruler_like"]


class RulerLike(BenchmarkTask):
    """One task of ``elasticore.eval.ruler_like.RULER_LIKE`` at one length.

    Parameters
    ----------
    task
        Its name.
    length
        Tokens of prompt and answer.
    rows
        ``prompt`` and ``references``.
    rendered
        Whether the chat template has written the prompts.
    """

    chat = False  # the sample's own text has the template in it

    def __init__(self, task: str, length: int, rows: list[Row], rendered: bool) -> None:
        self.task, self.rendered = RULER_LIKE[task], rendered
        super().__init__(f"ruler-like-{length}-{task}", rows, self.task.tokens)

    def doc_to_text(self, doc: Row) -> str:
        """The sample's text."""
        prompt: str = doc["prompt"]
        return prompt

    def doc_to_target(self, doc: Row) -> list[str]:
        """What the answer should contain."""
        references: list[str] = doc["references"]
        return references

    def score(self, prediction: str, doc: Row) -> dict[str, float]:
        """The share of the references that the answer contains, or whether it has any."""
        return {"score": self.task.metric(prediction, doc["references"])}


def load_ruler_like(
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    samples: int,
    seed: int = 0,
    tasks: Sequence[str] = tuple(RULER_LIKE),
    template: Mapping[str, Any] | None = None,
) -> list[Average]:
    """The suite: one group per length, the mean of its tasks.

    Parameters
    ----------
    tokenizer
        The model's.
    lengths
        In tokens.
    samples
        Of each task and length.
    seed
        Of the first sample; the others follow.
    tasks
        Which of the thirteen.
    template
        See :func:`~elasticore.eval.ruler_like.make_ruler_sample`.

    Raises
    ------
    ValueError
        If a task is unknown or a length too short for it.
    """

    def rows(task: str, length: int) -> list[Row]:
        made = [
            make_ruler_sample(task, tokenizer, length, seed + i, template=template)
            for i in range(samples)
        ]
        return [
            {"prompt": _text(tokenizer, one), "references": list(one.references)} for one in made
        ]

    rendered = template is not None
    return [
        Average.of(
            f"ruler-like-{length}",
            [RulerLike(task, length, rows(task, length), rendered) for task in tasks],
        )
        for length in lengths
    ]


def _text(tokenizer: Tokenizer, sample: Any) -> str:
    text: str = tokenizer.decode(sample.input_ids[: sample.start].tolist())
    return text
