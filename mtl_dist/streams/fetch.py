"""Single attempts to list files and to read ranges of bytes: local files, the Hub, and fsspec URLs.

They sort what goes wrong into what a retry can cure and what it cannot (mtl_dist/streams/retry.py), and never put a
token or a signed URL into a message. Tested by tests/test_shards.py and tests/test_hub.py.
"""

import email.utils
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping
from urllib.parse import unquote

import fsspec
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub import constants, get_session, hf_hub_url
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import build_hf_headers, parse_ratelimit_headers

from mtl_dist.streams.retry import HopelessError, Remote, TryAgainError
from mtl_dist.streams.sources import HUB_URL, Listed, Source
from mtl_dist.streams.waiting import within

HTTP_ERROR = HfHubHTTPError.__mro__[1]
"""Base of what the Hub's HTTP library raises; that library is another one in other versions of huggingface_hub."""
CURABLE_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
REMEDIES = {
    401: "check the data set's name; if it is private, log in with `hf auth login` or set HF_TOKEN",
    403: "accept the data set's terms on its page, or use a token that may read it",
    404: "it is not there (any more): check path and revision, and start again",
    416: "the file has become shorter since it was listed: start again",
}
OFFLINE = "unset HF_HUB_OFFLINE, or use local files"
LEAST_RATE = 65_536
"""Bytes a second below which a transfer counts as stalled."""


def list_files(source: Source, remote: Remote) -> dict[str, Listed | None]:
    """List the files of a source: one attempt, though the libraries below retry here by themselves.

    They wait for as long as a server tells them to, hence the time limit.

    Raises:
        TryAgainError, HopelessError
    """
    try:
        return within(remote.patience_seconds, source.list_files)
    except TimeoutError as error:
        raise HopelessError(
            f"the files could not be listed: {error} (patience_seconds; warnings of huggingface_hub above say more); "
            "check the network or try later"
        ) from error
    except (HTTP_ERROR, OSError, ValueError, ImportError) as error:
        if constants.HF_HUB_OFFLINE:
            raise HopelessError(f"{error}; {OFFLINE}") from error
        chain = list(_chain(error))
        for link in chain:
            if isinstance(link, HfHubHTTPError):
                _refuse(
                    link.response.status_code, link.server_message, link.response.headers, error
                )
        if any(
            isinstance(link, ConnectionError | TimeoutError) or _of_transport(link)
            for link in chain
        ):
            raise TryAgainError(f"{type(error).__name__}: {error}") from error
        hint = f"; {REMEDIES[401]}" if isinstance(error, DatasetNotFoundError) else ""
        raise HopelessError(f"{type(error).__name__}: {error}{hint}") from error


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it: `datasets` hides the Hub's answer behind errors of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _of_transport(error: BaseException) -> bool:
    return isinstance(error, HTTP_ERROR) and not isinstance(error, HfHubHTTPError)


def read_range(
    file: str, start: int, end: int, received: bytearray, remote: Remote
) -> tuple[bytes | bytearray, int | None]:
    """Return bytes start .. end - 1 of a file, and its size where it is known.

    What arrives of a long transfer before it fails is put into `received`, and the next attempt goes on from there.

    Raises:
        TryAgainError, HopelessError
    """
    if match := HUB_URL.fullmatch(file):
        size = _from_hub(match, f"{start + len(received)}-{end - 1}", received, remote)
        data = received
    elif "://" in file:
        data, size = _from_url(file, start, end, remote)
    else:
        data, size = _from_disk(file, start, end, remote)
    if len(data) != end - start:
        raise TryAgainError(f"the transfer was cut: {len(data)} of {end - start} bytes")
    return data, size


def read_tail(file: str, count: int, remote: Remote) -> tuple[bytes, int]:
    """Return the last `count` bytes of a file (all, if it is shorter) and its size; raises as `read_range` does."""
    if match := HUB_URL.fullmatch(file):
        received = bytearray()
        size = _from_hub(match, f"-{count}", received, remote)
        return bytes(received), size
    if "://" in file:
        return _from_url(file, -count, None, remote)
    return _from_disk(file, -count, None, remote)


def _seconds_allowed(start: int, end: int | None, remote: Remote) -> float:
    """Return how long an attempt may take that has no time limit of its own and does not say how far it has come."""
    span = -start if end is None else end - start
    return min(remote.timeout_seconds + span / LEAST_RATE, remote.patience_seconds)


