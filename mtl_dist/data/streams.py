"""The files of a source, whose blocks lanes read: of streams, and of rows that are listed.

A block is what is dealt to a lane: of Parquet a few row groups side by side, of other formats (tars, JSON lines) a file, of
listed rows some of them. It is read in order, a table at a time (a row group, or 16 rows), and never held whole. At the
start one file is looked into; what turns out to hold nothing, later, is passed over.
"""

import dataclasses
import functools
import os
import pickle
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import IterableDataset, concatenate_datasets
from datasets.table import table_cast

from mtl_dist.data.addresses import is_local, key, size, stamp
from mtl_dist.data.columns import FEATURES, Columns
from mtl_dist.data.faults import named

BLOCK_ROWS, FAR_ROWS, FEWEST_BLOCKS = 64, 16, 128
"""A block is as many row groups as hold so many rows, or fewer where there would be fewer blocks. Of a local file they are
read one by one, and opening it takes as long as reading some rows; at a URL they are fetched by one request, and held."""
ROWS_AT_A_TIME, MOST_ROWS = 16, 1000
"""Rows of a table where there are no row groups, and at most of one where there are."""
MOST_RECENT = 128
"""Files of which a process remembers where their row groups are; so many at URLs are asked for it at the start."""
THREADS = 16
SIZES = 64
"""Files whose sizes tell those of all."""


