"""What each head does in one attention call, and how sparse that makes it."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import Literal

import torch
from torch import Tensor

from elasticore.layout import Segments
from elasticore.memo import Memo
from elasticore.patterns.full import Full
from elasticore.patterns.pattern import HeadMode, Pattern, check_block_size
from elasticore.patterns.selector import BlockLists, BlockSelector
from elasticore.patterns.streaming import Streaming

__all__ = ["HeadPlan"]


# torch.compile can trace functions that make the defaults, but neither values nor classes.
def _full() -> Pattern:
    return Full()


def _streaming() -> Pattern:
    return Streaming()


@dataclass(frozen=True, eq=False)
class HeadPlan:
    """What every head of every sequence runs: the metadata ``m`` of the paper's Algorithm 1(b).

    Parameters
    ----------
    decisions
        int8 ``[sequences, kv_heads]`` on the device of q: 0 = retrieval, 1 = sparse. Every sequence
        of a batch has its own row; a KV head's query heads share its decision.
    retrieval, sparse
        The two patterns that a router chooses between. Each lane runs one pattern in a call, so two
        of one lane must be equal.
    gate
        None, or the float ``[sequences, kv_heads]`` that carries a router's gradient: exactly 0
        (retrieval) or 1 (sparse). See :meth:`from_gate`.
    block_size
        Tokens per block: a power of two from 16 to 128.
    check
        Whether to read the values of ``decisions`` (and ``gate``) to check them. On a GPU that
        waits for the device once; code that made the values itself passes False.

    Raises
    ------
    TypeError, ValueError
        On anything that does not fit the above.

    Examples
    --------
    >>> import torch, elasticore
    >>> decisions = torch.tensor([[0, 1]], dtype=torch.int8)
    >>> plan = HeadPlan(decisions, elasticore.XAttention(), elasticore.Streaming(128, 1024))
    >>> plan.modes.tolist()  # XAttention selects, so it runs in the lane SELECTED
    [[2, 1]]
    """

    decisions: Tensor
    retrieval: Pattern = field(default_factory=_full)
    sparse: Pattern = field(default_factory=_streaming)
    _: KW_ONLY
    gate: Tensor | None = None
    block_size: int = 128
    check: InitVar[bool] = True

    def __post_init__(self, check: bool) -> None:
        decisions = self.decisions
        if not isinstance(decisions, Tensor) or decisions.ndim != 2:
            got = list(decisions.shape) if isinstance(decisions, Tensor) else decisions
            raise ValueError(f"decisions must be a tensor [sequences, kv_heads], got {got!r}.")
        if decisions.dtype != torch.int8:
            raise TypeError(
                f"decisions must be int8, got {decisions.dtype}; use decisions.to(torch.int8)."
            )
        check_block_size(self.block_size)
        for name, pattern in (("retrieval", self.retrieval), ("sparse", self.sparse)):
            if not isinstance(pattern, (Full, Streaming, BlockSelector)):
                raise TypeError(
                    f"{name} must be Full(), a Streaming(sink, local) or a BlockSelector such as "
                    f"XAttention(), got {pattern!r}."
                )
            pattern.check(self.block_size)
        if self.retrieval.lane is self.sparse.lane and self.retrieval != self.sparse:
            raise ValueError(
                f"retrieval and sparse are two different patterns of the lane "
                f"{self.sparse.lane.name}, got {self.retrieval!r} and {self.sparse!r}; a call runs "
                "one pattern per lane, so use equal ones, or patterns of two lanes."
            )
        if self.gate is not None:
            _check_gate(self.gate, decisions)
        if check and not decisions.is_meta:
            self._check_values()

    def _check_values(self) -> None:
        decisions = self.decisions
        low, high = torch.stack(decisions.aminmax()).tolist() if decisions.numel() else (0, 0)
        if low < 0 or high > 1:
            raise ValueError(
                f"decisions must be 0 (retrieval) or 1 (sparse), got values from {low} to {high}."
            )
        # Equal to a decision is exactly 0 or 1.
        if self.gate is not None and not bool((self.gate == decisions).all()):
            raise ValueError(
                "gate must be exactly 0 (retrieval) or 1 (sparse) and agree with decisions; build "
                "the plan with HeadPlan.from_gate(gate, ...)."
            )

    @classmethod
    def from_gate(
        cls,
        gate: Tensor,
        retrieval: Pattern | None = None,
        sparse: Pattern | None = None,
        *,
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
        retrieval, sparse
            The two patterns; None means ``Full()`` and ``Streaming()``.
        block_size
            Tokens per block.
        """
        if not isinstance(gate, Tensor) or gate.ndim != 2 or not gate.is_floating_point():
            got = (list(gate.shape), gate.dtype) if isinstance(gate, Tensor) else gate
            raise ValueError(f"gate must be a float tensor [sequences, kv_heads], got {got!r}.")
        return cls(
            (gate.detach() > 0.5).to(torch.int8),
            Full() if retrieval is None else retrieval,
            Streaming() if sparse is None else sparse,
            gate=gate,
            block_size=block_size,
            check=gate.device.type == "cpu",
        )

    @property
    def modes(self) -> Tensor:
        """int8 ``[sequences, kv_heads]`` of :class:`HeadMode`: what a backend reads.

        It follows ``decisions`` that are overwritten, in a CUDA graph as well.
        """
        retrieval, sparse = int(self.retrieval.lane), int(self.sparse.lane)
        if (retrieval, sparse) == (0, 1):
            return self.decisions  # the same numbers, in the same memory

        def derive() -> Tensor:
            return torch.where(self.decisions == 0, retrieval, sparse).to(torch.int8)

        if torch.compiler.is_compiling():  # it cannot trace the memo
            return derive()
        memo: Memo[Tensor] = self.__dict__.setdefault("_memo", Memo())
        return memo.get((), (self.decisions,), self.decisions.device, derive)

    @functools.cached_property
    def lanes(self) -> frozenset[HeadMode]:
        """The lanes that the plan may hold, known without reading ``decisions``."""
        return frozenset({self.retrieval.lane, self.sparse.lane})

    @property
    def streaming(self) -> Streaming:
        """What STREAMING heads read; without any, some sizes that nobody uses."""
        for pattern in (self.retrieval, self.sparse):
            if isinstance(pattern, Streaming):
                return pattern
        return Streaming()

    @property
    def selector(self) -> BlockSelector | None:
        """What chooses the blocks of SELECTED heads; None if the plan has no such heads."""
        for pattern in (self.retrieval, self.sparse):
            if isinstance(pattern, BlockSelector):
                return pattern
        return None

    def swapped(self) -> HeadPlan:
        """The plan in which every head runs the pattern that was *not* chosen, without a gate."""
        return self.with_decisions(1 - self.decisions)

    def with_decisions(self, decisions: Tensor) -> HeadPlan:
        """This plan with other ``decisions`` (values not read), without a gate."""
        return dataclasses.replace(self, decisions=decisions, gate=None, check=False)

    def msr(self) -> Tensor:
        """Ω_MSR (Eq. 4): the share of (sequence, KV head) entries that are sparse.

        Returns
        -------
        Tensor
            float32, no axes, on the plan's device.
        """
        return self.decisions.float().mean()

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
        sequences, kv_heads = self.decisions.shape
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


def _check_gate(gate: object, decisions: Tensor) -> None:
    if not isinstance(gate, Tensor) or not gate.is_floating_point():
        raise TypeError(f"gate must be a float tensor, got {gate!r}.")
    if gate.shape != decisions.shape or gate.device != decisions.device:
        raise ValueError(
            f"gate must have the shape and device of decisions ({list(decisions.shape)} on "
            f"{decisions.device}), got {list(gate.shape)} on {gate.device}."
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
