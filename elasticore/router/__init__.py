"""Routers: what decides, per input, the mode of every KV head."""

from elasticore.router.noise import checkpoint_contexts, gumbel, sample_gumbel
from elasticore.router.policies import (
    AllRetrieval,
    AllSparse,
    FixedPolicy,
    fixed_policies,
    random_head_table,
)
from elasticore.router.pooling import pool_boundary
from elasticore.router.router import AttentionRouter
from elasticore.router.routing import Routing, model_msr
from elasticore.router.sampling import GumbelSigmoid, GumbelSoftmax, Sampler
from elasticore.router.schedule import (
    TEMPERATURE_SCHEDULES,
    CosineTemperature,
    ExponentialTemperature,
    temperature_schedule,
)

__all__ = [
    "AttentionRouter",
    "Routing",
    "model_msr",
    "pool_boundary",
    "AllRetrieval",
    "AllSparse",
    "FixedPolicy",
    "fixed_policies",
    "random_head_table",
    "GumbelSigmoid",
    "GumbelSoftmax",
    "Sampler",
    "checkpoint_contexts",
    "gumbel",
    "sample_gumbel",
    "TEMPERATURE_SCHEDULES",
    "CosineTemperature",
    "ExponentialTemperature",
    "temperature_schedule",
]
