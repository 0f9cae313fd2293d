"""LongBench-E: thirteen tasks of six categories, with as many short samples as long ones.

Bai et al., "LongBench", ACL 2024; https://github.com/THUDM/LongBench.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from elasticore.eval import metrics
from elasticore.eval.benchmarks import data
from elasticore.eval.benchmarks.prompts import prompts
from elasticore.eval.benchmarks.task import Average, BenchmarkTask, Tokenizer, check_names
from elasticore.eval.benchmarks.truncation import cut_middle

__all__ = ["BUCKETS", "CATEGORIES", "LONGBENCH_E", "LongBenchE", "bucket", "load_longbench_e"]


class Definition(NamedTuple):
    """One task as its authors define it.

    Attributes
    ----------
    category
        What the authors group it under.
    metric
        Takes the answer and the references; `classification` the classes, too.
    max_new_tokens
        Tokens to generate.
    few_shot
        Whether only the first line of the answer counts.
    chat
        Whether a chat template is applied: not to few-shot prompts and code, which go on as they
        have begun.
    """

    category: str
    metric: Callable[..., float]
    max_new_tokens: int
    few_shot: bool = False
    chat: bool = True


CATEGORIES = ("single-doc-qa", "multi-doc-qa", "summarization", "few-shot", "synthetic", "code")
_SINGLE, _MULTI, _SUMMARIES, _FEW_SHOT, _SYNTHETIC, _CODE = CATEGORIES
LONGBENCH_E = {
    "qasper": Definition(_SINGLE, metrics.qa_f1, 128),
    "multifieldqa_en": Definition(_SINGLE, metrics.qa_f1, 64),
    "hotpotqa": Definition(_MULTI, metrics.qa_f1, 32),
    "2wikimqa": Definition(_MULTI, metrics.qa_f1, 32),
    "gov_report": Definition(_SUMMARIES, metrics.rouge_l, 512),
    "multi_news": Definition(_SUMMARIES, metrics.rouge_l, 512),
    "trec": Definition(_FEW_SHOT, metrics.classification, 64, few_shot=True, chat=False),
    "triviaqa": Definition(_FEW_SHOT, metrics.qa_f1, 32, few_shot=True, chat=False),
    "samsum": Definition(_FEW_SHOT, metrics.rouge_l, 128, few_shot=True, chat=False),
    "passage_count": Definition(_SYNTHETIC, metrics.count, 32),
    "passage_retrieval_en": Definition(_SYNTHETIC, metrics.retrieval, 32),
    "lcc": Definition(_CODE, metrics.edit_similarity, 64, chat=False),
    "repobench-p": Definition(_CODE, metrics.edit_similarity, 64, chat=False),
}
BUCKETS = ("0-4k", "4-8k", "8k+")


FIELDS: data.Fields = {
    "context": str,
    "input": str | None,  # empty where the prompt itself asks
    "answers": list[str],
    "length": int,
    "all_classes": list[str] | None,
}
"""Of a sample."""


def bucket(length: int) -> str:
    """The bucket of a sample, by the words that its data set counts: below 4000, 8000, or more."""
    return BUCKETS[(length >= 4000) + (length >= 8000)]


class LongBenchE(BenchmarkTask):
    """One of the thirteen tasks.

    Parameters
    ----------
    task
        A key of `LONGBENCH_E`.
    rows
        Its samples.
    tokenizer
        The model's.
    limit
        Tokens that a prompt may have before the chat template; the middle of longer ones is cut.
    """

    metrics = BUCKETS

    def __init__(self, task: str, rows: list[data.Row], tokenizer: Tokenizer, limit: int) -> None:
        self.definition = LONGBENCH_E[task]
        self.chat = self.definition.chat
        self.prompt, self.tokenizer, self.limit = prompts("longbench-e")[task], tokenizer, limit
        settings: dict[str, Any] = {}
        if task == "samsum":  # the only one with a stop: a line break, but not as the first token
            line_break = tokenizer.encode("\n", add_special_tokens=False)[-1]
            settings = {"eos_token_id": [tokenizer.eos_token_id, line_break], "min_new_tokens": 1}
        super().__init__(f"longbench-e-{task}", rows, self.definition.max_new_tokens, **settings)

    def doc_to_text(self, doc: data.Row) -> str:
        """The benchmark's prompt, cut to the limit."""
        prompt = self.prompt.format(**doc)
        return cut_middle(self.tokenizer, prompt, self.limit, decode_once=False)

    def doc_to_target(self, doc: data.Row) -> list[str]:
        """All answers that count as right."""
        answers: list[str] = doc["answers"]
        return answers

    def score(self, prediction: str, doc: data.Row) -> dict[str, float]:
        """By the task's metric, overall and in the sample's bucket."""
        if self.definition.few_shot:
            prediction = metrics.first_line(prediction)
        metric = self.definition.metric
        classes = (doc["all_classes"],) if metric is metrics.classification else ()
        score = metric(prediction, doc["answers"], *classes)
        return {"score": score, bucket(doc["length"]): score}


def load_longbench_e(
    tokenizer: Tokenizer,
    limit: int,
    folder: str | Path | None = None,
    tasks: Sequence[str] = tuple(LONGBENCH_E),
) -> Average:
    """The benchmark: the mean over categories, each the mean of its tasks.

    Parameters
    ----------
    tokenizer, limit
        See :class:`LongBenchE`.
    folder
        Of the data; see :func:`elasticore.eval.benchmarks.data.longbench_e`.
    tasks
        Which of the thirteen.

    Raises
    ------
    ValueError
        If a task is unknown, or a file is damaged.
    FileNotFoundError
        If data are missing.
    """
    check_names(tasks, LONGBENCH_E)
    built = {
        task: LongBenchE(task, data.longbench_e(task, folder, FIELDS), tokenizer, limit)
        for task in tasks
    }
    groups = []
    for category in CATEGORIES:
        members = [built[task] for task in built if LONGBENCH_E[task].category == category]
        if members:
            groups.append(Average.of(f"longbench-e-{category}", members))
    return Average.of("longbench-e", groups)
