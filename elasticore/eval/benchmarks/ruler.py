"""RULER: thirteen synthetic tasks at every length.

Hsieh et al., "RULER", COLM 2024; https://github.com/NVIDIA/RULER.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from elasticore.eval import metrics
from elasticore.eval.benchmarks import data
from elasticore.eval.benchmarks.task import Average, BenchmarkTask, Tokenizer, check_names

__all__ = ["RULER", "Ruler", "load_ruler"]


class Definition(NamedTuple):
    """How long the answers of a task may be, and how they are scored."""

    max_new_tokens: int
    metric: Callable[[str, Sequence[str]], float]


_NEEDLES = ("single_1", "single_2", "single_3", "multikey_1", "multikey_2", "multikey_3")
RULER = {
    **{
        f"niah_{kind}": Definition(128, metrics.contains_all)
        for kind in (*_NEEDLES, "multivalue", "multiquery")
    },
    "vt": Definition(30, metrics.contains_all),
    "cwe": Definition(120, metrics.contains_all),
    "fwe": Definition(50, metrics.contains_all),
    "qa_1": Definition(32, metrics.contains_any),
    "qa_2": Definition(32, metrics.contains_any),
}


FIELDS: data.Fields = {"input": str, "outputs": list[str], "answer_prefix": str | None}
"""Of a sample; those of older scripts have no prefix apart."""


class Ruler(BenchmarkTask):
    """One task at one length. Samples are made to fit, so nothing is cut.

    Parameters
    ----------
    task
        A key of `RULER`.
    length
        Tokens of prompt and answer.
    rows
        Its samples.
    """

    def __init__(self, task: str, length: int, rows: list[data.Row]) -> None:
        self.definition = RULER[task]
        super().__init__(f"ruler-{length}-{task}", rows, self.definition.max_new_tokens)

    def doc_to_text(self, doc: data.Row) -> str:
        """The sample's text."""
        prompt: str = doc["input"]
        return prompt

    def answer_prefix(self, doc: data.Row) -> str:
        """The words that keep a model from refusing."""
        return doc.get("answer_prefix") or ""

    def doc_to_target(self, doc: data.Row) -> list[str]:
        """What the answer should contain."""
        outputs: list[str] = doc["outputs"]
        return outputs

    def score(self, prediction: str, doc: data.Row) -> dict[str, float]:
        """Any of the outputs counts in the question tasks, the share of them in the others."""
        return {"score": self.definition.metric(prediction, doc["outputs"])}


def load_ruler(
    tokenizer: Tokenizer,
    lengths: Sequence[int],
    folder: str | Path | None = None,
    tasks: Sequence[str] = tuple(RULER),
) -> list[Average]:
    """The benchmark: one group per length, the mean of its tasks.

    Parameters
    ----------
    tokenizer
        The model's; the last part of its `name_or_path` names the folder of its samples.
    lengths
        In tokens, as 8192.
    folder
        Of the data; see :func:`elasticore.eval.benchmarks.data.ruler`.
    tasks
        Which of the thirteen.

    Raises
    ------
    ValueError
        If a task is unknown, or a file is damaged.
    FileNotFoundError
        If data are missing.
    """
    check_names(tasks, RULER)
    name = Path(tokenizer.name_or_path).name
    return [
        Average.of(
            f"ruler-{length}",
            [Ruler(task, length, data.ruler(task, length, name, folder, FIELDS)) for task in tasks],
        )
        for length in lengths
    ]
