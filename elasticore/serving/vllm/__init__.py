"""Elastic attention in vLLM: a plug-in, which vLLM loads in each of its processes.

It does nothing unless vLLM is started with settings for it::

    vllm serve MODEL --additional-config '{"elasticore": {"router": "NAME or DIRECTORY"}}'

vLLM is imported by the modules of this package only.
"""

from __future__ import annotations

__all__ = ["register"]


def register() -> None:
    """Let vLLM ask for settings of ours; called by vLLM, any number of times."""
    from elasticore.serving.vllm.hooks import install

    install()
