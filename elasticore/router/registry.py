"""Policies by name, so that a file can say which one a model runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from elasticore.registry import Registry
from elasticore.router.policies import Modules, Policy

__all__ = ["POLICIES", "policy_from_dict", "policy_to_dict", "register_policy"]

POLICIES: Registry[Policy] = Registry(
    "policy",
    Policy,  # type: ignore[type-abstract]
    "elasticore.policies",
    {
        "router": "elasticore.router.policies:Router",
        "head-table": "elasticore.router.tables:HeadTable",
        "all-sparse": "elasticore.router.policies:AllSparse",
        "all-retrieval": "elasticore.router.policies:AllRetrieval",
    },
)
"""Every policy that a file can name."""


def register_policy(name: str, cls: type[Policy]) -> None:
    """Make a policy known to files under ``name``.

    A package can do the same without being imported, by an entry point in the group
    ``elasticore.policies``.

    Raises
    ------
    TypeError, ValueError
        If it is no :class:`Policy`, or the name is taken by another class.
    """
    POLICIES.register(name, cls)


def policy_to_dict(policy: Policy) -> dict[str, Any]:
    """``{"name": ..., settings...}`` of a policy whose class has a name.

    Raises
    ------
    ValueError
        If it has none.
    """
    if isinstance(policy, Modules):
        policy.tensors()  # says why it cannot be saved
    return {"name": POLICIES.name_of(type(policy)), **policy.settings()}


def policy_from_dict(data: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Policy:
    """The policy that :func:`policy_to_dict` wrote, with its tensors.

    Raises
    ------
    ValueError
        If its name is unknown, its package cannot be loaded, or it does not take the rest.
    """
    settings = dict(data)
    name = settings.pop("name", None)
    cls = POLICIES.named(name)
    try:
        return cls.restored(settings, tensors)
    except (TypeError, ValueError) as error:
        raise ValueError(f"policy {name!r} does not take these settings: {error}.") from None
