"""Ranges of bytes out of local files, the Hub and fsspec URLs: the one layer that retries, and says so.

Every attempt is a single request; what a retry can cure is retried with exponential back-off until `patience_seconds` are
over, everything else ends at once. Nobody below retries, so waits do not multiply. Tested by tests/test_hub.py.
"""

import dataclasses
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import unquote

import fsspec
from huggingface_hub import get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils import build_hf_headers

from mtl_dist.streams.sources import HUB_URL, Source

log = logging.getLogger("mtl_dist")

Result = TypeVar("Result")
HTTP_ERROR = HfHubHTTPError.__mro__[1]
"""Base of what the Hub's HTTP library raises; that library is another one in other versions of huggingface_hub."""
CURABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
REMEDIES = {
    401: "log in with `hf auth login` or set HF_TOKEN, and check the data set's name",
    403: "accept the data set's terms on its page, or use a token that may read it",
    404: "the file is not there (any more): check path and revision, and start again",
    416: "the file has become shorter since it was listed: start again",
}
LEAST_RATE = 65_536
"""Bytes a second below which a transfer counts as stalled."""
LONGEST_WAIT_SECONDS = 30.0


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
        for name in (
            "timeout_seconds",
            "patience_seconds",
            "first_wait_seconds",
            "cache_gigabytes",
        ):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; use more than 0")


def persist(attempt: Callable[[], Result], remote: Remote, rank: int | None, what: str) -> Result:
    """Call `attempt` until it works; `what` names corpus and shard.

    Raises:
        ShardError: no retry would cure it, or patience is over; at the latest `patience_seconds` and one attempt
            after the first failure.
    """
    who = f"rank {rank if rank is not None else '?'} on {socket.gethostname()}, {what}"
    wait, tries, first_failure = remote.first_wait_seconds, 0, None
    while True:
        tries += 1
        try:
            return attempt()
        except HopelessError as error:
            raise ShardError(f"{who}: {error}") from error
        except TryAgainError as error:
            now = time.monotonic()
            first_failure = first_failure or now
            pause = error.wait if error.wait is not None else wait * random.uniform(0.75, 1.25)
            left = first_failure + remote.patience_seconds - now
            if pause > left:
                asked = (
                    f"; the server asks for {error.wait:.0f} s" if error.wait is not None else ""
                )
                raise ShardError(
                    f"{who}: {error}{asked}; gave up after {tries} attempts in {now - first_failure:.1f} s "
                    f"(patience_seconds: {remote.patience_seconds:g})"
                ) from error
            log.warning("%s: %s; attempt %d, again in %.1f s", who, error, tries, pause)
        time.sleep(pause)
        wait = min(2 * wait, LONGEST_WAIT_SECONDS)


def within(seconds: float, action: Callable[[], Result]) -> Result:
    """Return `action()`, or raise TryAgainError after `seconds`: for libraries that have no time limit of their own.

    The thread of an action that is late stays behind, as a daemon, until the library lets go of it.
    """
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if thread.is_alive():
        raise TryAgainError(f"no answer in {seconds:.0f} s")
    return results[0]


def read_range(file: str, start: int, end: int, received: bytearray, remote: Remote) -> int:
    """Add bytes start .. end - 1 of `file` to `received`, after those that are there; return the file's size.

    What arrived before a failure stays in `received`, and the next attempt goes on from there. A negative start counts
    from the end, where `end` is ignored.

    Raises:
        TryAgainError, HopelessError
    """
    if match := HUB_URL.fullmatch(file):
        size = _from_hub(match, start, end, received, remote)
    elif "://" in file:
        size = _from_url(file, start, end, received, remote)
    else:
        size = _from_disk(file, start, end, received)
    if start >= 0 and len(received) < end - start:
        raise TryAgainError(f"the transfer was cut after {len(received)} of {end - start} bytes")
    return size


