"""What this rank is doing now, and for how long it has been doing what. Tested by tests/test_watchdog.py and test_round.py.

start, data, collective (waiting for other ranks), forward/backward, optimizer, reporting, validation or test, checkpoint.
"""

import collections
import time
from typing import NamedTuple


class Sign(NamedTuple):
    """A rank's sign of life: which phase of which round (counted from 1), since when (Unix time in seconds).

    `place` counts the phases entered so far. All ranks go through the same ones in the same order, so that those with the
    lowest place are those that the others wait for.
    """

    place: int
    phase: str
    round: int
    since: float


class Phases:
    """Written by the main thread; `sign` may be read by others at any time, it is replaced as a whole."""

    def __init__(self):
        self.sign = Sign(0, "start", 0, time.time())
        self._entered = time.perf_counter()
        self._seconds: collections.Counter[str] = collections.Counter()

    def enter(self, phase: str, round_: int | None = None) -> None:
        """End the present phase and begin another, of the same round if none is given; all ranks do, in the same order."""
        now, old = time.perf_counter(), self.sign
        self._seconds[old.phase] += now - self._entered
        self._entered = now
        self.sign = Sign(old.place + 1, phase, old.round if round_ is None else round_, time.time())

    def take(self) -> dict[str, float]:
        """Return {phase: seconds} of all phases that have ended since this was last called."""
        seconds, self._seconds = dict(self._seconds), collections.Counter()
        return seconds
