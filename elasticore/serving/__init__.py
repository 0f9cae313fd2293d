"""Elastic attention in servers of other projects."""
