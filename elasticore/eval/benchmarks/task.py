"""A benchmark's task for lm-evaluation-harness: prompts and scores by the benchmark's own rules."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Sequence
from contextlib import redirect_stderr
from copy import deepcopy
from io import StringIO
from math import isnan, nan
from typing import Any

from lm_eval.api.group import Group
from lm_eval.api.instance import Instance
from lm_eval.api.task import Task, TaskConfig
from lm_eval.filters import build_filter_ensemble

from elasticore.eval.benchmarks.data import Row

__all__ = ["Average", "BenchmarkTask", "Rendered", "Tokenizer", "check_names", "percent"]

Tokenizer = Any  # any transformers tokenizer
Chat = Callable[..., str]
_FILTER = "none"  # the harness names every number "<metric>,<filter>"


def check_names(tasks: Sequence[str], known: Collection[str]) -> None:
    """Raise ``ValueError`` if one of `tasks` is not a known name."""
    unknown = [task for task in tasks if task not in known]
    if unknown:
        raise ValueError(f"tasks {unknown} are unknown; use any of {', '.join(known)}")


def percent(scores: Sequence[float | None]) -> float:
    """Mean of the scores that are there, times 100; nan if none is.

    Parameters
    ----------
    scores
        From 0 to 1; None marks a sample that the metric does not cover.
    """
    there = [score for score in scores if score is not None]
    return 100 * sum(there) / len(there) if there else nan


class Rendered(Instance):
    """A request whose prompt the chat template has written, special tokens and all."""


class BenchmarkTask(Task):
    """A task whose answers are generated greedily and scored one by one.

    Parameters
    ----------
    name
        The task's name in the harness.
    rows
        The samples.
    max_new_tokens
        Tokens to generate.
    settings
        More for `generate`.
    """

    OUTPUT_TYPE = "generate_until"
    VERSION = 1
    metrics: tuple[str, ...] = ()  # beside "score"
    rendered = False  # whether the chat template is in the rows' own prompts
    chat = True  # whether the prompt is a user's turn where the harness applies a chat template

    # The harness's constructor loads a data set from the hub and warns of settings that it lacks.
    def __init__(self, name: str, rows: list[Row], max_new_tokens: int, **settings: Any) -> None:
        self.rows = rows
        generation = {"until": [], "do_sample": False, "max_gen_toks": max_new_tokens, **settings}
        self._config = TaskConfig(task=name, generation_kwargs=generation, num_fewshot=0)
        self._instances = None
        self._filters = [build_filter_ensemble(_FILTER, [("take_first", None)])]

    # ---- What a benchmark says ----

    @abstractmethod
    def doc_to_text(self, doc: Row) -> str:
        """The prompt, before any chat template."""

    @abstractmethod
    def doc_to_target(self, doc: Row) -> list[str]:
        """The right answers."""

    @abstractmethod
    def score(self, prediction: str, doc: Row) -> dict[str, float]:
        """From 0 to 1: "score", and those of `metrics` that cover the sample."""

    def answer_prefix(self, doc: Row) -> str:
        """What the answer is made to begin with."""
        return ""

    # ---- What the harness asks ----

    def build_all_requests(self, **settings: Any) -> None:
        """As the harness does, without its bar per task: that of the answers is enough."""
        with redirect_stderr(StringIO()):
            super().build_all_requests(**settings)

    def fewshot_context(
        self,
        doc: Row,
        num_fewshot: int = 0,
        *,
        apply_chat_template: bool = False,
        chat_template: Chat | None = None,
        system_instruction: str | None = None,
        **_: Any,
    ) -> str:
        """The whole prompt. Where the benchmark has no user's turn, there is no system's either."""
        prompt = self.doc_to_text(doc)
        if apply_chat_template and chat_template and self.chat:
            turns = [{"role": "user", "content": prompt}]
            if system_instruction:
                turns.insert(0, {"role": "system", "content": system_instruction})
            prompt = chat_template(turns)
        return prompt + self.answer_prefix(doc)

    def construct_requests(self, doc: Row, ctx: str, **about: Any) -> Instance:
        """One request per sample."""
        arguments = (ctx, deepcopy(self.config.generation_kwargs))
        rendered = self.rendered or (self.chat and about.get("apply_chat_template"))
        kind = Rendered if rendered else Instance
        return kind("generate_until", doc, arguments, 0, metadata=about["metadata"])

    def process_results(self, doc: Row, results: list[str]) -> dict[str, float | None]:
        """Every metric for one sample; None where the sample is not of that part."""
        return {**dict.fromkeys(self.aggregation()), **self.score(results[0], doc)}

    def aggregation(self) -> dict[str, Callable[[Sequence[float | None]], float]]:
        """Per metric, how samples become one number."""
        return dict.fromkeys(("score", *self.metrics), percent)

    def higher_is_better(self) -> dict[str, bool]:
        """Per metric; all are scores."""
        return dict.fromkeys(self.aggregation(), True)

    def has_training_docs(self) -> bool:
        """No."""
        return False

    def has_validation_docs(self) -> bool:
        """No."""
        return False

    def has_test_docs(self) -> bool:
        """Yes."""
        return True

    def test_docs(self) -> list[Row]:
        """The samples."""
        return self.rows


class Average(Group):
    """A group whose numbers are the plain means of its children's, be they tasks or groups.

    The harness's own groups go down to the tasks, so that a category of three tasks would weigh
    more than one of two.
    """

    has_aggregation = True

    @classmethod
    def of(cls, name: str, children: Sequence[Task | Group]) -> Average:
        """A group of tasks or groups."""
        group = cls(name)
        for child in children:
            group.add(child)
        return group

    def aggregate(self, task_metrics: dict[str, Any]) -> dict[str, Any]:
        """Means over the children that have a number; the harness asks inner groups first."""
        children = [task_metrics[name] for name in self.child_names]
        means: dict[str, Any] = {"name": self.name, "alias": self.name}
        means["sample_len"] = sum(child["sample_len"] for child in children)
        for key in dict.fromkeys(key for child in children for key in child):
            metric, _, kind = key.partition(",")
            if kind == _FILTER and not metric.endswith("_stderr"):
                numbers = [child[key] for child in children if not isnan(child.get(key, nan))]
                means[key] = sum(numbers) / len(numbers) if numbers else nan
        return means
