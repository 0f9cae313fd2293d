"""Evaluation: offline tasks, scores with the sparsity beside them, pictures."""
