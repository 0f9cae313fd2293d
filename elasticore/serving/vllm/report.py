"""What was decided, for people: in vLLM's log, and beside vLLM's metrics."""

from __future__ import annotations

import functools
import logging

from prometheus_client import Counter, Histogram
from vllm.logger import init_logger

from elasticore.serving.vllm.decisions import Decisions
from elasticore.serving.vllm.step import Step

__all__ = ["Report"]

logger = init_logger("vllm.elasticore")  # of vLLM's loggers, so that its settings hold


class Report:
    """Says of every prompt what share of the heads is sparse, in the layers that share a cache.

    The metrics ``elasticore_sparse_share`` (a histogram of Ω_MSR) and
    ``elasticore_prompt_tokens`` are counted in the engine's own process. vLLM's ``/metrics`` shows
    them if the server was started with ``PROMETHEUS_MULTIPROC_DIR``, the directory through which
    prometheus_client brings processes together.

    Parameters
    ----------
    loud
        Whether to log at level INFO; else at DEBUG.
    """

    def __init__(self, loud: bool) -> None:
        self._level = logging.INFO if loud else logging.DEBUG
        self._share, self._tokens = _metrics()

    def __call__(self, step: Step, decisions: Decisions) -> None:
        """Report the prompts that end in a step, once all layers have decided."""
        rows = list(step.ended)
        for row, share in zip(rows, decisions.share(step.page[rows]).tolist(), strict=True):
            self._share.observe(share)
            self._tokens.inc(step.lengths[row])
            if logger.isEnabledFor(self._level):
                logger.log(
                    self._level,
                    "elasticore: a prompt of %d tokens, %.1f %% of its heads sparse.",
                    step.lengths[row],
                    100 * share,
                )


@functools.cache  # a process has each of them once
def _metrics() -> tuple[Histogram, Counter]:
    share = Histogram(
        "elasticore_sparse_share",
        "Share of sparse heads that was decided for a prompt.",
        buckets=[i / 20 for i in range(21)],
    )
    return share, Counter("elasticore_prompt_tokens", "Tokens of prompts that were routed.")
