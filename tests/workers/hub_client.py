"""Functions that tests call in a process whose HF_ENDPOINT is the stand-in for the Hub. Used by tests/test_hub.py."""

import logging
import multiprocessing
import os
import pickle
import time

import datasets
import huggingface_hub

from mtl_dist.streams.retry import Remote, ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source


class Lines(logging.Handler):
    """Collects what is logged."""

    def __init__(self):
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def call(name: str, *args, token: str | None = None, **kwargs) -> dict:
    """Call a function of this module: {"result" or "error", "lines" (of our log, but for
    those that say how long something takes), "all" (of all logs), "seconds"}."""
    ours, everything = Lines(), Lines()
    logging.getLogger("mtl_dist").addHandler(ours)
    root = logging.getLogger()
    root.addHandler(everything)
    os.environ.update({"HF_TOKEN": token} if token else {})
    began = time.monotonic()
    outcome = {}
    try:
        outcome["result"] = globals()[name](*args, **kwargs)
    except ShardError as error:
        outcome["error"] = str(error)
    finally:
        os.environ.pop("HF_TOKEN", None)
        logging.getLogger("mtl_dist").removeHandler(ours)
        root.removeHandler(everything)
    return outcome | {
        "lines": [line for line in ours.lines if ": waiting for data for " not in line],
        "all": everything.lines,
        "seconds": time.monotonic() - began,
    }


def open_shards(corpus: str, sources: list, **remote) -> bytes:
    """Open as rank 0 does, and return what it would send to the others."""
    return pickle.dumps(Shards.open(corpus, sources, Remote(**remote)))


def copied(shards: Shards, block: int) -> list[bytes | None]:
    """Read a block as bytes that can be sent."""
    return [audio and bytes(audio) for audio in shards.read(block)]


def read(sent: bytes, blocks: list[int], rank: int = 3) -> list[list[bytes | None]]:
    """Read blocks as a rank does that has received the object."""
    shards = pickle.loads(sent)
    shards.rank = rank
    return [copied(shards, block) for block in blocks]


def offline(sent: bytes, source: Source) -> list[str]:
    """Return the errors of opening and reading while HF_HUB_OFFLINE is set."""
    errors = []
    libraries = datasets.config, huggingface_hub.constants
    for library in libraries:
        library.HF_HUB_OFFLINE = True
    for action in (lambda: Shards.open("speech", source), lambda: pickle.loads(sent).read(0)):
        try:
            action()
        except ShardError as error:
            errors.append(str(error))
    for library in libraries:
        library.HF_HUB_OFFLINE = False
    return errors


def read_around_a_fork(sent: bytes, block: int) -> list[list[bytes | None]]:
    """Read a block, then in a forked process as a loader's worker does, then here again."""
    shards = pickle.loads(sent)
    before = copied(shards, block)
    with multiprocessing.get_context("fork").Pool(1) as pool:
        inside = pool.apply_async(copied, [shards, block]).get(20)
    return [before, inside, copied(shards, block)]


def warm_up() -> None:
    """Let the process import what it needs."""


def listing(sent: bytes, columns: list[str] | None = None) -> list[dict]:
    """Return the rows of the listing."""
    return pickle.loads(sent).listing(columns).to_pylist()
