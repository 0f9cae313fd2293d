"""lm-evaluation-harness asks a server of ours the questions of a suite; Ω beside the scores.

The server is one that ``make serve-demo`` or a user has started; what is asked and how it is scored
is the same as in ``elasticore eval``. It needs no vLLM itself.
"""

from __future__ import annotations

import argparse
import json
import urllib.request
from typing import Any

from lm_eval.evaluator import evaluate
from lm_eval.models.openai_completions import LocalCompletionsAPI
from lm_eval.tasks import TaskManager
from rich.console import Console
from rich.table import Table

from elasticore.data.prompting import prompt_tokens
from elasticore.eval.evaluate import Evaluation
from elasticore.eval.suites import load_suites
from elasticore.models.loading import load_tokenizer
from recipes.serving.server import metric

EXAMPLE = (
    "example: python -m recipes.serving.evaluate --url http://127.0.0.1:8000 --name model "
    "--model smollm2 --task ruler-like:niah_single_2 --task ruler-like:vt --samples 10"
)


class Served(LocalCompletionsAPI):
    """A server's model, asked with the very tokens that ``elasticore eval`` asks with."""

    def tok_encode(self, string: str | list[str], *args: Any, **kwargs: Any) -> Any:
        """Tokens of a prompt, or of each of several."""
        if isinstance(string, str):
            return prompt_tokens(self.tokenizer, string)
        return [prompt_tokens(self.tokenizer, one) for one in string]


def decided(url: str) -> tuple[float, float]:
    """How many prompts the server has decided for, and the sum of their shares of sparse heads."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        text = answer.read().decode()
    names = ("elasticore_sparse_share_count", "elasticore_sparse_share_sum")
    count, total = (metric(text, name) for name in names)
    return count, total


def run(
    url: str, name: str, evaluation: Evaluation, *, positions: int, at_once: int = 8
) -> list[dict[str, Any]]:
    """Score, prompts and mean Ω_MSR (None if the server does not say) of every task.

    Parameters
    ----------
    url, name
        Where the server is, and what it calls its model.
    evaluation
        The tasks, their lengths and the number of samples; ``model`` names the tokenizer.
    positions
        Tokens that the server takes.
    at_once
        Requests at a time.
    """
    tokenizer = load_tokenizer(evaluation.model)
    lm = Served(
        base_url=f"{url}/v1/completions",
        model=name,
        tokenizer=tokenizer.name_or_path,
        tokenizer_backend="huggingface",
        num_concurrent=at_once,
        max_length=positions,
        timeout=3600,
    )
    rows = []
    for task in evaluation.tasks:  # one after the other, so that Ω can be told apart
        one = Evaluation(
            evaluation.model, (task,), lengths=evaluation.lengths, samples=evaluation.samples
        )
        before = decided(url)
        found: Any = evaluate(
            lm,
            TaskManager(include_defaults=False).load(load_suites(one, tokenizer, positions)),
            limit=evaluation.samples,
            bootstrap_iters=0,
        )
        count, total = (now - then for now, then in zip(decided(url), before, strict=True))
        scores = [own["score,none"] for own in found["results"].values() if "score,none" in own]
        rows.append(
            {
                "task": task,
                "score": round(sum(scores) / len(scores), 2),
                "prompts": sum(map(len, found["samples"].values())),
                "msr": round(total / count, 4) if count else None,
            }
        )
    return rows


def main() -> None:
    """Ask, show."""
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLE)
    parser.add_argument("--url", required=True, help="of the server, without /v1")
    parser.add_argument("--name", default="model", help="what the server calls its model")
    parser.add_argument("--model", default="smollm2", help="the backbone, for its tokenizer")
    parser.add_argument("--task", action="append", required=True, help="as elasticore eval's")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a prompt")
    parser.add_argument("--samples", type=int, default=20, help="of each task")
    parser.add_argument("--at-once", type=int, default=8, help="requests at a time")
    parser.add_argument("--json", action="store_true", help="print JSON on standard output")
    options = parser.parse_args()
    evaluation = Evaluation(
        options.model, tuple(options.task), lengths=(options.length,), samples=options.samples
    )
    rows = run(
        options.url, options.name, evaluation, positions=options.length + 512,
        at_once=options.at_once,
    )  # fmt: skip
    if options.json:
        print(json.dumps(rows, indent=2))
        return
    table = Table("task", "score (%)", "prompts", "sparse heads")
    for row in rows:
        share = "–" if row["msr"] is None else f"{100 * row['msr']:.1f} %"
        table.add_row(row["task"], f"{row['score']:.1f}", str(row["prompts"]), share)
    Console().print(table)


if __name__ == "__main__":
    main()
