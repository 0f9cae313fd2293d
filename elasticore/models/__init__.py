"""Hugging Face models made elastic."""

from elasticore.requirements import check_packages

# Before any module here imports them: what is too old fails in some way that tells nobody why.
check_packages("torch", "transformers", "safetensors", "numpy")
