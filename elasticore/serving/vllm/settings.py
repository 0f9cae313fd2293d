"""What a user asks for: the section ``elasticore`` of vLLM's ``--additional-config``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from elasticore.models.elastic import Elastic

__all__ = ["SECTION", "Settings", "reads_prompts"]

SECTION = "elasticore"


@dataclass(frozen=True)
class Settings:
    """How a served model attends.

    Parameters
    ----------
    router
        What :meth:`Elastic.load <elasticore.Elastic.load>` takes: the name of routers that ship
        with the package, a directory, or a hub id.
    prefill
        ``"full"``: prompts are read by all heads in full, in any chunks, and cached prefixes are
        shared; what was decided counts from the first token that is generated. ``"routed"``: every
        head reads its pattern in the prompt too; where routers decide from the prompt, it has to
        come whole and is not shared. None: ``"full"``, but ``"routed"`` if no router reads the
        prompt, as with tables of heads, or if answers are read in full (``decode="full"``).
    check_base
        Whether the served model must be the very one that the routers were trained for.
    log_requests
        Whether Ω of every prompt is logged at level INFO; else at DEBUG.

    Raises
    ------
    TypeError, ValueError
        If a setting is wrong, or there is no such router.
    """

    router: str
    prefill: Literal["routed", "full"] | None = None
    check_base: bool = True
    log_requests: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.router, str) or not self.router:
            raise TypeError(f"router must be a name or a directory, got {self.router!r}.")
        if self.prefill not in ("routed", "full", None):
            raise ValueError(f"prefill must be routed or full, got {self.prefill!r}.")
        for name in ("check_base", "log_requests"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be true or false, got {getattr(self, name)!r}.")

    @classmethod
    def of(cls, additional_config: Any) -> Settings | None:
        """The settings in vLLM's ``additional_config``; None if there are none.

        Raises
        ------
        TypeError, ValueError
            If the section is no mapping, has unknown settings or lacks the router.
        """
        if not isinstance(additional_config, Mapping) or SECTION not in additional_config:
            return None
        given = additional_config[SECTION]
        known = [field.name for field in dataclasses.fields(cls)]
        if not isinstance(given, Mapping):
            raise TypeError(
                f'must be settings such as {{"router": "smollm2"}}, got {given!r}; there are: '
                f"{', '.join(known)}."
            )
        unknown = sorted(set(given) - set(known))
        if unknown or "router" not in given:
            wrong = f"has unknown {', '.join(unknown)}" if unknown else "lacks router"
            raise ValueError(f"{wrong}; there are: {', '.join(known)}.")
        return cls(**given)

    def way(self) -> Elastic:
        """The way to attend that the router names, with its prompts read as asked for.

        Raises
        ------
        RouterNotFound, ValueError
            As :meth:`Elastic.load <elasticore.Elastic.load>` does; or if its routers are not
            trained, or nothing would ever be sparse.
        """
        from elasticore.models.elastic import Elastic
        from elasticore.router.policies import Router

        way = Elastic.load(self.router)
        if isinstance(way.policy, Router) and way.policy.weights is None:
            raise ValueError(f"router {self.router} has no trained weights; name one that has.")
        prefill = self.prefill
        if prefill is None:
            prefill = "full" if reads_prompts(way) and way.decode == "routed" else "routed"
        if prefill == way.decode == "full":
            raise ValueError(
                f"router {self.router} reads answers in full, so with prefill full nothing would "
                "be sparse; leave prefill out, or set it to routed."
            )
        return dataclasses.replace(way, prefill=prefill)


def reads_prompts(way: Elastic) -> bool:
    """Whether a policy decides from the prompt."""
    from elasticore.router.policies import AllRetrieval, AllSparse
    from elasticore.router.tables import HeadTable

    return not isinstance(way.policy, (AllRetrieval, AllSparse, HeadTable))
