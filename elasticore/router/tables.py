"""Head tables: the same decisions for every input; and the files of DuoAttention and PruLong.

Both files hold one line per layer and one tab-separated number per KV head, larger for full
attention. DuoAttention writes its gates α into ``full_attention_heads.tsv``, and ``sink_size`` and
``recent_size`` (tokens) into a ``config.json`` beside it. PruLong writes masks of 0 and 1 into a
file such as ``masks_sp0.7.tsv``, in which sink and window are not said.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from elasticore.checks import check_int, check_number
from elasticore.errors import RouterMismatch
from elasticore.patterns import Streaming
from elasticore.router.policies import FixedPolicy, LayerShape, Policy, by_layer, integers

__all__ = ["HeadTable", "write_duo", "write_prulong"]

DUO_SCORES, DUO_SETTINGS = "full_attention_heads.tsv", "config.json"


@dataclass(frozen=True, eq=False)
class HeadTable(Policy):
    """The same decisions for every input: which heads are sparse.

    Parameters
    ----------
    sparse
        Bool or integer tensor (or nested sequence) ``[layers, kv_heads]``: 1 = sparse. One row per
        elastic layer.

    Attributes
    ----------
    streaming
        What a file said that its streaming heads read; None where it does not say.

    Raises
    ------
    TypeError, ValueError
        On another dtype (threshold a float table first), shape or value.
    """

    sparse: Tensor | Sequence[Sequence[int]] = field(metadata={"saved": False})
    streaming: Streaming | None = field(default=None, metadata={"saved": False})

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparse", integers("sparse", self.sparse, 2).bool())

    def modules(self, layers: Sequence[LayerShape]) -> list[nn.Module]:
        """See :class:`~elasticore.Policy`."""
        assert isinstance(self.sparse, Tensor)
        wanted = [[layer.kv_heads for layer in layers], len(layers)]
        if [[self.sparse.shape[1]] * len(layers), self.sparse.shape[0]] != wanted:
            heads = sorted({layer.kv_heads for layer in layers})
            raise RouterMismatch(
                f"policy is a table of {self.sparse.shape[0]} layers and {self.sparse.shape[1]} KV "
                f"heads per layer; model has {len(layers)} elastic layers with "
                f"{', '.join(map(str, heads))}."
            )
        return [
            FixedPolicy(row).to(layer.device)
            for row, layer in zip(self.sparse, layers, strict=True)
        ]

    def tensors(self) -> dict[str, Tensor]:
        """See :class:`~elasticore.Policy`."""
        assert isinstance(self.sparse, Tensor)
        rows = enumerate(self.sparse.to(torch.int8))
        return {f"layers.{index}.decisions": row for index, row in rows}

    @classmethod
    def restored(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> HeadTable:
        """See :class:`~elasticore.Policy`."""
        rows = by_layer(tensors)
        if settings or not rows or any(set(row) != {"decisions"} for row in rows):
            raise ValueError("a head table holds the decisions of its layers, and nothing else")
        return cls(torch.stack([row["decisions"] for row in rows]))

    @classmethod
    def of_scores(cls, scores: Tensor, msr: float) -> HeadTable:
        """The table in which exactly ``round(msr * heads)`` heads are sparse: the lowest scores.

        Parameters
        ----------
        scores
            Float ``[layers, kv_heads]``, larger for heads that need the retrieval way.
        msr
            Ω_MSR wanted, from 0 to 1 (Eq. 4).

        Raises
        ------
        TypeError, ValueError
            If scores are not finite floats ``[layers, kv_heads]``, or msr is outside [0, 1].
        """
        check_number("msr", msr, 0, 1)
        if not isinstance(scores, Tensor) or not scores.is_floating_point():
            raise TypeError(f"scores must be a float tensor [layers, kv_heads], got {scores!r}.")
        if scores.ndim != 2 or scores.numel() == 0 or not bool(scores.isfinite().all()):
            raise ValueError(
                f"scores must be finite and [layers, kv_heads], got shape {list(scores.shape)}: "
                f"{scores.tolist()}."
            )
        table = torch.zeros(scores.numel(), dtype=torch.bool)
        # Of equal scores the first ones are sparse.
        lowest = scores.detach().cpu().flatten().argsort(stable=True)
        table[lowest[: round(msr * scores.numel())]] = True
        return cls(table.view(scores.shape))

    @classmethod
    def random(cls, layers: int, kv_heads: int, msr: float, seed: int) -> HeadTable:
        """A random table with exactly ``round(msr * layers * kv_heads)`` sparse heads.

        Parameters
        ----------
        layers, kv_heads
            Sizes of the table, each at least 1.
        msr
            Ω_MSR wanted, from 0 to 1 (Eq. 4).
        seed
            Of a private generator: the same arguments give the same table.
        """
        check_int("layers", layers, 1)
        check_int("kv_heads", kv_heads, 1)
        check_number("msr", msr, 0, 1)
        check_int("seed", seed, 0)
        heads = layers * kv_heads
        order = torch.randperm(heads, generator=torch.Generator().manual_seed(seed))
        # round, not int: (1 - 0.9) * 10 is 0.9999999999999998 and means 1.
        return cls((order < round(msr * heads)).view(layers, kv_heads))

    @classmethod
    def read(cls, path: str | Path, msr: float | None = None) -> HeadTable:
        """A table that DuoAttention or PruLong published.

        Parameters
        ----------
        path
            DuoAttention's directory, or a file with the numbers, which may be either's.
        msr
            Share of heads that are sparse, to the nearest head: those with the lowest scores. None
            takes those that score below one half, which is all there is to say of a mask.

        Returns
        -------
        HeadTable
            Its :attr:`streaming` is what DuoAttention's ``config.json`` says, in tokens; here a
            window is counted in blocks, the query's own among them, so it ends up to a block
            earlier. PruLong's file says nothing; its paper has ``Streaming(128, 1024)``.

        Raises
        ------
        FileNotFoundError
            If there is no such file.
        ValueError
            If a file is not as its format has it; the message says where.
        """
        scores, streaming = _read(Path(path))
        table = cls(scores < 0.5) if msr is None else cls.of_scores(scores, msr)
        return cls(table.sparse, streaming)


def _read(path: Path) -> tuple[Tensor, Streaming | None]:
    """Scores ``[layers, kv_heads]`` from 0 to 1, and what streaming heads read."""
    file = path / DUO_SCORES if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"path {path} is neither a file nor a directory with {DUO_SCORES}.")
    rows: list[list[float]] = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = [float(value) for value in line.split("\t")] if line.strip() else []
        except ValueError as error:
            raise ValueError(
                f"path {file}, line {number}: expected numbers between tabs; {error}."
            ) from None
        if not row:
            continue
        if rows and len(row) != len(rows[0]):
            raise ValueError(
                f"path {file}, line {number}: {len(row)} numbers, but {len(rows[0])} in the first."
            )
        rows.append(row)
    scores = torch.tensor(rows, dtype=torch.float64)
    if not rows or not bool(((scores > -0.5) & (scores < 1.5)).all()):
        raise ValueError(
            f"path {file} must hold a number from 0 to 1 per layer (line) and KV head (column)."
        )
    # Trained gates lie a little outside; DuoAttention cuts them off as well.
    streaming = Streaming(*_sizes(path / DUO_SETTINGS)) if path.is_dir() else None
    return scores.clamp(0, 1), streaming


def _sizes(file: Path) -> tuple[int, int]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        return int(settings["sink_size"]), int(settings["recent_size"])
    except FileNotFoundError:
        raise FileNotFoundError(
            f"path {file.parent} has no {file.name}, which says sink_size and recent_size; give "
            f"the path of {DUO_SCORES} itself to do without."
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"path {file} must be a JSON object with sink_size and recent_size; got {error!r}."
        ) from None


def write_duo(path: str | Path, scores: Tensor, sink: int, local: int) -> Path:
    """Write gates ``[layers, kv_heads]`` as DuoAttention does; return the directory."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    _write(path / DUO_SCORES, scores)
    settings = {"sink_size": sink, "recent_size": local}
    (path / DUO_SETTINGS).write_text(json.dumps(settings) + "\n", encoding="utf-8")
    return path


def write_prulong(path: str | Path, sparse: Tensor) -> Path:
    """Write the mask of a table of sparse heads (bool ``[layers, kv_heads]``) as PruLong does."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(path, 1.0 - sparse.double())
    return path


def _write(file: Path, scores: Tensor) -> None:
    lines = ("\t".join(map(repr, row)) for row in scores.double().tolist())
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
