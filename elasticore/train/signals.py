"""Signals that end a run in good order: noted while it trains, agreed on at the end of a step."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from torch.utils.data import DataLoader

__all__ = ["SIGNALS", "StopSignals", "Stopped", "shield_workers"]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
"""What schedulers send some time before they kill."""


class Stopped(SystemExit):
    """A run was ended by a signal, with everything saved; the exit code is 128 plus its number.

    Parameters
    ----------
    number
        Of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(128 + number)
        self.signal = signal.Signals(number)


class StopSignals:
    """A context that notes :data:`SIGNALS` in place of what they do otherwise.

    Only the main thread can; elsewhere they keep their meaning. On leaving, the handlers from
    before are back.

    Attributes
    ----------
    received
        The number of a signal that has come in; 0 if none has.
    """

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self.received = 0
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._note) for number in SIGNALS}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: it was not Python's
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = max(self.received, number)


def shield_workers(loader: DataLoader[Any]) -> None:
    """Let the worker processes of a loader live on when a scheduler signals a whole job.

    Slurm sends its signals to every process of a job step. A worker that died of one would end the
    run before it can save. Workers end with the process that started them.
    """
    if loader.num_workers:
        loader.worker_init_fn = _Shield(loader.worker_init_fn)


class _Shield:
    """A worker's start, with the signals ignored; a class, so that it can be sent to a worker."""

    def __init__(self, inner: Any) -> None:
        self.inner = inner

    def __call__(self, worker: int) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        if self.inner is not None:
            self.inner(worker)
