"""Static head patterns on disk, in the formats that DuoAttention and PruLong publish.

Both hold one line per layer and one tab-separated number per KV head, larger for full attention.
DuoAttention writes its gates α into ``full_attention_heads.tsv``, and ``sink_size`` and
``recent_size`` (tokens) into a ``config.json`` beside it. PruLong writes masks of 0 and 1 into a
file such as ``masks_sp0.7.tsv``, in which sink and window are not said.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

__all__ = ["HeadTable", "read_head_table", "write_duo", "write_prulong"]

DUO_SCORES, DUO_SETTINGS = "full_attention_heads.tsv", "config.json"


@dataclass(frozen=True, eq=False)
class HeadTable:
    """A published pattern.

    Attributes
    ----------
    scores
        float64 ``[layers, kv_heads]`` from 0 to 1: 1 = full attention.
    sink, local
        Tokens that a streaming head reads at the start and before the query; None where the file
        does not say.
    """

    scores: Tensor
    sink: int | None = None
    local: int | None = None


def read_head_table(path: str | Path) -> HeadTable:
    """Read a pattern of DuoAttention or PruLong.

    Parameters
    ----------
    path
        DuoAttention's directory, or a file with the numbers, which may be either's.

    Returns
    -------
    HeadTable
        Scores are cut to [0, 1], as DuoAttention does: trained gates lie a little outside.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If a file is not as its format has it; the message says where.
    """
    path = Path(path)
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
    sink, local = _sizes(path / DUO_SETTINGS) if path.is_dir() else (None, None)
    return HeadTable(scores.clamp(0, 1), sink, local)


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
