"""Stopping at the end of a step when the system or the user asks for it."""

import signal
import threading
from types import FrameType
from typing import Self

WATCHED = (signal.SIGTERM, signal.SIGINT)


class TrainingStopped(Exception):
    """A signal ended training early; a checkpoint has been written."""

    of_all_ranks = True


class StopSignal:
    """While entered, remembers SIGTERM and SIGINT instead of dying; a second signal acts as usual, unless it is
    `patient`: where torchrun started this process it sends on what the terminal has sent, and ends it later on.

    Signals reach the main thread only: entered in another thread it watches nothing.
    """

    def __init__(self, patient: bool = False) -> None:
        self.patient = patient
        self.name: str | None = None
        self.before: dict[signal.Signals, object] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self.before = {number: signal.signal(number, self._remember) for number in WATCHED}
        return self

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.name = signal.Signals(number).name
        if not self.patient:
            self._restore()

    def _restore(self) -> None:
        for number, handler in self.before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self.before = {}

    def __exit__(self, *exception: object) -> None:
        self._restore()
