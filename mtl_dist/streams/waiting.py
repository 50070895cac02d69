"""Reads that may never answer: they get a time limit, and say in the log what they wait for while they last.

Tested by tests/test_waiting.py.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator
from typing import TypeVar

log = logging.getLogger("mtl_dist")

Result = TypeVar("Result")
LOOK_SECONDS = 0.25
"""How often a process looks at what it waits for."""


class Reader:
    """A thread that does what it is told, one action after another: starting a thread for each would cost 0.2 ms."""

    def __init__(self):
        self.actions: queue.SimpleQueue = queue.SimpleQueue()
        self.outcomes: queue.SimpleQueue = queue.SimpleQueue()
        self.given_up = False
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while not self.given_up:
            action = self.actions.get()
            try:
                self.outcomes.put((action(), None))
            except BaseException as error:
                self.outcomes.put((None, error))


_idle: list[Reader] = []


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Return `action()`, or raise TimeoutError after `seconds`: for whatever has no time limit of its own.

    A read of a file system that is away cannot be interrupted: its thread stays behind, as a daemon, until it is.
    """
    try:
        reader = _idle.pop()
    except IndexError:
        reader = Reader()
    reader.actions.put(action)
    try:
        result, error = reader.outcomes.get(timeout=seconds)
    except queue.Empty:
        reader.given_up = True
        raise TimeoutError(f"no answer in {seconds:.1f} s") from None
    _idle.append(reader)
    if error is not None:
        raise error
    return result


@dataclasses.dataclass(eq=False)
class Wait:
    """Something that is waited for; `what` names who waits and for what, `attempt` is not shown where it is 0."""

    what: str
    since: float
    next_note: float
    attempt: int = 0


_waits: set[Wait] = set()
_watcher: list[threading.Thread] = []
_starting = threading.Lock()


@contextlib.contextmanager
def told(what: str, first_seconds: float) -> Iterator[Wait]:
    """Log `what` after `first_seconds` inside the `with`, and again after two, four, eight times as long."""
    if not _watcher:
        with _starting:
            if not _watcher:
                _watcher.append(threading.Thread(target=_watch, daemon=True))
                _watcher[0].start()
    now = time.monotonic()
    wait = Wait(what, now, now + first_seconds)
    _waits.add(wait)
    try:
        yield wait
    finally:
        _waits.discard(wait)


def _watch() -> None:
    while True:
        time.sleep(LOOK_SECONDS)
        now = time.monotonic()
        for wait in _waits.copy():
            if now >= wait.next_note:
                so_far = now - wait.since
                wait.next_note = wait.since + 2 * so_far
                attempt = f", attempt {wait.attempt}" if wait.attempt else ""
                log.warning("%s: waiting for data for %.1f s%s", wait.what, so_far, attempt)


def _forget_threads() -> None:
    """Forget, in a forked process, the threads that were left with its parent."""
    global _starting
    _idle.clear()
    _waits.clear()
    _watcher.clear()
    _starting = threading.Lock()


os.register_at_fork(after_in_child=_forget_threads)
