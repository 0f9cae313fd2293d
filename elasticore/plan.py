"""What each head does in one attention call, and how sparse that makes it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import InitVar, dataclass, field
from enum import IntEnum
from typing import Literal

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.patterns.selector import BlockLists, BlockSelector
from elasticore.patterns.streaming import Streaming

__all__ = ["HeadMode", "HeadPlan"]


def _default_streaming() -> Streaming:
    return Streaming()  # torch.compile can trace this, but not a class as the factory


class HeadMode(IntEnum):
    """The three lanes; every sparse method lowers to one of them."""

    FULL = 0
    """Every key up to the query (the paper's FA)."""
    STREAMING = 1
    """Sink blocks and a local window of blocks (the paper's SSA)."""
    SELECTED = 2
    """The key blocks that a selector chose for this input (the paper's XA)."""


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """The mode of every head of every sequence: the metadata ``m`` of the paper's Algorithm 1(b).

    Parameters
    ----------
    modes
        int8 ``[sequences, kv_heads]`` of :class:`HeadMode` values, on the device of q. Every
        sequence of a batch has its own row; a KV head's query heads share its mode.
    retrieval, sparse
        The two modes that a router chooses between.
    gate
        None, or the float ``[sequences, kv_heads]`` that carries a router's gradient: exactly 0
        (retrieval) or 1 (sparse). See :meth:`from_gate`.
    streaming
        What STREAMING heads read.
    selector
        What chooses the blocks of SELECTED heads; needed as soon as a mode is SELECTED.
    block_size
        Tokens per block: a power of two from 16 to 128.
    check
        Whether to read the values of ``modes`` (and ``gate``) to check them. On a GPU that waits
        for the device once; code that made the values itself passes False.

    Raises
    ------
    TypeError, ValueError
        On anything that does not fit the above.
    """

    modes: Tensor
    retrieval: HeadMode = HeadMode.FULL
    sparse: HeadMode = HeadMode.STREAMING
    gate: Tensor | None = None
    streaming: Streaming = field(default_factory=_default_streaming)
    selector: BlockSelector | None = None
    block_size: int = 128
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        if not isinstance(self.modes, Tensor) or self.modes.ndim != 2:
            got = list(self.modes.shape) if isinstance(self.modes, Tensor) else self.modes
            raise ValueError(f"modes must be a tensor [sequences, kv_heads], got {got!r}.")
        if self.modes.dtype != torch.int8:
            raise TypeError(
                f"modes must be int8, got {self.modes.dtype}; use modes.to(torch.int8)."
            )
        for name in ("retrieval", "sparse"):
            object.__setattr__(self, name, _as_mode(name, getattr(self, name)))
        if not isinstance(self.streaming, Streaming):
            raise TypeError(f"streaming must be a Streaming(sink, local), got {self.streaming!r}.")
        if self.selector is not None and not isinstance(self.selector, BlockSelector):
            raise TypeError(
                f"selector must be a BlockSelector such as XAttention(), got {self.selector!r}."
            )
        check_block_size(self.block_size)
        self.streaming.blocks(self.block_size)
        if self.selector is not None:
            self.selector.check(self.block_size)
        elif HeadMode.SELECTED in (self.retrieval, self.sparse):
            raise ValueError(
                "selector is missing: SELECTED heads need one, such as selector=XAttention()."
            )
        if self.gate is not None:
            _check_gate(self.gate, self.modes)
        if check and not self.modes.is_meta:
            self._check_values()

    def _check_values(self) -> None:
        low, high = torch.stack(self.modes.aminmax()).tolist() if self.modes.numel() else (0, 0)
        top = HeadMode.SELECTED if self.selector is not None else HeadMode.STREAMING
        if low < 0 or high > HeadMode.SELECTED:
            raise ValueError(
                "modes must be HeadMode values (0 FULL, 1 STREAMING, 2 SELECTED), got values from "
                f"{low} to {high}."
            )
        if high > top:
            raise ValueError(
                "selector is missing: modes holds SELECTED heads, which need one, such as "
                "selector=XAttention()."
            )
        if self.gate is not None:
            with torch.no_grad():
                modes = self._modes_of(self.gate, self.retrieval, self.sparse)
                exact = ((self.gate == 0) | (self.gate == 1)).all() & (modes == self.modes).all()
            if not bool(exact):
                raise ValueError(
                    "gate must be exactly 0 (retrieval) or 1 (sparse) and agree with modes; build "
                    "the plan with HeadPlan.from_gate(gate, ...)."
                )

    @staticmethod
    def _modes_of(gate: Tensor, retrieval: HeadMode, sparse: HeadMode) -> Tensor:
        return torch.where(gate.detach() > 0.5, int(sparse), int(retrieval)).to(torch.int8)

    @classmethod
    def from_gate(
        cls,
        gate: Tensor,
        *,
        retrieval: HeadMode = HeadMode.FULL,
        sparse: HeadMode = HeadMode.STREAMING,
        streaming: Streaming | None = None,
        selector: BlockSelector | None = None,
        block_size: int = 128,
    ) -> HeadPlan:
        """The plan of a router's gate, which keeps the gate's gradient.

        The attention's output is ``(1 - gate) * O_retrieval + gate * O_sparse``, so
        ``d out / d gate = sum(dO * (O_sparse - O_retrieval))``; as the gate is exactly 0 or 1,
        the gradients of q, k and v flow through the chosen branch only (Eqs. 6 and 7).

        Parameters
        ----------
        gate
            Float ``[sequences, kv_heads]``, exactly 0 or 1 in value. The values are checked only
            on the CPU, where reading them costs no synchronisation.
        """
        if not isinstance(gate, Tensor) or gate.ndim != 2 or not gate.is_floating_point():
            got = (list(gate.shape), gate.dtype) if isinstance(gate, Tensor) else gate
            raise ValueError(f"gate must be a float tensor [sequences, kv_heads], got {got!r}.")
        retrieval, sparse = _as_mode("retrieval", retrieval), _as_mode("sparse", sparse)
        return cls(
            cls._modes_of(gate, retrieval, sparse),
            retrieval=retrieval,
            sparse=sparse,
            gate=gate,
            streaming=streaming if streaming is not None else Streaming(),
            selector=selector,
            block_size=block_size,
            check=gate.device.type == "cpu",
        )

    @functools.cached_property
    def lanes(self) -> frozenset[HeadMode]:
        """The lanes that the plan may hold, known without reading ``modes``."""
        lanes = {self.retrieval, self.sparse, HeadMode.FULL, HeadMode.STREAMING}
        if self.selector is not None:
            lanes.add(HeadMode.SELECTED)
        return frozenset(lanes)

    def swapped(self) -> HeadPlan:
        """The plan in which every head runs the mode that it was *not* given, without a gate."""
        other = torch.where(
            self.modes == int(self.retrieval), int(self.sparse), int(self.retrieval)
        )
        return self.with_modes(other.to(torch.int8))

    def with_modes(self, modes: Tensor) -> HeadPlan:
        """This plan with other ``modes`` (values not read), without a gate."""
        return dataclasses.replace(self, modes=modes, gate=None, check=False)

    def msr(self) -> Tensor:
        """Ω_MSR (Eq. 4): the share of (sequence, KV head) entries not in ``retrieval`` mode.

        Returns
        -------
        Tensor
            float32, no axes, on the plan's device.
        """
        return (self.modes != int(self.retrieval)).float().mean()

    def esr(
        self,
        segments: Segments,
        definition: Literal["causal", "last_query"] = "causal",
        selection: BlockLists | None = None,
    ) -> Tensor:
        """Ω_ESR (Eq. 5): the share of the attention that is left out, averaged over the heads.

        Parameters
        ----------
        segments
            Where the sequences lie: the ratio depends on their lengths.
        definition
            ``"causal"``: 1 - attended pairs / causal pairs. ``"last_query"``: 1 - keys read by the
            last query / sequence length, which is what the paper's Figures 8c and 12c plot.
        selection
            The block lists of the SELECTED heads; needed only where the plan has such heads.

        Returns
        -------
        Tensor
            float64 ``[sequences, kv_heads]``, on the plan's device; its mean is the model's ratio.
            NaN for sequences without a query.
        """
        if not isinstance(segments, Segments):
            raise TypeError(
                "segments must be Segments, such as layout.segments(batch, queries, keys, device), "
                f"got {type(segments).__name__}."
            )
        sequences, kv_heads = self.modes.shape
        if segments.row.numel() != sequences:
            raise ValueError(
                f"segments describe {segments.row.numel()} sequences but the plan has {sequences}."
            )
        if definition not in ("causal", "last_query"):
            raise ValueError(f"definition must be 'causal' or 'last_query', got {definition!r}.")
        if selection is None and self.selector is not None:
            selected = bool((self.modes == HeadMode.SELECTED).any())
            if selected:
                raise ValueError(
                    "selection is missing: the plan has SELECTED heads, whose ratio depends on the "
                    "blocks chosen; pass selection=plan.selector.select(q, k, segments, ...)."
                )
        if selection is not None:
            _check_selection(selection, sequences, kv_heads)
        past = segments.key_length - segments.query_length
        longest = int(segments.query_length.max()) if segments.query_length.numel() else 0
        step = torch.arange(longest, device=self.modes.device)
        position = past[:, None] + step
        counted = step < segments.query_length[:, None]
        if definition == "last_query":
            counted = counted & (step == segments.query_length[:, None] - 1)

        # Keys that each query reads, [sequences, kv_heads, queries], lane by lane.
        size = self.block_size
        block = position // size
        in_diagonal = position % size + 1
        streaming = (self.streaming.blocks_read(block, size) - 1) * size + in_diagonal
        lane = self.modes[:, :, None]
        read = torch.where(
            lane == HeadMode.STREAMING, streaming[:, None], (position + 1)[:, None]
        ).double()
        if selection is not None:
            per_head = selection.counts.double().unflatten(1, (kv_heads, -1)).mean(2)
            row = (block - (past // size)[:, None]).clamp(0, per_head.shape[-1] - 1)
            row = row[:, None].expand(-1, kv_heads, -1)
            selected = (per_head.gather(2, row) - 1) * size + in_diagonal[:, None]
            read = torch.where(lane == HeadMode.SELECTED, selected, read)

        kept = (read * counted[:, None]).sum(-1)
        causal = ((position + 1) * counted).sum(-1, dtype=torch.float64)[:, None]
        return 1 - kept / causal


def check_block_size(block_size: object) -> None:
    """Raise unless ``block_size`` is 16, 32, 64 or 128."""
    if isinstance(block_size, bool) or not isinstance(block_size, int):
        raise TypeError(f"block_size must be an int (tokens), got {block_size!r}.")
    if block_size not in (16, 32, 64, 128):
        raise ValueError(f"block_size must be 16, 32, 64 or 128 tokens, got {block_size}.")


def _as_mode(name: str, value: object) -> HeadMode:
    if isinstance(value, HeadMode):
        return value
    accepted = isinstance(value, int) and not isinstance(value, bool) and value in list(HeadMode)
    if not accepted:
        raise ValueError(f"{name} must be a HeadMode (FULL, STREAMING or SELECTED), got {value!r}.")
    return HeadMode(value)  # type: ignore[arg-type]


def _check_gate(gate: object, modes: Tensor) -> None:
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate must be a float tensor, got {gate!r}.")
    if gate.shape != modes.shape or gate.device != modes.device:
        raise ValueError(
            f"gate must have the shape and device of modes ({list(modes.shape)} on "
            f"{modes.device}), got {list(gate.shape)} on {gate.device}."
        )


def _check_selection(selection: object, sequences: int, kv_heads: int) -> None:
    if not isinstance(selection, BlockLists):
        raise TypeError(f"selection must be BlockLists, got {type(selection).__name__}.")
    shape = list(selection.counts.shape)
    if len(shape) != 3 or shape[0] != sequences or shape[1] % kv_heads:
        raise ValueError(
            "selection.counts must be [sequences, query heads, row blocks] for "
            f"{sequences} sequences and a multiple of {kv_heads} heads, got {shape}."
        )
