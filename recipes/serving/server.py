"""vLLM's OpenAI-compatible server on this machine, for as long as it is needed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["Server", "metric", "serve"]


class Server:
    """A server that runs.

    Attributes
    ----------
    url
        Where it listens, on this machine alone.
    log
        The file that it writes to.
    """

    def __init__(self, url: str, log: Path, process: subprocess.Popen[bytes]) -> None:
        self.url, self.log, self._process = url, log, process

    def get(self, path: str) -> str:
        """What the server answers to a GET request."""
        with urllib.request.urlopen(self.url + path, timeout=60) as answer:
            return answer.read().decode()

    @property
    def lives(self) -> bool:
        """Whether it answers that it is well."""
        try:
            self.get("/health")
        except (urllib.error.URLError, OSError):
            return False
        return self._process.poll() is None

    def metric(self, name: str) -> float:
        """The sum of a metric over its labels; 0 if it is not there."""
        return metric(self.get("/metrics"), name)

    def shares(self) -> dict[int, float]:
        """Ω_MSR by the number of a prompt's tokens, from the log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace")
        found = re.findall(r"a prompt of (\d+) tokens, (\S+) % of its heads sparse", lines)
        return {int(tokens): float(share) / 100 for tokens, share in found}


def metric(text: str, name: str) -> float:
    """The sum of a metric over its labels in what ``/metrics`` says; 0 if it is not there."""
    pattern = rf"^{re.escape(name)}(?:{{[^}}]*}})? (\S+)$"
    return sum(map(float, re.findall(pattern, text, re.MULTILINE)))


@contextmanager
def serve(
    model: str | Path,
    settings: Mapping[str, Any] | None,
    arguments: Sequence[str] = (),
    *,
    patience: float = 240,
) -> Iterator[Server]:
    """Start a server and wait until it answers; stop it in the end.

    Parameters
    ----------
    model
        What to serve, under the name ``model``.
    settings
        Those for elasticore; None for vLLM as it is.
    arguments
        Further ones for vLLM.
    patience
        Seconds until it has to answer.

    Raises
    ------
    RuntimeError
        If it ends, or does not answer in time; with the end of its log.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    folder = Path(tempfile.mkdtemp(prefix="elasticore-serving-"))
    metrics = folder / "metrics"
    metrics.mkdir()
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "model", *arguments]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    if settings is not None:
        command += ["--additional-config", json.dumps({"elasticore": settings})]
    environment = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        **os.environ,
        "VLLM_LOGGING_LEVEL": "INFO",  # which Ω is said at
        "PROMETHEUS_MULTIPROC_DIR": str(metrics),
    }
    log = folder / "server.log"
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, env=environment, start_new_session=True
        )
    server = Server(f"http://127.0.0.1:{port}", log, process)
    try:
        end = time.monotonic() + patience
        while not server.lives:
            if process.poll() is not None or time.monotonic() > end:
                last = "\n".join(log.read_text(errors="replace").splitlines()[-30:])
                raise RuntimeError(f"vLLM did not start; its log {log} ends so:\n{last}")
            time.sleep(0.5)
        yield server
    finally:
        _stop(process)
        if sys.exc_info()[0] is None:
            shutil.rmtree(folder, ignore_errors=True)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server and all that it started."""
    for number, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        try:
            os.killpg(process.pid, number)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