@dataclasses.dataclass
class StreamFiles:
    """Files that `datasets` streams. Small and picklable: rank 0 opens them and sends them to the others.

    Row groups of a local file are read by Arrow itself, which takes half the time of `datasets` doing it by Arrow.

    Attributes:
        names: the files' addresses, in the order of the stream's shards.
        stream: all of them, one shard a file, with our columns.
        columns: what gives it those.
        load, schema: of Parquet: reads it with other `columns`; what its tables are cast to.
        parts: blocks that a file is cut into.
        rows: of a table.
        table_bytes: of sound in a table, or whatever is in memory at a time.
        clips: how many there are; `exact` unless they were estimated.
        sizes: {local file: (bytes, time of change in ns)} when it was opened.
    """

    names: list[str]
    stream: IterableDataset
    columns: Columns
    load: Callable[..., IterableDataset] | None = None
    schema: pa.Schema | None = None
    parts: int = 1
    rows: int = ROWS_AT_A_TIME
    table_bytes: int = 0
    clips: int = 0
    exact: bool = False
    sizes: dict[str, tuple[int, int]] = dataclasses.field(default_factory=dict)
    recent: dict[tuple[int, bool], IterableDataset] = dataclasses.field(default_factory=dict)

    @classmethod
    def open(
        cls,
        names: list[str],
        stream: IterableDataset,
        columns: Columns,
        load: Callable[..., IterableDataset] | None = None,
    ) -> "StreamFiles":
        """Read the first rows, which tell whether they can be read, and about how many there are and how large.

        Raises:
            ValueError: they cannot be read, or there are none.
        """
        if len(names) != stream.num_shards:
            names = [f"{names[0]} (shard {n})" for n in range(stream.num_shards)]
        rows = MOST_ROWS if load else ROWS_AT_A_TIME
        schema = stream.features.arrow_schema if load else None
        ours = columns.stream(stream, rows, typed=bool(load))
        files = cls(names, ours, columns, load, schema, rows=rows)
        files.sizes = {name: found for name in names if (found := stamp(name))}
        for number, name in enumerate(names):
            with named(name):
                one = files._file(number)
                groups = one.num_shards
                one = one.shard(num_shards=groups, index=0) if groups > 1 else one
                first = next(one.iter(batch_size=rows), ()) if groups else ()
            if len(first):
                break
        else:
            raise ValueError(f"{names[0]}: holds no clips, nor do the others of {len(names)} files")
        sound = [len((audio or {}).get("bytes") or b"") for audio in first["audio"].to_pylist()]
        files.table_bytes = sum(sound)
        if load:
            wanted = (BLOCK_ROWS if is_local(names[0]) else FAR_ROWS) // len(first)
            together = max(1, min(wanted, groups, groups * len(names) // FEWEST_BLOCKS))
            files.table_bytes *= 1 if is_local(names[0]) else together
            files.parts, files.rows = -(-groups // together), len(first)
            files.stream = columns.stream(stream, files.rows, typed=True)
        files.recent.clear()
        if load and not is_local(names[0]) and len(names) <= MOST_RECENT:
            known = pickle.dumps(files.known)  # listings of the Hub, which are by thread
            with ThreadPoolExecutor(THREADS, initializer=pickle.loads, initargs=(known,)) as pool:
                list(pool.map(files._file, range(len(names))))  # once, for all ranks
        files._count(number, groups, len(first))
        return files

    def _count(self, file: int, groups: int, rows: int) -> None:
        """Set how many clips there are: by the data set's card, or by a file's first table and all files' sizes."""
        split = (self.stream.info.splits or {}).get(str(self.stream.split))
        if split is not None and split.num_examples:
            self.clips, self.exact = split.num_examples, True
            return
        some = self.names[:: -(-len(self.names) // SIZES)]
        every = sum(map(size, some)) * len(self.names) / len(some)
        if self.load:
            first = size(self.names[file])
            self.clips = round(groups * rows * (every / first if first else len(self.names)))
            self.exact = groups == len(self.names) == 1
        elif every and self.table_bytes:
            self.clips = round(every * rows / self.table_bytes)
        else:  # a user's own stream
            self.clips = len(self.names) * sum(map(len, self.read(file, 0)))

    def _file(self, file: int, small: bool = False) -> IterableDataset:
        """Return a file as a stream, its row groups as shards; `small`: without audio."""
        one = self.recent.get((file, small))
        if one is None:
            stream = self.without_audio if small else self.stream
            one = stream.shard(num_shards=len(self.names), index=file)
            with named(self.names[file]):
                one = one.reshard() if self.load else one
            while len(self.recent) >= MOST_RECENT:
                self.recent.pop(next(iter(self.recent)))
            self.recent[file, small] = one
        return one

    @functools.cached_property
    def others(self) -> dict[str, str]:
        """{our column: the data set's} of those that are there, but for the audio, of files with row groups."""
        there, theirs = self.schema.names, self.columns.names
        names = {name: theirs.get(name, name) for name in FEATURES if name != "audio"}
        return {name: theirs for name, theirs in names.items() if theirs in there}

    @functools.cached_property
    def without_audio(self) -> IterableDataset:
        """All files with row groups, as a stream of `others`."""
        columns = dataclasses.replace(self.columns, audio=False)
        return columns.stream(self.load(columns=[*self.others.values()]), MOST_ROWS, typed=True)

    @property
    def known(self) -> object:
        """What has the listings of the Hub: its file system has them by thread, after a fork none; pickles bring them."""
        return self.stream if self.names[0].startswith("hf://") else None

    def blocks(self) -> np.ndarray:
        """Return (file, part) of every block: int64 (blocks, 2)."""
        files = np.arange(len(self.names))
        return np.stack(
            [files.repeat(self.parts), np.tile(np.arange(self.parts), len(files))], axis=1
        )

    def shard(self, file: int, part: int, small: bool = False) -> IterableDataset | None:
        """Return a block as a stream; None where the file has fewer row groups than the first."""
        one = self._file(file, small)
        parts = min(self.parts, one.num_shards)
        if parts < 2:
            return one if part < parts else None
        return one.shard(num_shards=parts, index=part) if part < parts else None

    def read(self, file: int, part: int) -> Iterator[pa.Table]:
        """Yield a block's tables with our columns.

        Raises:
            ValueError: the file was changed since it was opened.
        """
        if self.sizes.get(self.names[file]) != stamp(self.names[file]):
            raise ValueError("the file is gone or was changed since it was opened; start again")
        if self.load and is_local(self.names[file]):
            yield from self._row_groups(self.names[file], part)
        elif (one := self.shard(file, part)) is not None:
            tables = one.iter(batch_size=self.rows)
            yield from list(tables) if self.load else tables  # by one request

    def _row_groups(self, name: str, part: int) -> Iterator[pa.Table]:
        with pq.ParquetFile(name, pre_buffer=False) as parquet:
            parts = min(self.parts, parquet.num_row_groups)
            own = np.array_split(range(parquet.num_row_groups), parts)[part] if part < parts else ()
            for group in own:
                for table in _tables(parquet, group):
                    yield self.columns(table_cast(table, self.schema))

    def listing(self) -> Iterator[tuple[str, pa.Table]]:
        """Yield (file, table) of all rows, of row groups without their audio."""
        stream = self.without_audio if self.load else self.stream
        rows = MOST_ROWS if self.load else ROWS_AT_A_TIME
        for number, name in enumerate(self.names):
            with named(name):
                for table in stream.shard(len(self.names), number).iter(batch_size=rows):
                    yield name, table

    def read_lengths(self, file: int, part: int) -> Iterator[pa.Table]:
        """Yield what tells how long the clips of a block are: the column seconds, or the audio where there is none."""
        if self.load and "seconds" in self.others:
            one = self.shard(file, part, small=True)
            tables = list(one.iter(batch_size=MOST_ROWS)) if one else []
            if not any(table["seconds"].null_count for table in tables):
                yield from tables
                return
        yield from self.read(file, part)

    def name(self, file: int, part: int) -> str:
        """Return what a block is called in messages."""
        return self.names[file] + (f", part {part} of {self.parts}" if self.parts > 1 else "")

    def fingerprint(self) -> dict[str, str]:
        """Return {file: what tells it from another state of it}: on a disk bytes and time, on the Hub the commit."""
        folders = [os.path.dirname(name) + "/" for name in self.names]
        common = os.path.commonprefix(folders).rpartition("/")[0] + "/"  # noqa: RUF071 (of addresses, too)
        return {
            name.removeprefix(common): "-".join(map(str, self.sizes.get(name, ()))) or key(name)
            for name in self.names
        }

    def unseen(self) -> str | None:
        """Return a file on a disk that is not there for this process as it was for the one that opened it."""
        return next((n for n, then in self.sizes.items() if stamp(n) != then), None)

    def select(self, blocks: np.ndarray) -> IterableDataset:
        """Return some blocks as one stream."""
        shards = (self.shard(*block) for block in blocks.tolist())
        return concatenate_datasets([shard for shard in shards if shard is not None])


def _tables(parquet: pq.ParquetFile, group: int) -> Iterator[pa.Table]:
    """Yield a row group; a large one some rows at a time, by a reader that takes memory of its own."""
    if parquet.metadata.row_group(group).num_rows <= MOST_ROWS:
        yield parquet.read_row_group(group, use_threads=False)
        return
    for batch in parquet.iter_batches(MOST_ROWS, [group], use_threads=False):
        yield pa.Table.from_batches([batch])
