"""RULER, LongBench-E and LongBench-v2 as tasks for lm-evaluation-harness.

Pass what the functions here return to `lm_eval.simple_evaluate(tasks=[...])`.
"""

from elasticore.eval.benchmarks.longbench_e import load_longbench_e
from elasticore.eval.benchmarks.longbench_v2 import load_longbench_v2
from elasticore.eval.benchmarks.ruler import load_ruler

__all__ = ["load_longbench_e", "load_longbench_v2", "load_ruler"]