def _from_disk(file: str, start: int, end: int | None, remote: Remote) -> tuple[bytes, int]:
    def fetch() -> tuple[bytes, int]:
        with open(file, "rb", buffering=0) as handle:
            size = os.fstat(handle.fileno()).st_size
            first, last = _absolute(start, end, size)
            return os.pread(handle.fileno(), last - first, first), size

    try:
        return within(_seconds_allowed(start, end, remote), fetch)
    except (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError) as error:
        raise HopelessError(f"{error.strerror}; put it back, or start again") from error
    except OSError as error:  # a shared file system that is away for a moment
        raise TryAgainError(f"{type(error).__name__}: {error.strerror or error}") from error


def _absolute(start: int, end: int | None, size: int) -> tuple[int, int]:
    """Resolve a start that counts from the end. Raises HopelessError where the file is too short."""
    first, last = (max(0, size + start), size) if end is None else (start, end)
    if last > size:
        raise HopelessError(
            f"the file has become shorter, {size} bytes: put it back, or start again"
        )
    return first, last


def _from_url(file: str, start: int, end: int | None, remote: Remote) -> tuple[bytes, int | None]:
    def fetch() -> tuple[bytes, int | None]:
        if end is not None:
            return system.cat_file(path, start=start, end=end), None
        size = system.info(path)["size"]
        first, last = _absolute(start, end, size)
        return system.cat_file(path, start=first, end=last), size

    try:
        # Outside `within`: fsspec makes, and keeps, one file system for every thread that asks.
        system, path = fsspec.url_to_fs(file)
        return within(_seconds_allowed(start, end, remote), fetch)
    except (FileNotFoundError, PermissionError, ImportError) as error:
        raise HopelessError(f"{type(error).__name__}: {error}; check path and access") from error
    except HopelessError:
        raise
    except (
        Exception
    ) as error:  # every file system has errors of its own, and most are the network's
        raise TryAgainError(f"{type(error).__name__}: {error}") from error


def _from_hub(match: re.Match, span: str, received: bytearray, remote: Remote) -> int:
    url = hf_hub_url(
        match["repo"], match["path"], repo_type="dataset", revision=unquote(match["revision"])
    )
    headers = build_hf_headers() | {"Range": f"bytes={span}", "Accept-Encoding": "identity"}
    try:
        with get_session().stream(
            "GET", url, headers=headers, timeout=remote.timeout_seconds, follow_redirects=True
        ) as response:
            if response.status_code != 206:
                said = response.headers.get("X-Error-Message") or response.reason_phrase
                _refuse(response.status_code, said, response.headers, None)
                raise HopelessError("the server does not serve ranges of bytes (HTTP 200)")
            _receive(response.iter_raw(), received, remote.timeout_seconds)
            return int(response.headers["Content-Range"].rpartition("/")[2])
    except OfflineModeIsEnabled as error:
        raise HopelessError(f"{error}; {OFFLINE}") from error
    except (HTTP_ERROR, OSError) as error:
        raise TryAgainError(f"{type(error).__name__}: {error}") from error


def _refuse(
    status: int, said: str | None, headers: Mapping[str, str], error: Exception | None
) -> None:
    """Raise what an HTTP status of 400 and above stands for; the text of a caught error says more than the server's."""
    if status < 400:
        return
    reason = f"HTTP {status} ({said or 'no reason given'})"
    if status in CURABLE_STATUS:
        raise TryAgainError(reason, _asked_wait(headers)) from error
    text = "" if error is None else f"; {type(error).__name__}: {error}"
    raise HopelessError(f"{reason}: {REMEDIES.get(status, 'no retry will help')}{text}") from error


def _asked_wait(headers: Mapping[str, str]) -> float | None:
    """Return how many seconds the server asks to wait: Retry-After as a number or a date, or the Hub's own header."""
    limit = parse_ratelimit_headers(headers)
    if limit is not None and limit.remaining == 0:
        return float(limit.reset_in_seconds)
    after = headers.get("Retry-After", "")
    if after.isdigit():
        return float(after)
    date = email.utils.parsedate_tz(after)
    return max(0.0, email.utils.mktime_tz(date) - time.time()) if date else None


def _receive(chunks: Iterable[bytes], received: bytearray, timeout: float) -> None:
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
