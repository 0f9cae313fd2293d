"""Analyses of a model and its routers: numbers as rows, and a picture of each."""

from elasticore.eval.analysis.fidelity import HeadFidelity, head_fidelity
from elasticore.eval.analysis.frequency import (
    ALL_TASKS,
    frequency_rows,
    prompt_decisions,
    read_decisions,
    routing_frequency,
)
from elasticore.eval.analysis.retrieval import RetrievalScores, retrieval_scores
from elasticore.eval.analysis.rows import Row, write_csv
from elasticore.eval.analysis.runs import Point, read_points
from elasticore.eval.analysis.similarity import (
    Activations,
    router_activations,
    similarity_rows,
    task_similarity,
)
from elasticore.eval.analysis.sparsification import (
    Step,
    progressive_sparsification,
    ranked_table,
)

__all__ = [
    "ALL_TASKS",
    "Activations",
    "HeadFidelity",
    "Point",
    "RetrievalScores",
    "Row",
    "Step",
    "frequency_rows",
    "head_fidelity",
    "progressive_sparsification",
    "prompt_decisions",
    "ranked_table",
    "read_decisions",
    "read_points",
    "retrieval_scores",
    "router_activations",
    "routing_frequency",
    "similarity_rows",
    "task_similarity",
    "write_csv",
]
