"""LongBench-v2: 503 questions of four choices, answered in words, without examples or reasoning.

Bai et al., "LongBench v2", ACL 2025; https://github.com/THUDM/LongBench.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from elasticore.eval import metrics
from elasticore.eval.benchmarks import data
from elasticore.eval.benchmarks.prompts import prompts
from elasticore.eval.benchmarks.task import BenchmarkTask, Tokenizer
from elasticore.eval.benchmarks.truncation import cut_middle

__all__ = ["DIFFICULTIES", "DOMAINS", "LENGTHS", "LongBenchV2", "load_longbench_v2"]

MAX_NEW_TOKENS = 128
DIFFICULTIES = ("easy", "hard")
LENGTHS = ("short", "medium", "long")
DOMAINS = (
    "Single-Document QA",
    "Multi-Document QA",
    "Long In-context Learning",
    "Long-dialogue History Understanding",
    "Code Repository Understanding",
    "Long Structured Data Understanding",
)
_FIELDS = {
    "$DOC$": "context",
    "$Q$": "question",
    "$C_A$": "choice_A",
    "$C_B$": "choice_B",
    "$C_C$": "choice_C",
    "$C_D$": "choice_D",
}
FIELDS: data.Fields = {
    **dict.fromkeys(_FIELDS.values(), str),
    "answer": Literal["A", "B", "C", "D"],
    "difficulty": Literal[DIFFICULTIES],
    "length": Literal[LENGTHS],
    "domain": Literal[DOMAINS],
}
"""Of a sample."""


class LongBenchV2(BenchmarkTask):
    """The zero-shot setting. "answered" is the share of answers in the agreed form.

    Parameters
    ----------
    rows
        The samples.
    tokenizer
        The model's.
    limit
        Tokens that a prompt may have before the chat template; the middle of longer ones is cut.
    """

    metrics = (*DIFFICULTIES, *LENGTHS, *DOMAINS, "answered")

    def __init__(self, rows: list[data.Row], tokenizer: Tokenizer, limit: int) -> None:
        self.prompt, self.tokenizer, self.limit = prompts("longbench-v2")["0shot"], tokenizer, limit
        super().__init__("longbench-v2", rows, MAX_NEW_TOKENS)

    def doc_to_text(self, doc: data.Row) -> str:
        """The benchmark's prompt, cut to the limit."""
        prompt = self.prompt
        for mark, field in _FIELDS.items():
            prompt = prompt.replace(mark, doc[field].strip())
        return cut_middle(self.tokenizer, prompt, self.limit, decode_once=True)

    def doc_to_target(self, doc: data.Row) -> list[str]:
        """The right letter."""
        return [doc["answer"]]

    def score(self, prediction: str, doc: data.Row) -> dict[str, float]:
        """1 for the right letter; no letter is a wrong one."""
        letter = metrics.choice(prediction)
        right = float(letter == doc["answer"])
        kinds = ("score", doc["difficulty"], doc["length"], doc["domain"])
        return {**dict.fromkeys(kinds, right), "answered": float(letter is not None)}


def load_longbench_v2(
    tokenizer: Tokenizer, limit: int, folder: str | Path | None = None
) -> LongBenchV2:
    """The benchmark.

    Parameters
    ----------
    tokenizer, limit
        See :class:`LongBenchV2`.
    folder
        Of the data; see :func:`elasticore.eval.benchmarks.data.longbench_v2`.

    Raises
    ------
    FileNotFoundError, ValueError
        If data are missing or damaged.
    """
    return LongBenchV2(data.longbench_v2(folder, FIELDS), tokenizer, limit)
