"""Shards of a corpus: the row groups of its Parquet files, each a block that is read at once by one request.

`datasets` resolves the files of a Hub data set (configurations, splits, commits). The blocks themselves are not read
through its streaming: that opens the file and parses the whole footer for every block (17 ms a block of a 288-block
file against 0.4 ms here), asks the server again for what is known, and retries in three layers whose waits multiply.
Here rank 0 lists and reads the footers once, and the object goes to the others: no rank lists again.
Memory: the footers, compressed, and those of FOOTERS files parsed. Tested by tests/test_shards.py and tests/test_hub.py.
"""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist.streams.fetch import (
    HopelessError,
    Remote,
    ShardError,
    list_files,
    persist,
    read_range,
)
from mtl_dist.streams.parquet import (
    TAIL_BYTES,
    Window,
    chunk_range,
    footer_bytes,
    joined,
    leaves,
    parse_footer,
)
from mtl_dist.streams.sources import COLUMNS, HUB_URL, Source

THREADS = 16
"""Requests at a time while footers and listings are read."""
FOOTERS = 32
"""Files of which a process keeps the parsed footer."""


@dataclasses.dataclass(eq=False, kw_only=True)
class ShardFile:
    """A file, its size and its footer (compressed)."""

    path: str
    source: int
    size: int
    footer: bytes
    digest: str

    @functools.lru_cache(maxsize=FOOTERS)  # noqa: B019  bounded, and the files live as long as the run
    def meta(self) -> pq.FileMetaData:
        """Return the parsed footer."""
        return parse_footer(zlib.decompress(self.footer))

    def shown(self) -> str:
        """Return the path for messages: of a Hub file without the commit."""
        match = HUB_URL.fullmatch(self.path)
        return f"{match['repo']}/{match['path']}" if match else self.path


