"""The files of a source, whose blocks lanes read: of streams, and of rows that are listed.

A block is what is read, and shuffled, at a time: of Parquet a row group, of other formats a file (tars, JSON lines: read
in order, never held whole), of listed rows some of them. Where a source has more than MOST_FOOTERS files their footers are
not read at the start: then a block is a file, and its row groups are its pieces, found when a lane comes to it.
"""

import dataclasses
import functools
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import fsspec
import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset, concatenate_datasets

from mtl_dist.data.columns import FEATURES
from mtl_dist.data.faults import named

MOST_FOOTERS = 256
"""Files whose footers are read at the start, some seconds for the Hub's: LibriSpeech has 64, Common Voice has thousands."""
THREADS = 16
"""Footers that are read at a time."""
ROWS_AT_A_TIME = 1000
"""Largest tables that are asked for; a row group of more is put together."""
LISTED_BLOCKS = 512
"""Blocks that listed rows are cut into, or up to twice as many, of MOST_LISTED_ROWS at most."""
MOST_LISTED_ROWS = 256
LAZY = -1
MOST_RECENT = 128


@dataclasses.dataclass(frozen=True)
class Sample:
    """What is known of files by their first block: the clips in all of them, `exact` or about; a resident block's bytes."""

    clips: int
    exact: bool
    block_bytes: int


