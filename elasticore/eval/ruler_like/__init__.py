"""RULER's thirteen tasks without a download: own texts by RULER's definitions.

The benchmark itself, from NVIDIA's own files, is :mod:`elasticore.eval.benchmarks.ruler`.
"""

from elasticore.eval.ruler_like.suite import (
    RULER_LIKE,
    RulerSample,
    RulerTask,
    make_ruler_sample,
)

__all__ = ["RULER_LIKE", "RulerSample", "RulerTask", "make_ruler_sample"]
