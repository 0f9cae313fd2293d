"""Streaming sparse attention: sink blocks and a local window of blocks (StreamingLLM)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from elasticore.patterns.pattern import HeadMode, Pattern

__all__ = ["Streaming"]


@dataclass(frozen=True)
class Streaming(Pattern):
    """What a STREAMING head reads: the first tokens and a window that ends at the query.

    With block size ``b``, ``s = sink / b`` and ``w = local / b``, row block ``i`` reads the key
    blocks ``{0..s-1} ∪ {i-w+1..i}``, causally inside block ``i``: ``min(i + 1, s + w)`` blocks.
    The window counts the query's own block.

    Parameters
    ----------
    sink
        Tokens at the start that every query reads; 0 for none.
    local
        Tokens of the window, at least one block.

    Notes
    -----
    The paper's SSA (Section 4.1) with its Table 6 sizes, 128 and 2,048.
    """

    lane: ClassVar[HeadMode] = HeadMode.STREAMING

    sink: int = 128
    local: int = 2048

    def __post_init__(self) -> None:
        for name, value, least in (("sink", self.sink, 0), ("local", self.local, 1)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(
                    f"{name} must be an int (tokens), got {type(value).__name__} {value!r}."
                )
            if value < least:
                raise ValueError(f"{name} must be at least {least} tokens, got {value}.")

    def check(self, block_size: int) -> None:
        """Raise ``ValueError`` unless both sizes are multiples of ``block_size``."""
        self.blocks(block_size)

    def blocks(self, block_size: int) -> tuple[int, int]:
        """The sizes in blocks: ``(sink blocks, local blocks)``.

        Raises
        ------
        ValueError
            If a size is no multiple of ``block_size``.
        """
        for name, value in (("sink", self.sink), ("local", self.local)):
            if value % block_size:
                below = value // block_size * block_size
                raise ValueError(
                    f"streaming {name}={value} is no multiple of block_size={block_size}; use "
                    f"{below + block_size}{f' or {below}' if below else ''}, or another block_size."
                )
        return self.sink // block_size, self.local // block_size

    def blocks_read(self, row_block: Tensor, block_size: int) -> Tensor:
        """How many key blocks each of ``row_block`` (int64, any shape) reads."""
        sink, local = self.blocks(block_size)
        return (row_block + 1).clamp(max=sink + local)

    def reads(self, row_block: Tensor, key_block: Tensor, block_size: int) -> Tensor:
        """Whether each ``row_block`` reads each ``key_block`` (int64, broadcast against it)."""
        sink, local = self.blocks(block_size)
        near = (key_block < sink) | (key_block > row_block - local)
        return near & (key_block <= row_block)