class Shards:
    """The blocks of a corpus in a fixed order. Small, and picklable for loader workers and other ranks.

    Attributes:
        rows: rows of each block, int64 (blocks,).
        files: file of each block.
        source: number of the source that each block is of, int64 (blocks,).
        rank: for messages; set by the rank that received the object.
    """

    def __init__(self, corpus: str, sources: list[Source], files: list[ShardFile], remote: Remote):
        self.corpus, self.sources, self.remote, self.rank = corpus, sources, remote, None
        self._files = files
        places, rows = [], []
        for number, file in enumerate(files):
            meta = file.meta()
            for group in range(meta.num_row_groups):
                if count := meta.row_group(group).num_rows:
                    places.append((number, group))
                    rows.append(count)
        self._places = np.array(places, np.int32).reshape(-1, 2)
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
        """List the files and read their footers: for one rank, which sends the object to the others.

        Raises:
            ShardError: a source is not there, has no rows or lacks a column, or a file is not as it should be.
        """
        remote = remote or Remote()
        if isinstance(sources, Source | str):
            sources = [sources]
        sources = [Source(path=s) if isinstance(s, str) else s for s in sources]
        files: list[ShardFile] = []
        for number, source in enumerate(sources):
            what = f"corpus {corpus}, source {source.path}"
            paths = persist(functools.partial(list_files, source, remote), remote, rank, what)

            def load(path: str, number: int = number) -> ShardFile:
                return _load_file(path, number, corpus, remote, rank)

            with ThreadPoolExecutor(THREADS) as pool:
                found = list(pool.map(load, paths))
            _check_columns(source, found, corpus)
            files += found
        return cls(corpus, list(sources), files, remote)

    @property
    def files(self) -> list[str]:
        """File of each block."""
        return [self._files[number].path for number, _ in self._places]

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, block: int) -> str:
        """Return file and row group of a block, for messages."""
        number, group = self._places[block]
        return f"{self._files[number].shown()}, row group {group}"

    def fingerprint(self) -> dict[str, str]:
        """Return {file: size and digest of the footer}, which is the same wherever and whenever the file was copied."""
        return {file.shown(): f"{file.size}-{file.digest}" for file in self._files}

    def refuse_changes(self, saved: dict[str, str]) -> None:
        """Compare with a fingerprint of earlier. Raises ShardError naming the first file that is not the same."""
        now = self.fingerprint()
        for file in sorted({*now, *saved}):
            if now.get(file) != saved.get(file):
                how = "is new" if file not in saved else "is gone" if file not in now else "changed"
                raise ShardError(
                    f"corpus {self.corpus}: {file} {how} since the checkpoint was written, so the order of clips "
                    "would be another one; put the file back as it was, or start a new run"
                )

    def read(self, block: int) -> list[dict]:
        """Read the audio of all rows of a block, not decoded: [{"bytes": bytes or None, "path": str or None}].

        One request. Raises ShardError naming rank, corpus, file, row group and the reason.
        """
        number, group = self._places[block]
        file = self._files[number]
        audio = self.sources[file.source].column("audio")
        span = _ranges(file, [group], [audio])
        table = self._table(file, [group], [audio], span, self.name(block))
        column = table.column(0)
        if pa.types.is_struct(column.type):
            return column.to_pylist()
        return [{"bytes": value, "path": None} for value in column.to_pylist()]

    def listing(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return all rows in the order of blocks, without audio: our columns by our names, then the others.

        Columns `block` and `place` (row within the block) are added, int64. `columns` (the data sets' names) limits
        what is read. No byte of audio is read.
        """

        def load(number: int) -> pa.Table:
            return self._listing_of(number, columns)

        with ThreadPoolExecutor(THREADS) as pool:
            tables = list(pool.map(load, range(len(self._files))))
        table = pa.concat_tables(tables, promote_options="default")
        place = np.concatenate([np.arange(count) for count in self.rows])
        table = table.append_column("block", pa.array(np.repeat(np.arange(len(self)), self.rows)))
        return table.append_column("place", pa.array(place))

    def _listing_of(self, number: int, columns: Iterable[str] | None) -> pa.Table:
        file = self._files[number]
        source = self.sources[file.source]
        schema = file.meta().schema.to_arrow_schema()
        wanted = [name for name in schema.names if name != source.column("audio")]
        if columns is not None:
            wanted = [name for name in wanted if name in set(columns)]
        groups = self._places[self._places[:, 0] == number, 1].tolist()
        spans = _ranges(file, groups, wanted)
        table = self._table(file, groups, wanted, spans, file.shown())
        return _with_our_names(table, source)

    def _table(
        self, file: ShardFile, groups: list[int], columns: list[str], spans: list, what: str
    ) -> pa.Table:
        what = f"corpus {self.corpus}, {what}"
        parts = {
            start: _fetch(file, start, end, self.remote, self.rank, what) for start, end in spans
        }
        try:
            window = pq.ParquetFile(Window(parts, file.size), metadata=file.meta())
            return window.read_row_groups(groups, columns=columns, use_threads=False)
        except (pa.ArrowException, OSError) as error:
            raise ShardError(
                f"rank {self.rank}, {what}: its bytes are damaged or the file was changed in place ({error}); write or "
                "fetch it again and start again"
            ) from error


def _fetch(file: ShardFile, start: int, end: int, remote: Remote, rank, what: str) -> bytes:
    received = bytearray()

    def attempt() -> None:
        size = read_range(file.path, start, end, received, remote)
        if size not in (-1, file.size):
            raise HopelessError(f"the file has {size} bytes now, and had {file.size}: start again")

    persist(attempt, remote, rank, what)
    return received


def _load_file(path: str, source: int, corpus: str, remote: Remote, rank: int | None) -> ShardFile:
    """Read the footer of a file: one request, two where it is longer than TAIL_BYTES."""

    def attempt() -> ShardFile:
        tail = bytearray()
        size = read_range(path, -TAIL_BYTES, 0, tail, remote)
        try:
            needed = footer_bytes(tail)
            if needed > size:
                raise ValueError("cut short or damaged: its footer says more than there is")
            if needed > len(tail):
                tail.clear()
                read_range(path, size - needed, size, tail, remote)
            footer = bytes(tail[-needed:])
            parse_footer(footer)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise HopelessError(str(error)) from error
        digest = hashlib.blake2b(footer, digest_size=8).hexdigest()
        return ShardFile(
            path=path, source=source, size=size, footer=zlib.compress(footer, 1), digest=digest
        )

    return persist(attempt, remote, rank, f"corpus {corpus}, {path}")


def _ranges(file: ShardFile, groups: Iterable[int], columns: list[str]) -> list[tuple[int, int]]:
    meta = file.meta()
    numbers = leaves(meta, columns)
    return joined(chunk_range(meta, group, leaf) for group in groups for leaf in numbers)


def _check_columns(source: Source, files: list[ShardFile], corpus: str) -> None:
    """Raise ShardError unless every file has audio as bytes, and our columns with the types that they should have."""
    if not sum(file.meta().num_rows for file in files):
        raise ShardError(f"corpus {corpus}, source {source.path}: no rows in {len(files)} files")
    for file in files:
        schema = file.meta().schema.to_arrow_schema()
        for ours in COLUMNS:
            theirs = source.column(ours)
            where = f"corpus {corpus}, {file.shown()}, column {theirs}"
            if theirs in schema.names:
                kind, (allowed, words) = schema.field(theirs).type, TYPES[ours]
                if not allowed(kind):
                    raise ShardError(f"{where}: type {kind}, but {ours} must be {words}")
            elif ours == "audio" or ours in source.columns:
                raise ShardError(
                    f"{where}: there is no such column (found: {', '.join(schema.names)}); set columns.{ours} of the "
                    "source"
                )


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_audio(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_name(kind: pa.DataType) -> bool:
    return (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_integer(kind)
        or pa.types.is_null(kind)
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind)


TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "audio": (_is_audio, "a struct with bytes, or binary"),
    "id": (_is_name, "a string or a whole number"),
    "label": (_is_name, "a string or a whole number"),
    "speaker": (_is_name, "a string or a whole number"),
    "seconds": (_is_number, "a number"),
}


def _with_our_names(table: pa.Table, source: Source) -> pa.Table:
    """Rename our columns, with labels as class names where the data set has them, as text and seconds as float64."""
    features = datasets.Features.from_arrow_schema(table.schema)
    ours, others = {}, {}
    for name in table.column_names:
        others[name] = table.column(name)
    for our_name in COLUMNS[1:]:
        theirs = source.column(our_name)
        if theirs not in table.column_names:
            continue
        column = others.pop(theirs)
        if isinstance(features[theirs], datasets.ClassLabel):
            names = pa.array(features[theirs].names)
            column = names.take(column.combine_chunks())
        ours[our_name] = column.cast(pa.float64() if our_name == "seconds" else pa.string())
    return pa.table(ours | {name: column for name, column in others.items() if name not in ours})
