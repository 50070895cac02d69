"""Shards of a corpus: the row groups of its Parquet files, each a block that is read at once, by one request.

`datasets` finds the files of a data set (configurations, splits, the commit). The blocks are not read through its
streaming: that opens the file and parses its whole footer for every block (15 ms a block of files of 288 blocks, 0.9 ms
here), asks the server again for what is known, and retries in three layers whose waits multiply (20 times 60 s and more).
Here one rank lists and reads the footers, and sends the object to the others: they never ask for a list or a footer.
Memory: the footers, compressed (110 bytes a block of 8 columns), and those of 256 files parsed.
Tested by tests/test_shards.py and tests/test_hub.py.
"""

import functools
import hashlib
import os
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist.streams.block_cache import BlockCache
from mtl_dist.streams.columns import listed_columns, with_our_names
from mtl_dist.streams.fetch import list_files, read_range
from mtl_dist.streams.parquet import Window
from mtl_dist.streams.retry import HopelessError, Remote, ShardError, persist, speaker
from mtl_dist.streams.shard_file import ShardFile, load_file
from mtl_dist.streams.sources import Source

THREADS = 16
"""Requests at a time while footers and listings are read."""


class Shards:
    """The blocks of a corpus in a fixed order. Small, and picklable for loader workers and other ranks.

    Attributes:
        rows: rows of each block, int64 (blocks,).
        files: file of each block.
        source: number of the source that each block is of, int64 (blocks,).
        rank: of the process, for messages; set it where the object is received.
    """

    def __init__(self, corpus: str, sources: list[Source], files: list[ShardFile], remote: Remote):
        self.corpus, self.sources, self.remote = corpus, sources, remote
        self.rank: int | None = None
        self.cache = (
            BlockCache(Path(remote.cache), int(remote.cache_gigabytes * 1e9))
            if remote.cache
            else None
        )
        self._files = files
        places, rows = [], []
        for number, file in enumerate(files):
            meta = file.meta()
            for group in range(meta.num_row_groups):
                if count := meta.row_group(group).num_rows:
                    places.append((number, group))
                    rows.append(count)
        self.files = [files[number].path for number, _ in places]
        self._places = np.array(places, np.int64).reshape(-1, 2)
        self.rows = np.array(rows, np.int64)
        self.source = np.array([files[number].source for number, _ in places], np.int64)

    @classmethod
    def open(
        cls,
        corpus: str,
        sources: Source | str | Sequence[Source | str],
        remote: Remote | None = None,
        rank: int | None = 0,
    ) -> "Shards":
        """List the files and read their footers: on one rank, which sends the object to the others.

        Raises:
            ShardError: a source is not there or has no rows, or a file is cut short or lacks a column.
            ValueError: no sources.
        """
        remote = remote or Remote()
        sources = [sources] if isinstance(sources, Source | str) else sources
        sources = [s if isinstance(s, Source) else Source(path=s) for s in sources]
        if not sources:
            raise ValueError(f"corpora.{corpus}: there are no sources; name at least one")
        files: list[ShardFile] = []
        for number, source in enumerate(sources):
            what = f"corpus {corpus}, source {source.path}"
            paths = persist(functools.partial(list_files, source, remote), remote, rank, what)
            found = _in_threads(
                lambda path, number=number, source=source: persist(
                    lambda: load_file(path, number, source, remote),
                    remote,
                    rank,
                    f"corpus {corpus}, {path}",
                ),
                paths,
            )
            if not sum(file.meta().num_rows for file in found):
                raise ShardError(f"{what}: there are no rows in its {len(found)} files")
            files += found
        shards = cls(corpus, sources, files, remote)
        shards.rank = rank
        return shards

    def __len__(self) -> int:
        return len(self.rows)

    def weights(self) -> list[float] | None:
        """Return the weight of each source, or None if they have none."""
        weights = [source.weight for source in self.sources]
        return None if None in weights else weights

    def name(self, block: int) -> str:
        """Return file and row group of a block, for messages."""
        number, group = self._places[block]
        return f"{self._files[number].shown()}, row group {group}"

    def fingerprint(self) -> dict[str, str]:
        """Return {"source 0: FILE": size and digest of its footer}, FILE below the folder that a source's files share.

        So it stays the same when the files are copied to another place, at another time.
        """
        found = {}
        for number in range(len(self.sources)):
            files = [file for file in self._files if file.source == number]
            paths = [PurePosixPath(file.shown()) for file in files]
            shared = os.path.commonpath([path.parent for path in paths])
            for file, path in zip(files, paths, strict=True):
                name = f"source {number}: {path.relative_to(shared)}"
                found[name] = f"{file.size}-{file.digest}"
        return found

    def refuse_changes(self, saved: dict[str, str]) -> None:
        """Compare with a fingerprint of earlier. Raises ShardError naming the first file that is not the same."""
        now = self.fingerprint()
        for file in sorted({*now, *saved}):
            if now.get(file) != saved.get(file):
                how = "is new" if file not in saved else "is gone" if file not in now else "changed"
                raise ShardError(
                    f"corpus {self.corpus}, {file} {how} since the checkpoint was written, and with it the order of "
                    "clips; put the files back as they were, or start a new run"
                )

    def read(self, block: int) -> list[dict]:
        """Read the audio of all rows of a block, not decoded: [{"bytes": bytes or None, "path": str or None}].

        One request. Raises ShardError naming rank, corpus, file, row group and the reason.
        """
        number, group = self._places[block].tolist()
        file = self._files[number]
        audio = [self.sources[file.source].column("audio")]
        parts = {
            start: self._block_bytes(file, start, end, self.name(block))
            for start, end in file.ranges([group], audio)
        }
        values = self._decode(file, [group], audio, parts, self.name(block)).column(0).to_pylist()
        if values and all(isinstance(value, bytes | None) for value in values):
            values = [{"bytes": value} for value in values]
        return [
            {"bytes": (value or {}).get("bytes"), "path": (value or {}).get("path")}
            for value in values
        ]

    def listing(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return all rows in the order of blocks, without audio: our columns by our names, then the others.

        Columns `block` and `place` (row within the block) are added, int64. `columns` limits the others to these of
        the data set's names. Only the bytes of the columns are read.

        Raises:
            ShardError: as `read` does, and where a column has another type in another file.
        """
        wanted = [
            listed_columns(file.meta().schema.to_arrow_schema(), self.sources[file.source], columns)
            for file in self._files
        ]
        groups = [
            self._places[self._places[:, 0] == n, 1].tolist() for n in range(len(self._files))
        ]
        spans = [
            (number, *span)
            for number, file in enumerate(self._files)
            for span in file.ranges(groups[number], wanted[number])
        ]
        fetched = _in_threads(
            lambda span: self._fetch(self._files[span[0]], *span[1:], self._files[span[0]].shown()),
            spans,
        )
        parts: list[dict[int, bytes]] = [{} for _ in self._files]
        for (number, start, _), data in zip(spans, fetched, strict=True):
            parts[number][start] = data
        tables = []
        for number, file in enumerate(self._files):
            table = self._decode(file, groups[number], wanted[number], parts[number], file.shown())
            tables.append(with_our_names(table, self.sources[file.source]))
        table = self._joined(tables)
        place = np.concatenate([np.arange(count) for count in self.rows])
        table = table.append_column("block", pa.array(np.repeat(np.arange(len(self)), self.rows)))
        return table.append_column("place", pa.array(place))

    def _joined(self, tables: list[pa.Table]) -> pa.Table:
        schema = tables[0].schema
        for file, table in zip(self._files, tables, strict=True):
            try:
                schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
            except pa.ArrowException as error:
                raise ShardError(
                    f"corpus {self.corpus}, {file.shown()}: a column has another type than in {self._files[0].shown()} "
                    f"({error}); write both alike"
                ) from error
        return pa.concat_tables(tables, promote_options="permissive")

    def _fetch(self, file: ShardFile, start: int, end: int, what: str) -> bytes | bytearray:
        received = bytearray()

        def attempt() -> bytes | bytearray:
            data, size = read_range(file.path, start, end, received, self.remote)
            if size not in (None, file.size):
                raise HopelessError(f"the file has {size} bytes and had {file.size}; start again")
            return data

        return persist(attempt, self.remote, self.rank, f"corpus {self.corpus}, {what}")

    def _block_bytes(self, file: ShardFile, start: int, end: int, what: str) -> bytes | bytearray:
        if self.cache is None or "://" not in file.path:
            return self._fetch(file, start, end, what)
        words = f"{file.path} {file.size} {file.digest} {start} {end}"
        key = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
        data = self.cache.get(key, end - start)
        if data is None:
            data = self._fetch(file, start, end, what)
            self.cache.put(key, data)
        return data

    def _decode(
        self, file: ShardFile, groups: list[int], columns: list[str], parts: dict, what: str
    ) -> pa.Table:
        try:
            # Without pre_buffer, which would join ranges across bytes that were not fetched.
            window = Window(parts, file.size)
            reader = pq.ParquetFile(window, metadata=file.meta(), pre_buffer=False)
            return reader.read_row_groups(groups, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ShardError(
                f"{speaker(self.rank)}, corpus {self.corpus}, {what}: its bytes are damaged, or the file was changed in "
                f"place ({error}); write or fetch it again and start again"
            ) from error


def _in_threads(action, items: Sequence) -> list:
    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(action, items))
