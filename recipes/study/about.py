"""What every result file says about where it comes from."""

from __future__ import annotations

import os
import platform
import sys
from datetime import date
from typing import Any

import torch
import transformers

import elasticore as ec

__all__ = ["about"]


def about(what: str, program: str) -> dict[str, Any]:
    """The head of a result file: what it is, when, by which command, on what."""
    return {
        "what": what,
        "date": date.today().isoformat(),
        "command": " ".join([program, *sys.argv[1:]]),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else "none (CPU)",
        "cpu_cores": os.cpu_count(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "elasticore": ec.__version__,
        },
    }
