"""How long a search may take. What it has found when the time is up, or when the user interrupts, stands."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from math import inf
from time import monotonic
from types import FrameType
from typing import TypeVar

Found = TypeVar("Found")


class OutOfTime(Exception):
    """The time of a stage is up, or the user has interrupted."""


class Clock:
    """The time of one search, in stages: each may take until a share of the whole is over.

    Attributes:
        cut: names of the stages that were cut short or did not begin.
        interrupted: whether the user has; what is under way then ends at the next `check`, and no stage begins.
    """

    def __init__(self, minutes: float | None = None) -> None:
        self.seconds = inf if minutes is None else 60.0 * minutes
        self.begin = monotonic()
        self.cut: list[str] = []
        self.interrupted = False
        self._until = inf

    def attempt(
        self, name: str, stage: Callable[[], Found], until_share: float = 1.0, *, begin_late: bool = False
    ) -> Found | None:
        """What the stage returns; None if it was cut short or did not begin. With `begin_late` it begins even out of time."""
        self._until = self.begin + until_share * self.seconds
        try:
            if not begin_late:
                self.check()
            return stage()
        except OutOfTime:
            self.cut.append(name)
            return None
        finally:
            self._until = inf

    def check(self) -> None:
        """Raises OutOfTime if the time of the stage is up, or if the user has interrupted."""
        if self.interrupted or monotonic() >= self._until:
            raise OutOfTime

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within it, in the main thread, Ctrl-C ends stages at their next check, a second one all at once.

        So nothing that a stage has half written is taken for its result.
        """
        before = signal.getsignal(signal.SIGINT)
        if threading.current_thread() is not threading.main_thread() or before in (signal.SIG_IGN, None):
            yield
            return

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.interrupted:
                raise KeyboardInterrupt
            self.interrupted = True

        signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)
