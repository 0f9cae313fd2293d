"""Evaluation: tasks, methods, benchmarks, and scores with the sparsity beside them."""
