"""Building packed training data: read, encode, filter, mix, pack, write, describe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

from elasticore.checks import check_int, check_number
from elasticore.data import chunks
from elasticore.data.card import Tally, make_card, write_card
from elasticore.data.encoding import Encoder, fingerprint
from elasticore.data.layouts import Header
from elasticore.data.mixing import interleave
from elasticore.data.packing import Packer
from elasticore.data.parquet import CARD
from elasticore.data.reading import parquet_library, records
from elasticore.data.sequence import TokenSequence
from elasticore.data.sources import SOURCES, Source
from elasticore.data.writer import PackedWriter
from elasticore.models.loading import load_tokenizer
from elasticore.places import held, whole_folder

__all__ = ["build"]

Progress = Callable[[str, int, int, int], None]


@dataclass
class _Stream:
    """The sequences of a source, and what was read for them."""

    source: Source
    origin: str | None
    records: int = 0
    dropped: dict[str, int] = field(default_factory=dict)
    tokens: int = 0
    sequences: int = 0

    def about(self) -> dict[str, Any]:
        """What the data card says of it."""
        return {
            "origin": self.origin or self.source.hub,
            "licence": self.source.licence,
            "records": self.records,
            "dropped": self.dropped,
        }

    def run(
        self,
        encoded: Iterator[chunks.Chunk],
        bounds: tuple[int, int],
        on_progress: Progress | None,
    ) -> Iterator[TokenSequence]:
        """The sequences of all chunks."""
        for chunk in encoded:
            self.records += chunk.records
            for why, count in chunk.dropped.items():
                self.dropped[why] = self.dropped.get(why, 0) + count
            self.sequences += len(chunk.sequences)
            self.tokens += sum(map(len, chunk.sequences))
            if on_progress is not None:
                on_progress(self.source.name, self.records, self.sequences, self.tokens)
            yield from chunk.sequences
        if not self.sequences:
            raise ValueError(
                f"source {self.source.name} gave no sample of {bounds[0]:,} to {bounds[1]:,} "
                f"tokens: of {self.records:,} records, {self.dropped['short']:,} samples were "
                f"shorter, {self.dropped['long']:,} longer, and {self.dropped['unusable']:,} "
                "records had no question or answer. Change the lengths, or leave it out."
            )


def build(
    sources: Mapping[str, str | None],
    tokenizer: Any,
    output: str | Path,
    *,
    min_length: int = 8 * 1024,
    max_length: int = 64 * 1024,
    pack: int = 64 * 1024,
    mixture: Mapping[str, float] | None = None,
    tokens: int | None = None,
    loss: Literal["answer", "all"] = "answer",
    template: Literal["chat", "plain"] = "chat",
    seed: int = 0,
    workers: int = 1,
    overwrite: bool = False,
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Build packed training data; return its data card.

    The data depend on everything but ``workers``. Until all is written they lie beside ``output``,
    hidden; ``output`` is there only when it is whole.

    Parameters
    ----------
    sources
        Names of :data:`~elasticore.data.sources.SOURCES`, each with where its records are
        (:func:`~elasticore.data.reading.records`), or None for its own place on the hub.
    tokenizer
        The backbone's tokenizer, or its directory or hub id.
    output
        The folder to make.
    min_length, max_length
        Tokens of a sample; others are dropped.
    pack
        Most tokens of a packed row.
    mixture
        Share of the tokens of each source. The build ends when a source ends. None: all samples
        of all sources.
    tokens
        End after this many tokens at the latest.
    loss, template
        See :class:`~elasticore.data.encoding.Encoder`.
    seed
        Of what is random: the order of passages and the length of joined samples.
    workers
        Processes that tokenize; 1 uses none beside this one.
    overwrite
        Whether to replace data in ``output``.
    on_progress
        Called with a source's name and its records, sequences and tokens so far.

    Raises
    ------
    ValueError, TypeError, FileNotFoundError, FileExistsError, OSError
        If a setting, a source or the disk is not right, or another build is making ``output``.
        Nothing is left in ``output`` then.
    """
    _check(sources, min_length, max_length, pack, mixture, tokens, seed, workers)
    parquet_library()
    output = Path(output).expanduser().resolve()
    encoder = Encoder(
        load_tokenizer(tokenizer) if isinstance(tokenizer, str) else tokenizer, template, loss
    )
    streams = {name: _Stream(SOURCES[name], origin) for name, origin in sources.items()}
    header = Header(
        pack,
        tuple(dict.fromkeys(task for one in streams.values() for task in one.source.tasks)),
        tuple(streams),
        fingerprint(encoder.tokenizer),
    )
    with ExitStack() as stack:
        stack.enter_context(held(output, beside=True))
        if output.exists() and not overwrite:
            raise FileExistsError(f"output {output} exists; choose another, or pass overwrite.")
        if output.exists() and not (output / CARD).is_file():
            raise FileExistsError(f"output {output} holds no data of a build; it is left as it is.")
        folder = stack.enter_context(whole_folder(output))
        writer, tally = PackedWriter(folder, header), Tally()
        packer = Packer[TokenSequence](pack)
        stack.callback(writer.abandon)

        def write(rows: Iterator[list[TokenSequence]]) -> None:
            for row in rows:
                tally.add(row)
                writer.add(row)

        encode = _encoding(stack, encoder, workers)
        sequences = {
            name: stream.run(
                encode(
                    chunks.jobs(
                        stream.source,
                        records(stream.source, stream.origin),
                        min_length,
                        max_length,
                        seed,
                    )
                ),
                (min_length, max_length),
                on_progress,
            )
            for name, stream in streams.items()
        }
        try:
            for sequence in interleave(sequences, mixture, tokens):
                write(packer.add(sequence))
        except BrokenProcessPool as error:
            raise RuntimeError(
                "a worker process died, perhaps for want of memory; build with fewer workers."
            ) from error
        write(packer.flush())
        if not tally.rows:
            raise ValueError(f"tokens={tokens} leaves room for no sample; allow more.")
        writer.close()
        card = make_card(
            tally,
            files=writer.files,
            capacity=pack,
            tokenizer=header.tokenizer,
            settings={
                "min_length": min_length,
                "max_length": max_length,
                "pack": pack,
                "mixture": None if mixture is None else dict(mixture),
                "tokens": tokens,
                "loss": loss,
                "template": template,
                "seed": seed,
            },
            origins={name: stream.about() for name, stream in streams.items()},
        )
        write_card(card, folder)
    return card


