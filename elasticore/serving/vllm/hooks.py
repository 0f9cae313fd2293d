"""Where vLLM lets a plug-in in: the configuration of every model, and the attention on CPUs.

Nothing of ours is imported for a model without settings of ours.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import ModelRegistry
from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
from vllm.platforms import current_platform

from elasticore.serving.vllm.settings import SECTION

__all__ = ["install"]


def install() -> None:
    """Let every architecture's configuration pass by us, and offer the backend."""
    for name in {*ModelRegistry.get_supported_archs(), *MODELS_CONFIG_MAP}:
        hook = MODELS_CONFIG_MAP.get(name, VerifyAndUpdateConfig)
        if not hasattr(hook, SECTION):
            MODELS_CONFIG_MAP[name] = _followed(hook)
    if current_platform.is_cpu():
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

        register_backend(AttentionBackendEnum.CPU_ATTN, "elasticore.serving.vllm.cpu.Backend")


def _followed(hook: type[VerifyAndUpdateConfig]) -> type[VerifyAndUpdateConfig]:
    """A hook, followed by ours."""

    class Hook(hook):
        """What vLLM does for an architecture, and then ours."""

        @staticmethod
        def verify_and_update_config(vllm_config: Any) -> None:
            hook.verify_and_update_config(vllm_config)
            if SECTION in (vllm_config.additional_config or ()):
                from elasticore.serving.vllm.startup import configure

                configure(vllm_config)

    setattr(Hook, SECTION, True)
    return Hook
