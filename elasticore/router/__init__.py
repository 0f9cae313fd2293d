"""Routers: what decides, per input, the mode of every KV head."""

from elasticore.router.gates import (
    DuoGate,
    HardConcreteGate,
    StaticGate,
    head_scores,
    retrieval_only,
)
from elasticore.router.noise import checkpoint_contexts, gumbel, sample_gumbel, seed_noise
from elasticore.router.policies import (
    AllRetrieval,
    AllSparse,
    FixedPolicy,
    LayerShape,
    Modules,
    Policy,
    Router,
)
from elasticore.router.pooling import pool_boundary
from elasticore.router.registry import register_policy
from elasticore.router.router import AttentionRouter
from elasticore.router.routing import Routing, model_msr
from elasticore.router.sampling import SAMPLERS, GumbelSigmoid, GumbelSoftmax, Sampler
from elasticore.router.schedule import (
    TEMPERATURE_SCHEDULES,
    CosineTemperature,
    ExponentialTemperature,
    temperature_schedule,
)
from elasticore.router.tables import HeadTable, write_duo, write_prulong

__all__ = [
    "AttentionRouter",
    "Routing",
    "model_msr",
    "pool_boundary",
    "AllRetrieval",
    "AllSparse",
    "FixedPolicy",
    "LayerShape",
    "Modules",
    "Policy",
    "Router",
    "register_policy",
    "DuoGate",
    "HardConcreteGate",
    "StaticGate",
    "head_scores",
    "retrieval_only",
    "HeadTable",
    "write_duo",
    "write_prulong",
    "GumbelSigmoid",
    "GumbelSoftmax",
    "Sampler",
    "SAMPLERS",
    "checkpoint_contexts",
    "gumbel",
    "sample_gumbel",
    "seed_noise",
    "TEMPERATURE_SCHEDULES",
    "CosineTemperature",
    "ExponentialTemperature",
    "temperature_schedule",
]
