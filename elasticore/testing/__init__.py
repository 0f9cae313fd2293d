"""The conformance suite: what any backend must pass, ours or a third party's.

Every case compares a backend with a dense-mask float64 computation that shares no code with it:
outputs, and the gradients of q, k, v and the gate. A case is one batch of three sequences of
different lengths, each routed differently, over each pair of the three lanes.

In a test file::

    @pytest.mark.parametrize("case", testing.matrix(), ids=str)
    def test_output(case):
        testing.check_output("mine", case, device="cuda")

or all at once: ``testing.check_backend("mine", device="cuda")``. From the command line, in several
processes and over every combination: ``python -m elasticore.testing mine``.
"""

from elasticore.testing.cases import Case, matrix
from elasticore.testing.checks import (
    check_backend,
    check_checkpointing,
    check_gradients,
    check_output,
    check_pages,
    check_repeatable,
    check_same_alone,
)
from elasticore.testing.paging import paged, run_paged
from elasticore.testing.problems import Problem, ScatteredBlocks, make_problem
from elasticore.testing.reference import attended, dense_attention
from elasticore.testing.structured import PlantedBlocks, planted_blocks

__all__ = [
    "Case",
    "PlantedBlocks",
    "Problem",
    "ScatteredBlocks",
    "attended",
    "check_backend",
    "check_checkpointing",
    "check_gradients",
    "check_output",
    "check_pages",
    "check_repeatable",
    "check_same_alone",
    "dense_attention",
    "make_problem",
    "matrix",
    "paged",
    "planted_blocks",
    "run_paged",
]
