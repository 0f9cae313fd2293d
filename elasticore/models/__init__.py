"""Hugging Face models made elastic."""
