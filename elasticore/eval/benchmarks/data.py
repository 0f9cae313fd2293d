"""Where the benchmarks' data are: a folder of your own, or the Hugging Face cache."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from huggingface_hub import hf_hub_download

from elasticore.checks import check_type

__all__ = ["Fields", "Row", "find", "longbench_e", "longbench_v2", "ruler"]

Row = dict[str, Any]  # a sample as the benchmark publishes it
Fields = Mapping[str, Any]
"""The names of what rows hold, each with its type. What may be None may be missing; else it holds
something."""


def find(repository: str, file: str, folder: str | Path | None) -> Path:
    """A file of a data set: from a folder, or else from the Hugging Face cache or hub.

    Parameters
    ----------
    repository
        The data set's name on the hub.
    file
        The file's name there.
    folder
        Holds the file under its own name. None asks the cache, then the hub; `HF_HUB_OFFLINE=1`
        and `HF_HOME` work as everywhere.

    Raises
    ------
    FileNotFoundError
        If it is nowhere; one line says what to download and where to put it.
    """
    if folder is not None:
        path = Path(folder) / file
        if path.is_file():
            return path
        raise FileNotFoundError(
            f"{path} is missing; download {file} of the data set {repository} from "
            f"https://huggingface.co/datasets/{repository}/resolve/main/{file} and put it there"
        )
    try:
        return Path(hf_hub_download(repository, file, repo_type="dataset"))
    except (OSError, ValueError) as error:  # not found, no network, offline mode
        raise FileNotFoundError(
            f"{file} of the data set {repository} is not in the Hugging Face cache and could not "
            f"be downloaded ({type(error).__name__}); where there is a network, run 'hf download "
            f"--repo-type dataset {repository} {file}', or pass the folder of its data"
        ) from error


def _rows(text: str, place: str, fields: Fields) -> list[Row]:
    """The rows of JSON lines."""
    lines = [line for line in text.split("\n") if line.strip()]
    return [_row(line, f"{place}, row {number}", fields) for number, line in enumerate(lines, 1)]


def _row(row: Any, where: str, fields: Fields) -> Row:
    """A row, perhaps still as JSON, that holds what it must; ``ValueError`` names what it lacks."""
    try:
        row = json.loads(row) if isinstance(row, str) else row
        json.dumps(row, ensure_ascii=False).encode()  # half of a character pair is no text
        check_type("the row", row, dict[str, Any])
        for name, accepted in fields.items():
            value = row.get(name)
            if value is None and not _optional(accepted):
                raise ValueError(f"{name} is missing")
            check_type(name, value, accepted)
            if value in ("", []) and accepted in (str, list[str]):
                raise ValueError(f"{name} is empty")
    except (ValueError, TypeError) as error:
        why = str(error).rstrip(".")
        raise ValueError(f"{where}: {why}; make or download the file again.") from error
    return dict(row)


def _optional(accepted: Any) -> bool:
    return type(None) in get_args(accepted)


def _some(rows: list[Row], place: object) -> list[Row]:
    if not rows:
        raise ValueError(f"{place} holds no row; make or download it again.")
    return rows


def longbench_e(task: str, folder: str | Path | None, fields: Fields) -> list[Row]:
    """The rows of a LongBench-E task: `data/<task>_e.jsonl` in the published `data.zip`.

    Parameters
    ----------
    task
        As "qasper".
    folder
        Holds `longbench/data.zip`, as it is downloaded; None as in :func:`find`.
    fields
        Of each row.

    Raises
    ------
    FileNotFoundError
        If the archive, or the task in it, is missing.
    ValueError
        If the archive is damaged, or a row is wrong; the message names both.
    """
    archive = find("THUDM/LongBench", "data.zip", folder and Path(folder) / "longbench")
    name = f"data/{task}_e.jsonl"
    again = "download data.zip of THUDM/LongBench again"
    try:
        with zipfile.ZipFile(archive) as files:
            if name not in files.namelist():
                raise FileNotFoundError(f"{archive} holds no {name}; {again}")
            text = files.read(name).decode()
    except (zipfile.BadZipFile, UnicodeDecodeError, EOFError) as error:
        raise ValueError(f"{archive} is damaged: {error}; {again}") from error
    return _some(_rows(text, f"{archive}, {name}", fields), f"{archive}, {name}")


def longbench_v2(folder: str | Path | None, fields: Fields) -> list[Row]:
    """The rows of LongBench-v2, from `longbench-v2/data.json` in the folder, or the hub.

    Parameters
    ----------
    folder
        None as in :func:`find`.
    fields
        Of each row.

    Raises
    ------
    FileNotFoundError
        If the file is missing.
    ValueError
        If it is damaged, or a row is wrong; the message names both.
    """
    path = find("THUDM/LongBench-v2", "data.json", folder and Path(folder) / "longbench-v2")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        check_type("the file", found, list[Any])
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged: {error}; download it again.") from error
    rows = [_row(row, f"{path}, row {number}", fields) for number, row in enumerate(found, 1)]
    return _some(rows, path)


def ruler(
    task: str, length: int, tokenizer: str, folder: str | Path | None, fields: Fields
) -> list[Row]:
    """The rows of a RULER task at a length, as NVIDIA's `prepare.py` writes them.

    Parameters
    ----------
    task
        As "niah_single_1".
    length
        Tokens of prompt and answer.
    tokenizer
        The name of the tokenizer that the rows were made for: the samples fill the length by its
        count.
    folder
        Holds `ruler/<tokenizer>/<length>/<task>/validation.jsonl`.
    fields
        Of each row.

    Raises
    ------
    FileNotFoundError
        If the file is missing; one line says how to make it.
    ValueError
        If it is no UTF-8 text, or a row is wrong; the message names both.
    """
    place = Path(folder or "data", "ruler", tokenizer, str(length))
    path = place / task / "validation.jsonl"
    if folder is None or not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing; RULER is made for a tokenizer, not downloaded: in scripts/data of "
            f"https://github.com/NVIDIA/RULER run 'python prepare.py --save_dir {place} --task "
            f"{task} --max_seq_length {length} --benchmark synthetic --model_template_type base "
            "--num_samples 500 --tokenizer_type hf --tokenizer_path <the tokenizer>' and pass the "
            f"folder of the data, {Path(folder or 'data')}"
        )
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is no UTF-8 text: {error}; make it again.") from error
    return _some(_rows(text, str(path), fields), path)
