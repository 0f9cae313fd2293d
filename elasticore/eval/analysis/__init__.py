"""Analyses of a model and its routers: numbers as rows, and a picture of each."""

from elasticore.eval.analysis.frequency import ALL_TASKS, frequency_rows, routing_frequency
from elasticore.eval.analysis.retrieval import RetrievalScores, retrieval_scores
from elasticore.eval.analysis.rows import Row, write_csv
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
    "RetrievalScores",
    "Row",
    "Step",
    "frequency_rows",
    "progressive_sparsification",
    "ranked_table",
    "retrieval_scores",
    "router_activations",
    "routing_frequency",
    "similarity_rows",
    "task_similarity",
    "write_csv",
]
