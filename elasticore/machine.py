"""What this machine is, and what runs on it: what results depend on."""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import platform
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from elasticore import __version__

__all__ = ["capability", "environment", "versions"]

_PACKAGES = ("torch", "triton", "flashinfer-python", "transformers")


def environment(device: torch.device) -> dict[str, Any]:
    """What times depend on: the machine, the versions, the commit, the command, the date."""
    gpu = device.type == "cuda"
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "command": shlex.join(["elasticore", *sys.argv[1:]]),
        "commit": _commit(),
        "gpu": torch.cuda.get_device_name(device) if gpu else None,
        "capability": capability(device),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "cpu": platform.processor() or platform.machine(),
        "cpu_threads": torch.get_num_threads(),
        "versions": {**versions(*_PACKAGES), "cuda": torch.version.cuda, "cudnn": cudnn},
    }


def versions(*packages: str) -> dict[str, str | None]:
    """The versions of Python, of elasticore and of ``packages``; None for one that is missing."""
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "elasticore": __version__,
    }
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = None
    return found


@functools.cache
def capability(device: torch.device) -> str | None:
    """The compute capability of an NVIDIA GPU, such as ``"9.0"``; None for any other device."""
    if device.type != "cuda" or torch.version.cuda is None or not torch.cuda.is_available():
        return None
    return ".".join(map(str, torch.cuda.get_device_capability(device)))


def _commit() -> str | None:
    """The commit of the checkout that this package lies in, with a + if it has been changed."""
    root = str(Path(__file__).resolve().parents[1])
    commit = _output("git", "-C", root, "rev-parse", "HEAD")
    changed = _output("git", "-C", root, "status", "--porcelain", "--untracked-files=no")
    return commit and commit + "+" * bool(changed)


def _output(*command: str) -> str | None:
    """The first line that a command prints; None if it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return next(iter(done.stdout.splitlines()), "")