@dataclasses.dataclass
class StreamFiles:
    """Files that `datasets` streams. Small and picklable: rank 0 opens them and sends them to the others.

    Attributes:
        names: the files' addresses, in the order of the stream's shards.
        stream: all of them, one shard a file, with our columns.
        resident: whether a block is held whole in memory while a lane reads it.
        sizes: {local file: (bytes, time of change in ns)} when it was opened.
    """

    names: list[str]
    stream: IterableDataset
    resident: bool
    load: Callable[..., IterableDataset] | None = None
    convert: Callable[..., IterableDataset] | None = None
    opened: dict[int, IterableDataset] = dataclasses.field(default_factory=dict)
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    small: IterableDataset | None = None
    recent: dict[int, IterableDataset] = dataclasses.field(default_factory=dict)
    """The files that lanes are at, where the footers of all were too many."""

    @classmethod
    def open(
        cls,
        *,
        names: list[str],
        stream: IterableDataset,
        load: Callable[..., IterableDataset] | None = None,
        convert: Callable[..., IterableDataset] | None = None,
        resident: bool = False,
    ) -> "StreamFiles":
        """Read the footers of files, unless there are too many.

        `load` reads files of row groups again with other `columns`, `convert` gives those our names.
        """
        if len(names) != stream.num_shards:
            names = [f"{names[0]} (shard {n})" for n in range(stream.num_shards)]
        files = cls(names, stream, load is not None or resident, load=load, convert=convert)
        files.sizes = {name: stamp for name in names if (stamp := _stamp(name))}
        if files.resident and len(names) <= MOST_FOOTERS:
            known = pickle.dumps(
                stream
            )  # the Hub's file system keeps listings by thread: those of this one go along
            with ThreadPoolExecutor(THREADS, initializer=pickle.loads, initargs=(known,)) as pool:
                files.opened = dict(enumerate(pool.map(files._open, range(len(names)))))
            files.recent.clear()
        return files

    def _open(self, file: int) -> IterableDataset:
        one = self.opened.get(file) or self.recent.get(file)
        if one is None:
            one = self.stream.shard(num_shards=self.stream.num_shards, index=file)
            with named(self.names[file]):
                one = one.reshard() if self.resident else one
            while len(self.recent) >= MOST_RECENT:
                self.recent.pop(next(iter(self.recent)))
            self.recent[file] = one
        return one

    @property
    def known(self) -> object:
        """What has the listings of the Hub: its file system has them by thread, after a fork none; pickles bring them."""
        return self.stream if self.names[0].startswith("hf://") else None

    def blocks(self) -> np.ndarray:
        """Return (file, piece) of every block: int64 (blocks, 2); LAZY for a piece means all of a file's."""
        if not self.opened:
            return np.array([(n, LAZY) for n in range(len(self.names))], np.int64).reshape(-1, 2)
        counts = [self.opened[n].num_shards for n in range(len(self.names))]
        file = np.repeat(np.arange(len(counts)), counts)
        piece = np.concatenate([np.arange(count) for count in counts])
        return np.stack([file, piece], axis=1)

    def pieces(self, file: int) -> int:
        """Return how many pieces a file has."""
        return self._open(file).num_shards

    def shard(self, file: int, piece: int) -> IterableDataset:
        """Return a piece of a file as a stream; LAZY for all of it."""
        one = self._open(file)
        several = one.num_shards > 1 and piece != LAZY
        return one.shard(num_shards=one.num_shards, index=piece) if several else one

    def read(self, file: int, piece: int) -> Iterator[pa.Table]:
        """Yield a piece's tables with our columns: one, or, where it is not resident, of some rows each.

        Raises:
            ValueError: the file was changed since it was opened.
        """
        name = self.names[file]
        if self.sizes.get(name) != _stamp(name):
            raise ValueError("the file is gone or was changed since it was opened; start again")
        tables = self.shard(file, piece).iter(batch_size=ROWS_AT_A_TIME if self.resident else 16)
        if not self.resident:
            yield from tables
        elif parts := list(tables):
            yield parts[0] if len(parts) == 1 else pa.concat_tables(parts)

    def listing(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield (file, table) of all rows, of row groups without their audio."""
        small = self.load is not None
        stream = self._without_audio() if small else self.stream
        for number, name in enumerate(self.names):
            one = stream.shard(num_shards=len(self.names), index=number)
            with named(name):
                for table in one.iter(batch_size=ROWS_AT_A_TIME if small else 16):
                    yield name, table

    def read_lengths(self, file: int, piece: int) -> Iterator[pa.Table]:
        """Yield what tells how long the clips of a block are: the column seconds, or the audio where there is none."""
        if self.load is not None and "seconds" in self._names():
            if self.small is None:
                self.small = self._without_audio()
            one = self.small.shard(num_shards=self.small.num_shards, index=file).reshard()
            one = one if piece == LAZY else one.shard(num_shards=one.num_shards, index=piece)
            tables = list(one.iter(batch_size=ROWS_AT_A_TIME))
            if not any(table["seconds"].null_count for table in tables):
                yield from tables
                return
        for one in [piece] if piece != LAZY else range(self.pieces(file)):
            yield from self.read(file, one)

    def _names(self) -> dict[str, str]:
        """Return {our column: the data set's} of those that are there, but for the audio."""
        there, named = self.load().column_names, self.convert.keywords["source"].columns
        names = {name: named.get(name, name) for name in FEATURES if name != "audio"}
        return {name: theirs for name, theirs in names.items() if theirs in there}

    def _without_audio(self) -> IterableDataset:
        return self.convert(self.load(columns=list(self._names().values())), audio=False)

    def name(self, file: int, piece: int) -> str:
        """Return what a block is called in messages."""
        return self.names[file] + (f", row group {piece}" if self.resident and piece >= 0 else "")

    def sample(self) -> "Sample":
        """Read the first block, and so find out whether it can be read; tell the rest by it, or by the data set's card.

        Raises:
            ValueError: it cannot be read, or all are empty.
        """
        split = (self.stream.info.splits or {}).get(str(self.stream.split))
        for file, piece in self.blocks().tolist():
            with named(self.names[file]):
                piece = max(0, piece) if self.resident else LAZY
                first = next(self.read(file, piece), pa.table({}))
            if rows := len(first):
                break
        else:
            raise ValueError(
                f"{self.names[0]}: holds no clips, nor do the others of {len(self.names)} files"
            )
        size = sum(len((a or {}).get("bytes") or b"") for a in first["audio"].to_pylist())
        held = size if self.resident else 0
        if split is not None and split.num_examples:
            return Sample(split.num_examples, True, held)
        if self.opened:
            return Sample(rows * len(self.blocks()), len(self.blocks()) == 1, held)
        some = self.names[:: max(1, len(self.names) // 64)]
        every = sum(map(_size, some)) * len(self.names) / len(some) if size else 0
        if not every:  # a user's own stream
            rows = len(self.names) * sum(map(len, self.read(0, LAZY)))
        return Sample(max(rows, round(every * rows / max(1, size))), False, held)

    def fingerprint(self) -> dict[str, str]:
        """Return {file: what tells it from another state of it}: on a disk bytes and time, on the Hub the commit."""
        folders = [os.path.dirname(name) + "/" for name in self.names]
        common = os.path.commonprefix(folders).rpartition("/")[0] + "/"  # noqa: RUF071 (of addresses, too)
        return {
            name.removeprefix(common): "-".join(map(str, self.sizes.get(name, ()))) or _key(name)
            for name in self.names
        }

    def unseen(self) -> str | None:
        """Return a file on a disk that is not there for this process as it was for the one that opened it."""
        return next((n for n, stamp in self.sizes.items() if _stamp(n) != stamp), None)

    def select(self, blocks: np.ndarray) -> IterableDataset:
        """Return some blocks as one stream."""
        return concatenate_datasets([self.shard(*block) for block in blocks.tolist()])


@dataclasses.dataclass
class RowFiles:
    """Listed rows, whose audio lies in files of their own: a Dataset with our columns, in the order of its blocks."""

    rows: Dataset
    resident: bool = True
    systems: list = dataclasses.field(default_factory=list)
    """The fsspec file systems of URLs."""

    @property
    def known(self) -> object:
        """As StreamFiles has it."""
        return self.systems

    @functools.cached_property
    def size(self) -> int:
        """Rows of a block."""
        return min(MOST_LISTED_ROWS, max(1, len(self.rows) // LISTED_BLOCKS))

    @functools.cached_property
    def table(self) -> pa.Table:
        """All rows."""
        return self.rows.with_format("arrow")[:]

    def blocks(self) -> np.ndarray:
        """As StreamFiles has it."""
        count = -(-len(self.rows) // self.size)
        return np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1)

    def pieces(self, file: int) -> int:
        """As StreamFiles has it."""
        return 1

    def read(self, file: int, piece: int) -> Iterator[pa.Table]:
        """Yield the table of a block."""
        yield self.table[file * self.size : (file + 1) * self.size]

    def read_lengths(self, file: int, piece: int) -> Iterator[pa.Table]:
        """As StreamFiles has it."""
        return self.read(file, piece)

    def name(self, file: int, piece: int) -> str:
        """As StreamFiles has it."""
        return f"listed rows from {file * self.size} on"

    def unseen(self) -> str | None:
        """As StreamFiles has it, of the first row: the others lie beside it."""
        path = self.rows[0]["audio"]["path"] if len(self.rows) else None
        return path if path and "://" not in path and not os.path.exists(path) else None

    def select(self, blocks: np.ndarray) -> IterableDataset:
        """Return some blocks as one stream."""
        numbers = [n for f, _ in blocks.tolist() for n in range(f * self.size, (f + 1) * self.size)]
        rows = self.rows.select([n for n in numbers if n < len(self.rows)])
        return rows.to_iterable_dataset(num_shards=min(64, max(1, len(rows))))


def _stamp(name: str) -> tuple[int, int] | None:
    if "://" in name:
        return None
    try:
        found = os.stat(name)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns


def _size(name: str) -> int:
    system, path = fsspec.url_to_fs(name)
    return (system.size(path) or 0) if system.exists(path) else 0


def _key(name: str) -> str:
    """Return what tells a file at a URL from another state of it; a Hub's is pinned by the commit in its name."""
    if "://" not in name:
        return "shard"
    if name.startswith("hf://"):
        return name.split("@")[1].split("/")[0] if "@" in name else name
    system, path = fsspec.url_to_fs(name)
    return str(system.ukey(path))
