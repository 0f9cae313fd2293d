"""Where sequences lie in a batch of queries, keys and values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from elasticore.memo import Memo

__all__ = ["Segments", "SequenceLayout"]


class Segments(NamedTuple):
    """Every layout, lowered to one form: the sequences as slices of the batch.

    Sequence ``s`` owns the keys ``[key_start, key_start + key_length)`` and the queries
    ``[query_start, query_start + query_length)`` of batch row ``row``. Its queries are its last
    ``query_length`` positions, so query ``i`` sits at position ``key_length - query_length + i`` of
    its own sequence. All fields are int64 ``[sequences]`` on the layout's device.
    """

    row: Tensor
    query_start: Tensor
    query_length: Tensor
    key_start: Tensor
    key_length: Tensor


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Where the sequences of a batch lie on the token axis.

    Build one with :meth:`dense`, :meth:`padded`, :meth:`from_attention_mask` or :meth:`packed`.
    Blocks are anchored at each sequence's own first token, so a sequence gives the same result
    alone, padded or packed.

    Attributes
    ----------
    kind
        ``"dense"``: every row is one sequence and fills it. ``"padded"``: every row is one sequence
        inside padding. ``"packed"``: batch 1, sequences one after the other.
    first, last
        Padded only: int64 ``[B]``, the first and the last valid position of each row on the key
        axis. ``last < first`` marks an empty row.
    query_offset
        Padded only: int64 ``[B]`` or None, the position on the key axis of each row's query 0.
        None means that the queries are the last ``Tq`` positions of the key axis. A preallocated
        (static) cache, whose key axis is longer than what is filled, gives it.
    cu_queries, cu_keys
        Packed only: int64 ``[sequences + 1]``, cumulative lengths from 0.
    """

    kind: Literal["dense", "padded", "packed"] = "dense"
    first: Tensor | None = None
    last: Tensor | None = None
    query_offset: Tensor | None = None
    cu_queries: Tensor | None = None
    cu_keys: Tensor | None = None

    def __post_init__(self) -> None:
        needed: dict[str, tuple[Tensor | None, ...]] = {
            "dense": (),
            "padded": (self.first, self.last),
            "packed": (self.cu_queries, self.cu_keys),
        }
        if self.kind not in tuple(needed) or any(x is None for x in needed[self.kind]):
            raise ValueError(
                f"kind={self.kind!r} does not fit the other fields; build a layout with "
                "SequenceLayout.dense(), .padded(...), .from_attention_mask(...) or .packed(...)."
            )
        for name in ("first", "last", "query_offset", "cu_queries", "cu_keys"):
            value = getattr(self, name)
            # Kernels are compiled for 64 bits, and would misread others.
            if value is not None and not (isinstance(value, Tensor) and value.dtype == torch.int64):
                raise ValueError(
                    f"{name} must be an int64 tensor, got {_describe(value)}; "
                    "SequenceLayout.padded and SequenceLayout.packed take any integers."
                )

    @classmethod
    def dense(cls) -> SequenceLayout:
        """Every row of the batch is one sequence that fills it."""
        return cls()

    @classmethod
    def padded(
        cls, first: Tensor, last: Tensor, query_offset: Tensor | None = None
    ) -> SequenceLayout:
        """Every row is one sequence between its ``first`` and ``last`` valid key position.

        Parameters
        ----------
        first, last
            Integer tensors ``[B]``; both ends are included.
        query_offset
            Integer tensor ``[B]``, or None when the queries end where the key axis ends.

        Raises
        ------
        ValueError
            On wrong shapes, dtypes, devices or a negative ``first`` or ``query_offset``.
        """
        _check_integers("first", first, 1)
        _check_integers("last", last, 1)
        _check_same("last", last, "first", first)
        if query_offset is not None:
            _check_integers("query_offset", query_offset, 1)
            _check_same("query_offset", query_offset, "first", first)
        for name, value in (("first", first), ("query_offset", query_offset)):
            if value is not None and _readable(value) and bool((value < 0).any()):
                raise ValueError(f"{name} must be >= 0 in every row, got {value.tolist()}.")
        offset = None if query_offset is None else query_offset.long()
        return cls("padded", first.long(), last.long(), offset)

    @classmethod
    def from_attention_mask(
        cls, mask: Tensor, query_offset: Tensor | None = None
    ) -> SequenceLayout:
        """The layout of a ``[B, Tk]`` mask of valid keys (1 or True), padded left or right.

        Reads the mask once on the host to check that each row's valid tokens are contiguous, so
        build the layout once per batch, not once per layer.

        Raises
        ------
        ValueError
            If the mask is not 2-D, holds anything but 0 and 1, or a row has a hole between valid
            tokens.
        """
        if not isinstance(mask, Tensor) or mask.ndim != 2 or mask.shape[1] == 0:
            raise ValueError(
                f"mask must be a [batch, key positions] tensor, got {_describe(mask)}."
            )
        valid = mask == 1
        if bool((~valid & (mask != 0)).any()):
            raise ValueError(
                "mask must be 1 (or True) at valid keys and 0 elsewhere, got other values; neither "
                "additive masks nor sequence numbers are masks of padding."
            )
        length = valid.shape[1]
        position = torch.arange(length, device=mask.device)
        first = torch.where(valid, position, length).amin(1)
        last = torch.where(valid, position, -1).amax(1)
        holes = (last - first + 1).clamp(min=0) != valid.sum(1)
        if bool(holes.any()):
            raise ValueError(
                "mask has padding between valid tokens in rows "
                f"{holes.nonzero().flatten().tolist()}; pad each row on the left "
                "or on the right only, or pack the sequences."
            )
        return cls.padded(first, last, query_offset)

    @classmethod
    def packed(cls, cu_queries: Tensor, cu_keys: Tensor | None = None) -> SequenceLayout:
        """Sequences one after the other in a batch of one row.

        Parameters
        ----------
        cu_queries, cu_keys
            Integer tensors ``[sequences + 1]`` of cumulative lengths, from 0. Keys default to the
            queries' lengths; otherwise no sequence may have more queries than keys.

        Raises
        ------
        ValueError
            On wrong shapes, a start other than 0, or lengths that are negative or do not fit.
        """
        _check_integers("cu_queries", cu_queries, 1)
        if cu_keys is None:
            cu_keys = cu_queries
        _check_integers("cu_keys", cu_keys, 1)
        _check_same("cu_keys", cu_keys, "cu_queries", cu_queries)
        if cu_queries.numel() < 2:
            raise ValueError(
                "cu_queries must hold the cumulative lengths of at least one sequence, such as "
                f"[0, 128], got {_describe(cu_queries)}."
            )
        if _readable(cu_queries):
            for name, value in (("cu_queries", cu_queries), ("cu_keys", cu_keys)):
                if int(value[0]) != 0 or bool((value.diff() < 0).any()):
                    raise ValueError(
                        f"{name} must start at 0 and never fall, got {value.tolist()}."
                    )
            if bool((cu_queries.diff() > cu_keys.diff()).any()):
                raise ValueError(
                    "cu_keys must give every sequence at least as many keys as queries, got "
                    f"cu_queries={cu_queries.tolist()} and cu_keys={cu_keys.tolist()}."
                )
        return cls("packed", cu_queries=cu_queries.long(), cu_keys=cu_keys.long())

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """The layout's tensors, in the order of its fields, without those that it has not."""
        fields = (self.first, self.last, self.query_offset, self.cu_queries, self.cu_keys)
        return tuple(tensor for tensor in fields if tensor is not None)

    @property
    def device(self) -> torch.device | None:
        """The device of the layout's tensors; None for the dense layout, which has none."""
        tensor = self.first if self.kind == "padded" else self.cu_queries
        return None if tensor is None else tensor.device

    def sequences(self, batch: int) -> int:
        """The number of sequences in a batch of ``batch`` rows."""
        if self.kind == "packed":
            assert self.cu_queries is not None
            return self.cu_queries.numel() - 1
        return batch

    def check(self, batch: int, queries: int, keys: int, device: torch.device) -> None:
        """Raise ``ValueError`` unless this layout fits ``[batch, ..., queries / keys, ...]``.

        Values are read only where that costs no synchronisation (on the CPU).
        """
        if self.device is not None and self.device != device:
            raise ValueError(
                f"layout is on {self.device} but q, k and v are on {device}; move it there."
            )
        if self.kind == "packed":
            assert self.cu_queries is not None and self.cu_keys is not None
            if batch != 1:
                raise ValueError(f"layout is packed, which needs a batch of 1 row, got {batch}.")
            if _readable(self.cu_queries):
                ends = int(self.cu_queries[-1]), int(self.cu_keys[-1])
                if ends[0] > queries or ends[1] > keys:
                    raise ValueError(
                        f"layout ends at query {ends[0]} and key {ends[1]}, beyond the {queries} "
                        f"queries and {keys} keys given."
                    )
            return
        if queries > keys:
            raise ValueError(
                f"q has {queries} positions and k has {keys}; queries are the last positions of "
                "their sequence, so k needs at least as many."
            )
        if self.kind == "padded":
            assert self.first is not None and self.last is not None
            if self.first.numel() != batch:
                raise ValueError(
                    f"layout describes {self.first.numel()} rows but the batch has {batch}."
                )
            offset = self.query_offset
            if offset is not None and _readable(offset) and bool((offset + queries > keys).any()):
                raise ValueError(
                    f"layout's query_offset {offset.tolist()} puts the end of {queries} queries "
                    f"beyond the {keys} key positions."
                )
            if _readable(self.last) and bool((self.last >= keys).any()):
                raise ValueError(
                    f"layout's last valid positions {self.last.tolist()} must be below the {keys} "
                    "key positions."
                )

    def segments(self, batch: int, queries: int, keys: int, device: torch.device) -> Segments:
        """Lower the layout to slices, on the device and without synchronisation.

        Made once for a batch of these sizes, as every layer asks for them: do not write to them.

        Parameters
        ----------
        batch, queries, keys
            Sizes of the batch: ``q`` is ``[batch, Hq, queries, D]``, ``k`` is
            ``[batch, Hkv, keys, D]``.
        device
            Where the result is wanted for a dense layout, which holds no tensors.
        """
        if torch.compiler.is_compiling():  # it cannot trace the memo
            return self._lower(batch, queries, keys, device)
        memo: Memo[Segments] = self.__dict__.setdefault("_memo", Memo())
        tensors = self.tensors
        return memo.get(
            (batch, queries, keys),
            tensors,
            tensors[0].device if tensors else device,
            lambda: self._lower(batch, queries, keys, device),
        )

    def _lower(self, batch: int, queries: int, keys: int, device: torch.device) -> Segments:
        if self.kind == "packed":
            assert self.cu_queries is not None and self.cu_keys is not None
            return Segments(
                torch.zeros_like(self.cu_queries[:-1]),
                self.cu_queries[:-1],
                self.cu_queries.diff(),
                self.cu_keys[:-1],
                self.cu_keys.diff(),
            )
        row = torch.arange(batch, device=device)
        zero = torch.zeros_like(row)
        if self.kind == "dense":
            return Segments(row, zero, zero + queries, zero, zero + keys)
        assert self.first is not None and self.last is not None
        offset = self.query_offset if self.query_offset is not None else zero + (keys - queries)
        # Keys after the last query are in its future: leaving them out changes nothing and makes
        # the queries the last positions of their sequence.
        stop = torch.minimum(self.last + 1, offset + queries)
        start = torch.maximum(self.first, offset)
        return Segments(
            row,
            (start - offset).clamp(0, queries),
            (stop - start).clamp(min=0),
            self.first,
            (stop - self.first).clamp(min=0),
        )


def _readable(tensor: Tensor) -> bool:
    """Whether reading values costs no device synchronisation, nor torch.compile a graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return f"{type(value).__name__} {value!r}"


def _check_integers(name: str, value: object, ndim: int) -> None:
    if (
        not isinstance(value, Tensor)
        or value.ndim != ndim
        or value.is_floating_point()
        or value.is_complex()
        or value.dtype == torch.bool
    ):
        raise ValueError(
            f"{name} must be an integer tensor of {ndim} axis, got {_describe(value)}."
        )


def _check_same(name: str, value: Tensor, other_name: str, other: Tensor) -> None:
    if value.shape != other.shape or value.device != other.device:
        raise ValueError(
            f"{name} must have the shape and device of {other_name} ({list(other.shape)} on "
            f"{other.device}), got {list(value.shape)} on {value.device}."
        )
