"""Faults of networks and disks: how long one is borne, and the one error that it becomes.

`datasets` and huggingface_hub retry by themselves; section `remote` sets their retries, waits and time-outs, and no read
outlasts `patience_seconds`. Tested by tests/test_faults.py.
"""

import contextlib
import dataclasses
import logging
import os
import queue
import re
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from typing import ClassVar, NoReturn, TypeVar

import datasets
import huggingface_hub
from datasets.exceptions import DatasetNotFoundError
from huggingface_hub.errors import HfHubHTTPError

log = logging.getLogger("mtl_dist")

Result = TypeVar("Result")
FIRST_NOTE_SECONDS = 5.0
"""After so long the log says what is waited for, and again after twice, four times as long."""
REMEDIES = {
    401: "check the data set's name; if it is private, log in with `hf auth login` or set HF_TOKEN",
    403: "accept the data set's terms on its page, or use a token that may read it",
    404: "it is not there (any more): check path, config, split and revision",
    416: "the file has become shorter since it was opened: start again",
    429: "the server is asked too often: fewer data.workers, or a prepared copy on a disk",
}
SECRET = re.compile(r"(hf_|api_org_)\w+")
QUERY = re.compile(r"(https?://[^\s'\"?]+)\?[^\s'\")]*")


class DataError(RuntimeError):
    """Data cannot be read and no retry has cured it; names rank, corpus, file and the reason. Ends all ranks together."""


@dataclasses.dataclass(kw_only=True)
class RemoteConfig:
    """How faults of a network or a disk are borne."""

    timeout_seconds: float = 10.0
    """A request to the Hub ends when nothing has arrived for so long (HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_ETAG_TIMEOUT)."""
    retries: int = 5
    """How often `datasets` tries to open and to read (STREAMING_OPEN_MAX_RETRIES, STREAMING_READ_MAX_RETRIES);
    huggingface_hub repeats each request up to 5 times more, after 1, 2, 4, 8 and 8 s or what the server asks for."""
    wait_seconds: float = 5.0
    """Wait of `datasets` between its tries (STREAMING_*_INTERVAL)."""
    patience_seconds: float | None = None
    """Longest patience: a read that takes longer, with all its retries, ends the run. Below run.timeout_seconds; null for
    half of that."""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None and not value > 0:
                raise ValueError(f"{field.name}: {value} is not allowed; use more than 0")

    def apply(self) -> None:
        """Set the libraries' own retries, waits and time-outs, for this process and those that it forks."""
        constants, config = huggingface_hub.constants, datasets.config
        constants.HF_HUB_DOWNLOAD_TIMEOUT = constants.HF_HUB_ETAG_TIMEOUT = self.timeout_seconds
        config.STREAMING_OPEN_MAX_RETRIES = config.STREAMING_READ_MAX_RETRIES = self.retries
        config.STREAMING_OPEN_RETRY_INTERVAL = self.wait_seconds
        config.STREAMING_READ_RETRY_INTERVAL = self.wait_seconds
        config.STREAMING_READ_SERVER_UNAVAILABLE_RETRY_INTERVAL = self.wait_seconds
        config.STREAMING_READ_RATE_LIMIT_RETRY_INTERVAL = self.wait_seconds
        for library in (
            datasets,
            huggingface_hub,
        ):  # a warning of theirs may quote an answer with its signed address
            library.logging.disable_propagation()  # it would be printed twice
            for handler in logging.getLogger(library.__name__).handlers:
                handler.addFilter(_without_secrets)


@contextlib.contextmanager
def named(what: str) -> Iterator[None]:
    """Make any error inside a ValueError whose message begins with `what`: a file, a corpus."""
    try:
        yield
    except Exception as error:  # whatever file systems, transports and formats raise
        if str(error).startswith(what):
            raise
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise ValueError(f"{what}: {kind}{error}") from error


def rank_label(rank: int | None) -> str:
    """Return who speaks in a message: rank, where it is known, and host."""
    host = socket.gethostname()
    return f"host {host}" if rank is None else f"rank {rank} on {host}"


class _Thread:
    """A thread that does one action after the other, and ends when it is asked for None."""

    idle: ClassVar[list["_Thread"]] = []
    given_up: ClassVar[list["_Thread"]] = []

    def __init__(self):
        self.asked, self.done = queue.SimpleQueue(), queue.SimpleQueue()
        self.thread = threading.Thread(target=self._act, daemon=True)
        self.thread.start()

    def _act(self) -> None:
        for action in iter(self.asked.get, None):
            try:
                self.done.put((action(), None))
            except BaseException as error:
                self.done.put((None, error))
            del action  # and what it holds


os.register_at_fork(after_in_child=_Thread.idle.clear)
os.register_at_fork(after_in_child=_Thread.given_up.clear)


def call_with_timeout(action: Callable[[], Result], seconds: float, what: str) -> Result:
    """Return `action()`, or raise TimeoutError after `seconds`; the log says `what` is waited for while it lasts.

    The action runs in a thread, since a read of a file system that is away cannot be interrupted: then the thread stays
    behind, as a daemon.
    """
    try:
        thread = _Thread.idle.pop()
    except IndexError:
        thread = _Thread()
    thread.asked.put(action)
    waited, note = 0.0, min(FIRST_NOTE_SECONDS, seconds)
    while True:
        try:
            result, error = thread.done.get(timeout=note)
            break
        except queue.Empty:
            waited += note
        if waited >= seconds:
            thread.asked.put(None)
            _Thread.given_up.append(thread)
            raise TimeoutError(f"no answer in {seconds:g} s (remote.patience_seconds)")
        log.warning("%s: waiting for data for %.0f s", what, waited)
        note = min(waited, seconds - waited)
    _Thread.idle.append(thread)
    if error is not None:
        raise error
    return result


def exit_with(code: int | str | None) -> NoReturn:
    """As sys.exit; at once where a read that was given up still lasts, as Arrow's threads would crash Python at its end."""
    if any(given_up.thread.is_alive() for given_up in _Thread.given_up):
        if isinstance(code, str):
            print(code, file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1 if isinstance(code, str) else code or 0)
    sys.exit(code)


def reason(error: BaseException) -> str:
    """Return an error in one line, with a remedy where one is known, and neither a token nor a signed address."""
    text = f"{type(error).__name__}: {error}".strip()
    for link in _chain(error):
        if isinstance(link, HfHubHTTPError) and link.response is not None:
            remedy = REMEDIES.get(link.response.status_code, "check the network or try later")
            text = f"{text.splitlines()[0]} (HTTP {link.response.status_code}); {remedy}"
            break
        if isinstance(link, DatasetNotFoundError):  # it has forgotten the Hub's answer
            text += f"; {REMEDIES[403 if 'gated' in str(link) else 401]}"
            break
    if "scripts are no longer supported" in text:
        text += "; use its Parquet copy: revision: refs/convert/parquet"
    return _hidden(" ".join(text.split()))


def _hidden(text: str) -> str:
    return SECRET.sub("hf_***", QUERY.sub(r"\1", text))


def _without_secrets(record: logging.LogRecord) -> bool:
    record.msg, record.args = _hidden(record.getMessage()), None
    return True


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and what caused it: `datasets` hides the Hub's answer behind errors of its own."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
