"""Where the benchmarks' data are: a folder of your own, or the Hugging Face cache."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download

__all__ = ["Row", "find", "longbench_e", "longbench_v2", "ruler"]

Row = dict[str, Any]  # a sample as the benchmark publishes it


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


def _rows(text: str) -> list[Row]:
    return [json.loads(line) for line in text.split("\n") if line.strip()]


def longbench_e(task: str, folder: str | Path | None) -> list[Row]:
    """The rows of a LongBench-E task: `data/<task>_e.jsonl` in the published `data.zip`.

    Parameters
    ----------
    task
        As "qasper".
    folder
        Holds `longbench/data.zip`, as it is downloaded; None as in :func:`find`.

    Raises
    ------
    FileNotFoundError
        If the archive, or the task in it, is missing.
    """
    archive = find("THUDM/LongBench", "data.zip", folder and Path(folder) / "longbench")
    name = f"data/{task}_e.jsonl"
    with zipfile.ZipFile(archive) as files:
        if name not in files.namelist():
            raise FileNotFoundError(
                f"{archive} holds no {name}; download data.zip of THUDM/LongBench again"
            )
        return _rows(files.read(name).decode())


def longbench_v2(folder: str | Path | None) -> list[Row]:
    """The rows of LongBench-v2, from `longbench-v2/data.json` in the folder, or the hub.

    Parameters
    ----------
    folder
        None as in :func:`find`.
    """
    path = find("THUDM/LongBench-v2", "data.json", folder and Path(folder) / "longbench-v2")
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))
    return rows


def ruler(task: str, length: int, tokenizer: str, folder: str | Path | None) -> list[Row]:
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

    Raises
    ------
    FileNotFoundError
        If the file is missing; one line says how to make it.
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
    return _rows(path.read_text(encoding="utf-8"))