def _from_disk(file: str, start: int, end: int, received: bytearray) -> int:
    try:
        with open(file, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            first = start if start >= 0 else max(0, size + start)
            received[:] = os.pread(handle.fileno(), (end if start >= 0 else size) - first, first)
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:
        raise HopelessError(f"{error.strerror}: put the file back or start again") from error
    except OSError as error:  # a shared file system that is away for a moment
        raise TryAgainError(f"{type(error).__name__}: {error}") from error
    if start >= 0 and end > size:
        raise HopelessError(
            f"the file has {size} bytes, fewer than when it was listed: start again"
        )
    return size


def _from_url(file: str, start: int, end: int, received: bytearray, remote: Remote) -> int:
    def fetch() -> tuple[bytes, int]:
        system, path = fsspec.url_to_fs(file)
        if start >= 0:
            return system.cat_file(path, start=start, end=end), -1
        size = system.size(path)
        return system.cat_file(path, start=max(0, size + start), end=size), size

    seconds = remote.timeout_seconds + (end - start) / LEAST_RATE
    try:
        received[:], size = within(seconds, fetch)
    except (FileNotFoundError, PermissionError, ImportError) as error:
        raise HopelessError(f"{type(error).__name__}: {error}") from error
    except TryAgainError:
        raise
    except Exception as error:  # each file system raises errors of its own
        raise TryAgainError(f"{type(error).__name__}: {error}") from error
    return size


def _from_hub(match, start: int, end: int, received: bytearray, remote: Remote) -> int:
    url = hf_hub_url(
        match["repo"], match["path"], repo_type="dataset", revision=unquote(match["revision"])
    )
    span = f"bytes={start + len(received)}-{end - 1}" if start >= 0 else f"bytes={start}"
    if start < 0:
        received.clear()
    headers = build_hf_headers() | {"Range": span, "Accept-Encoding": "identity"}
    try:
        with get_session().stream(
            "GET", url, headers=headers, timeout=remote.timeout_seconds, follow_redirects=True
        ) as response:
            _check_status(response)
            _receive(response.iter_raw(), received, remote.timeout_seconds)
            return int(response.headers["Content-Range"].rpartition("/")[2])
    except (HTTP_ERROR, OSError) as error:
        raise TryAgainError(f"{type(error).__name__}: {error}") from error


def _check_status(response) -> None:
    status = response.status_code
    if status == 206:
        return
    # The server's word only: a redirected URL carries a signature, which must not be in a log.
    said = response.headers.get("X-Error-Message", response.reason_phrase)
    if status in CURABLE_STATUS:
        after = response.headers.get("Retry-After", "")
        raise TryAgainError(f"HTTP {status} ({said})", float(after) if after.isdigit() else None)
    remedy = REMEDIES.get(status, "the server does not serve ranges of bytes")
    raise HopelessError(f"HTTP {status} ({said}): {remedy}")


def _receive(chunks, received: bytearray, timeout: float) -> None:
    """Collect the chunks; a trickle below LEAST_RATE over `timeout` seconds counts as a stall."""
    since, before = time.monotonic(), len(received)
    for chunk in chunks:
        received += chunk
        seconds = time.monotonic() - since
        if seconds > timeout:
            arrived = len(received) - before
            if arrived < LEAST_RATE * seconds:
                raise TryAgainError(f"stalled: {arrived} bytes in {seconds:.1f} s")
            since, before = time.monotonic(), len(received)


def list_files(source: Source, remote: Remote) -> list[str]:
    """One attempt to list the files of a source.

    The layers below retry by themselves here, for as long as a server tells them to: so there is a time limit.

    Raises:
        TryAgainError, HopelessError
    """
    try:
        return within(remote.patience_seconds, source.list_files)
    except (FileNotFoundError, ValueError, ImportError, PermissionError) as error:
        raise HopelessError(f"{error}") from error
    except HfHubHTTPError as error:
        _check_status(error.response)
        raise
    except (HTTP_ERROR, OSError) as error:
        raise TryAgainError(f"{type(error).__name__}: {error}") from error
