"""Mixing: several streams of sequences into one, in shares of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from elasticore.data.sequence import TokenSequence

__all__ = ["interleave"]


def interleave(
    streams: Mapping[str, Iterator[TokenSequence]],
    weights: Mapping[str, float] | None = None,
    tokens: int | None = None,
) -> Iterator[TokenSequence]:
    """Take the next sequence from the stream that is furthest behind its share of the tokens.

    Parameters
    ----------
    streams
        The sequences of each source.
    weights
        Share of the tokens of each stream. The mixture ends where a stream that is due has ended,
        as the shares could not be kept. None: equal shares until a stream ends, then without it,
        so that every sequence of every stream is given.
    tokens
        End after this many tokens at the latest.
    """
    given = dict.fromkeys(streams, 0)
    due = list(streams)
    while due:
        name = min(due, key=lambda one: given[one] / (1.0 if weights is None else weights[one]))
        sequence = next(streams[name], None)
        if sequence is None:
            if weights is not None:
                return
            due.remove(name)
            continue
        if tokens is not None and sum(given.values()) + len(sequence) > tokens:
            return
        given[name] += len(sequence)
        yield sequence
