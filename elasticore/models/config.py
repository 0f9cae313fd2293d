"""The settings that make a model elastic."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from elasticore.checks import check_int
from elasticore.patterns import BlockSelector, Streaming, XAttention
from elasticore.patterns.registry import selector_from_dict, selector_to_dict
from elasticore.plan import HeadMode, HeadPlan, check_block_size

__all__ = ["ElasticConfig"]

_MODES = {"fa": HeadMode.FULL, "ssa": HeadMode.STREAMING, "xa": HeadMode.SELECTED}
_SAMPLERS = ("gumbel-softmax", "gumbel-sigmoid")
_DECODE = ("routed", "full")


@dataclass(frozen=True)
class ElasticConfig:
    """How a model's heads may be routed, and what each mode reads.

    Parameters
    ----------
    mode
        ``"retrieval-sparse"`` out of ``fa`` (full), ``ssa`` (streaming) and ``xa`` (selected):
        ``"fa-ssa"``, ``"fa-xa"`` or ``"xa-ssa"`` as in the paper, or any other pair of two; also a
        pair of :class:`HeadMode`.
    sink, local
        Tokens at the start, and of the window, that a streaming head reads.
    block_size
        Tokens per block: 16, 32, 64 or 128.
    selector
        What chooses the blocks of selected heads; :class:`XAttention` by default if the mode has
        such heads.
    boundary
        Tokens that the router pools at each end of a prompt; None pools all.
    hidden_multiplier
        Size of the router's hidden layers, in multiples of the head dimension.
    sampler
        How training samples decisions: ``"gumbel-softmax"`` or ``"gumbel-sigmoid"``.
    decode
        Once a prompt is prefilled: ``"routed"`` keeps every head's mode (selected heads read
        everything in calls shorter than a block, which no selector can score); ``"full"`` lets all
        heads read everything, as the paper's released code does.

    Raises
    ------
    TypeError, ValueError
        If a setting is out of range; the message names it.
    """

    mode: str = "fa-ssa"
    sink: int = 128
    local: int = 2048
    block_size: int = 128
    selector: BlockSelector | None = None
    boundary: int | None = 100
    hidden_multiplier: int = 4
    sampler: str = "gumbel-softmax"
    decode: Literal["routed", "full"] = "routed"

    def __post_init__(self) -> None:
        names = {mode: name for name, mode in _MODES.items()}
        if isinstance(self.mode, tuple) and all(isinstance(m, HeadMode) for m in self.mode):
            object.__setattr__(self, "mode", "-".join(names[m] for m in self.mode))
        parts = self.mode.split("-") if isinstance(self.mode, str) else []
        if len(parts) != 2 or not set(parts) <= set(_MODES) or parts[0] == parts[1]:
            raise ValueError(
                "mode must be two different ones of fa, ssa and xa, retrieval first, such as "
                f"'fa-ssa', got {self.mode!r}."
            )
        check_block_size(self.block_size)
        Streaming(self.sink, self.local).blocks(self.block_size)
        if self.selector is None and HeadMode.SELECTED in (self.retrieval, self.sparse):
            object.__setattr__(self, "selector", XAttention())
        if self.selector is not None:
            if not isinstance(self.selector, BlockSelector):
                raise TypeError(f"selector must be a BlockSelector, got {self.selector!r}.")
            self.selector.check(self.block_size)
        check_int("boundary", self.boundary, 1, optional=True)
        check_int("hidden_multiplier", self.hidden_multiplier, 1)
        for name, accepted in (("sampler", _SAMPLERS), ("decode", _DECODE)):
            if getattr(self, name) not in accepted:
                raise ValueError(
                    f"{name} must be one of {', '.join(accepted)}, got {getattr(self, name)!r}."
                )

    @property
    def retrieval(self) -> HeadMode:
        """The mode of a head that is routed to retrieval."""
        return _MODES[self.mode.split("-")[0]]

    @property
    def sparse(self) -> HeadMode:
        """The mode of a head that is routed to sparse."""
        return _MODES[self.mode.split("-")[1]]

    def plan(self, modes: Tensor) -> HeadPlan:
        """The plan of ``modes`` (int8 ``[sequences, kv_heads]``, values not read)."""
        return HeadPlan(
            modes,
            retrieval=self.retrieval,
            sparse=self.sparse,
            streaming=Streaming(self.sink, self.local),
            selector=self.selector,
            block_size=self.block_size,
            check=False,
        )

    def plan_without_selector(self, modes: Tensor) -> HeadPlan:
        """The plan of ``modes`` without a SELECTED head: no backend need choose blocks."""
        return HeadPlan(
            modes,
            streaming=Streaming(self.sink, self.local),
            block_size=self.block_size,
            check=False,
        )

    def gated_plan(self, gate: Tensor) -> HeadPlan:
        """The plan of a router's ``gate`` (float ``[sequences, kv_heads]``), with its gradient."""
        return HeadPlan.from_gate(
            gate,
            retrieval=self.retrieval,
            sparse=self.sparse,
            streaming=Streaming(self.sink, self.local),
            selector=self.selector,
            block_size=self.block_size,
        )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.selector is not None:
            data["selector"] = selector_to_dict(self.selector)
        return data

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ElasticConfig:
        """The settings that :meth:`to_dict` wrote; raises ``ValueError`` on unknown keys."""
        if not isinstance(data, dict):
            raise TypeError(f"data must be a dict of settings, got {type(data).__name__}.")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(set(data) - known)
        if unknown:
            raise ValueError(
                f"data has unknown settings {', '.join(map(str, unknown))}; there are: "
                f"{', '.join(sorted(known))}."
            )
        settings = dict(data)
        if isinstance(settings.get("selector"), dict):
            settings["selector"] = selector_from_dict(settings["selector"])
        return cls(**settings)

    def save(self, path: str | Path) -> None:
        """Write the settings to a JSON file."""
        Path(path).write_text(json.dumps(self.to_dict(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> ElasticConfig:
        """Read the settings from a JSON file."""
        return cls.from_dict(json.loads(Path(path).read_text(encoding="utf-8")))
