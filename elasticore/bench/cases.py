"""What a benchmark is made of: a case, the work it stands for, and the engines that do it."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch

from elasticore.attention import Verdict

__all__ = ["SUITES", "Case", "Engine", "Ready", "Work", "case_type", "cases_of", "tokens"]


class Ready(NamedTuple):
    """An engine that is prepared for one piece of work.

    Attributes
    ----------
    call
        Does the work once and returns its output.
    plan_ms
        Time that was spent on what is done once per routing or input, not once per call.
    close
        Gives back what the preparation took.
    details
        What else there is to know about the work it does, by name.
    """

    call: Callable[[], Any]
    plan_ms: float | None = None
    close: Callable[[], None] = lambda: None
    details: Mapping[str, Any] = {}


class Work(ABC):
    """The tensors of a case on a device, and what is right.

    Attributes
    ----------
    flops
        Floating-point operations that the work needs, of useful query-key pairs only; or None.
    bytes
        Bytes that it must read and write; or None.
    tolerance
        The largest difference that counts as the same output.
    """

    flops: float | None = None
    bytes: float | None = None
    tolerance: float = 0.0

    @abstractmethod
    def difference(self, out: Any) -> float | None:
        """How far an engine's output is from the reference; None where there is none."""


class Engine(ABC):
    """Somebody who can do the work of a suite's cases.

    Attributes
    ----------
    name
        As it is shown, and as ``--engine`` takes it.
    peer
        Whether the others are compared with it: another project's engine, or a definition.
    """

    name: str
    peer: bool = True

    def __str__(self) -> str:
        return self.name

    @abstractmethod
    def available(self, case: Any, device: torch.device) -> Verdict:
        """Whether it can do ``case`` on this machine, decided without any data."""

    def left_out(self, case: Any, device: torch.device) -> str:
        """Why it does ``case`` only if it is asked for by name; empty if it always does."""
        return ""

    @abstractmethod
    def prepare(self, work: Any) -> Ready:
        """Do everything that precedes the timed call.

        Raises
        ------
        UnsupportedRequest
            If it cannot do this work; the message says why.
        """


@dataclass(frozen=True)
class Case(ABC):
    """One piece of work.

    Parameters
    ----------
    family
        Cases of one family differ in length and share only.
    length
        Tokens.
    share
        Share of the KV heads that are sparse; None where that does not apply.
    """

    suite: ClassVar[str]
    unit: ClassVar[str] = "ms"
    """What the bars of a picture show: ``"TFLOP/s"``, ``"GB/s"`` or ``"ms"``."""
    in_turns: ClassVar[bool] = False
    """Whether the engines of a case are timed in turns, not one after the other: for calls so long
    that the GPU's clock follows its power. They stay prepared side by side meanwhile."""

    family: str
    length: int
    share: float | None

    def __str__(self) -> str:
        share = "" if self.share is None else f"-{self.share:g}"
        return f"{self.family}-{tokens(self.length)}{share}"

    @property
    def dense(self) -> str:
        """The name of the case that reads everything, whose peers this one is compared with too."""
        return str(self) if self.share is None else str(dataclasses.replace(self, share=0.0))

    def parameters(self) -> dict[str, Any]:
        """Everything that defines the case, as JSON."""
        return dataclasses.asdict(self)

    @abstractmethod
    def engines(self) -> Sequence[Engine]:
        """Who is measured."""

    @abstractmethod
    def build(self, device: torch.device) -> Work:
        """Make the tensors."""


def tokens(length: int) -> str:
    """``131072`` as ``128K``."""
    for size, unit in ((2**20, "M"), (2**10, "K")):
        if length % size == 0:
            return f"{length // size}{unit}"
    return str(length)


def case_type(suite: str) -> type[Case]:
    """The class of a suite's cases."""
    from elasticore.bench import attention, e2e, router, selector

    types: tuple[type[Case], ...] = (
        attention.AttentionCase,
        attention.DecodeCase,
        router.RouterCase,
        selector.SelectorCase,
        e2e.E2eCase,
    )
    return {one.suite: one for one in types}[suite]


SUITES = ("attention", "decode", "router", "selector", "e2e")


def cases_of(
    suite: str,
    device: torch.device,
    *,
    quick: bool = False,
    lengths: Collection[int] = (),
    layers: int | None = None,
) -> list[Case]:
    """The cases of a suite in the sizes that suit ``device``.

    Parameters
    ----------
    suite
        One of ``SUITES``.
    device
        A GPU gets the sizes of an 8B model; a CPU gets small ones.
    quick
        Only short cases.
    lengths
        Only cases of these lengths; empty means all.
    layers
        Layers of the models of suite e2e; None means its default.

    Raises
    ------
    ValueError
        If there is no such suite.
    """
    if suite not in SUITES:
        raise ValueError(f"suite {suite!r} is unknown; there are: {', '.join(SUITES)}.")
    from elasticore.bench import attention, e2e, router, selector

    made: dict[str, Callable[[torch.device, bool], Sequence[Case]]] = {
        "attention": attention.prefill_cases,
        "decode": attention.decode_cases,
        "router": router.router_cases,
        "selector": selector.selector_cases,
        "e2e": e2e.e2e_cases,
    }
    cases = [case for case in made[suite](device, quick) if not lengths or case.length in lengths]
    if layers is None:
        return cases
    return [
        dataclasses.replace(case, layers=layers) if isinstance(case, e2e.E2eCase) else case
        for case in cases
    ]
