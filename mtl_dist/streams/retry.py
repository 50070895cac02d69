"""The one layer that retries what is read from afar: exponential back-off, in the log, and an end in bounded time.

An attempt raises TryAgainError for what another attempt may cure and HopelessError for what none will; `persist` makes
a ShardError of what is left, which names rank, host, corpus and shard. Tested by tests/test_hub_faults.py.
"""

import dataclasses
import logging
import random
import socket
import time
from collections.abc import Callable
from typing import TypeVar

from mtl_dist.streams.waiting import Wait, told

log = logging.getLogger("mtl_dist")

Result = TypeVar("Result")
LONGEST_WAIT_SECONDS = 30.0
FIRST_NOTE = 1 / 4
"""Share of timeout_seconds after which the log says what is waited for."""


class ShardError(RuntimeError):
    """A shard cannot be read and no retry would cure it; names rank, corpus, file, row group and the reason."""


class TryAgainError(Exception):
    """An attempt failed in a way that another may cure; `wait` is how many seconds the server asked for."""

    def __init__(self, reason: str, wait: float | None = None):
        super().__init__(reason)
        self.wait = wait


class HopelessError(Exception):
    """An attempt failed in a way that no other cures; the text says why and what to do."""


@dataclasses.dataclass(kw_only=True)
class Remote:
    """How shards are fetched, and how long a fault of network or file system is borne."""

    timeout_seconds: float = 20.0
    """An attempt ends when nothing, or next to nothing, has arrived for so long."""
    patience_seconds: float = 120.0
    """From the first failed attempt on, how long to retry before the run ends."""
    first_wait_seconds: float = 1.0
    """Wait after the first failed attempt; doubled after each, up to 30 s. A server's Retry-After takes its place."""
    cache: str | None = None
    """Folder that keeps fetched blocks for later epochs and runs (not those of local files); none by default."""
    cache_gigabytes: float = 20.0
    """Size that the cache may have; the blocks that were not used for longest make room."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, int | float) and value <= 0:
                raise ValueError(f"{field.name}: {value} is not allowed; use more than 0")


def persist(attempt: Callable[[], Result], remote: Remote, rank: int | None, what: str) -> Result:
    """Call `attempt` until it works; `what` names corpus and shard. The log says what is waited for while it lasts.

    Raises:
        ShardError: no retry would cure it, or patience is over; `patience_seconds` and one attempt after the first
            failure at the latest.
    """
    who = f"{speaker(rank)}, {what}"
    with told(who, FIRST_NOTE * remote.timeout_seconds) as wait:
        return _persist(attempt, remote, who, wait)


def _persist(attempt: Callable[[], Result], remote: Remote, who: str, wait: Wait) -> Result:
    pause_next, first_failure = remote.first_wait_seconds, None
    while True:
        wait.attempt += 1
        try:
            return attempt()
        except HopelessError as error:
            raise ShardError(f"{who}: {error}") from error
        except TryAgainError as error:
            now = time.monotonic()
            first_failure = now if first_failure is None else first_failure
            # Spread, so that a thousand ranks do not come back in the same instant.
            pause = (pause_next if error.wait is None else error.wait) * random.uniform(1, 1.25)
            if now + pause > first_failure + remote.patience_seconds:
                asked = "" if error.wait is None else f"; the server asks for {error.wait:.0f} s"
                raise ShardError(
                    f"{who}: {error}{asked}; gave up after attempt {wait.attempt}, {now - first_failure:.1f} s after the "
                    f"first failure (patience_seconds: {remote.patience_seconds:g}); check the network or try later"
                ) from error
            log.warning("%s: %s; attempt %d, again in %.1f s", who, error, wait.attempt, pause)
        time.sleep(pause)
        pause_next = min(2 * pause_next, LONGEST_WAIT_SECONDS)


def speaker(rank: int | None) -> str:
    """Return who speaks in a message: rank, where known, and host."""
    host = socket.gethostname()
    return f"host {host}" if rank is None else f"rank {rank} on {host}"