def _check(
    sources: Mapping[str, str | None],
    min_length: int,
    max_length: int,
    pack: int,
    mixture: Mapping[str, float] | None,
    tokens: int | None,
    seed: int,
    workers: int,
) -> None:
    unknown = sorted(set(sources) - set(SOURCES))
    if unknown or not sources:
        raise ValueError(
            f"sources must name some of {', '.join(SOURCES)}, got {', '.join(unknown) or 'none'}."
        )
    check_int("min_length", min_length, 1)
    check_int("max_length", max_length, min_length)
    check_int("pack", pack, max_length)
    check_int("tokens", tokens, 1, optional=True)
    check_int("seed", seed, 0)
    check_int("workers", workers, 1)
    if mixture is None:
        return
    if set(mixture) != set(sources):
        raise ValueError(
            f"mixture must weigh the sources {', '.join(sources)}, got "
            f"{', '.join(mixture) or 'none'}."
        )
    for name, weight in mixture.items():
        check_number(f"mixture[{name!r}]", weight, 0)
        if weight == 0:
            raise ValueError(f"mixture[{name!r}] must be positive; leave the source out instead.")


def _encoding(
    stack: ExitStack, encoder: Encoder, workers: int
) -> Callable[[Iterator[chunks.Job]], Iterator[chunks.Chunk]]:
    """What encodes a stream of jobs: this process, or some that end with the stack."""
    if workers == 1:
        return lambda jobs: (chunks.encode(job, encoder) for job in jobs)
    pool = ProcessPoolExecutor(
        # Spawned: a fork would copy locks that tokenizers, Arrow and progress bars may hold.
        workers,
        get_context("spawn"),
        initializer=chunks.start_worker,
        initargs=(encoder,),
    )
    stack.callback(pool.shutdown, cancel_futures=True)
    return lambda jobs: chunks.in_order(pool, jobs, ahead=2 * workers)
