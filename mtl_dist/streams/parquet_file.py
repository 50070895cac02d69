"""A Parquet file with its footer: its blocks are its row groups."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist.streams.columns import check_columns, listed_columns, with_our_names
from mtl_dist.streams.fetch import read_tail
from mtl_dist.streams.parquet import (
    TAIL_BYTES,
    Window,
    chunk_range,
    footer_bytes,
    joined,
    leaves,
    parse_footer,
)
from mtl_dist.streams.retry import HopelessError, Remote
from mtl_dist.streams.shard_file import Ask, ShardFile
from mtl_dist.streams.sources import Source

FOOTERS = 32
"""Files of which a process keeps the parsed footer."""


@dataclasses.dataclass(eq=False, kw_only=True)
class ParquetFile(ShardFile):
    """A Parquet file with its footer, compressed."""

    footer: bytes

    @functools.lru_cache(maxsize=FOOTERS)  # noqa: B019  bounded, and files live as long as their process
    def meta(self) -> pq.FileMetaData:
        """Return the parsed footer."""
        return parse_footer(zlib.decompress(self.footer))

    def rows(self) -> list[int]:
        """Return how many rows each row group has."""
        meta = self.meta()
        return [meta.row_group(group).num_rows for group in range(meta.num_row_groups)]

    def block_name(self, block: int) -> str:
        """Return the number of the row group."""
        return f"row group {block}"

    def audio_ranges(self, block: int, source: Source) -> list[tuple[int, int]]:
        """Return where the column of audio lies."""
        return self._ranges([block], [source.column("audio")])

    def audio(self, block: int, source: Source, parts: dict[int, bytes]) -> list[dict]:
        """Return the audio of each row; it may be plain bytes."""
        values = self._decode([block], [source.column("audio")], parts).column(0).to_pylist()
        if values and all(isinstance(value, bytes | None) for value in values):
            values = [{"bytes": value} for value in values]
        return [
            {"bytes": (value or {}).get("bytes"), "path": (value or {}).get("path")}
            for value in values
        ]

    def listing_ranges(
        self, blocks: list[int], source: Source, columns: Iterable[str] | None
    ) -> list[tuple[int, int]]:
        """Return where our columns and these others (None: all) lie."""
        return self._ranges(blocks, self._listed(source, columns))

    def listing(
        self,
        blocks: list[int],
        source: Source,
        columns: Iterable[str] | None,
        parts: dict[int, bytes],
    ) -> pa.Table:
        """Return our columns, and these others (None: all)."""
        table = self._decode(blocks, self._listed(source, columns), parts)
        return with_our_names(table, source)

    def _listed(self, source: Source, columns: Iterable[str] | None) -> list[str]:
        return listed_columns(self.meta().schema.to_arrow_schema(), source, columns)

    def _ranges(self, blocks: Iterable[int], columns: list[str]) -> list[tuple[int, int]]:
        numbers = leaves(self.meta(), columns)
        return joined(chunk_range(self.meta(), block, leaf) for block in blocks for leaf in numbers)

    def _decode(self, blocks: list[int], columns: list[str], parts: dict[int, bytes]) -> pa.Table:
        # Without pre_buffer, which would join ranges across bytes that were not fetched.
        window = Window(parts, self.size)
        reader = pq.ParquetFile(window, metadata=self.meta(), pre_buffer=False)
        return reader.read_row_groups(blocks, columns=columns, use_threads=False)


def load_parquet(path: str, number: int, source: Source, remote: Remote, ask: Ask) -> ParquetFile:
    """Read the footer of a file of source `number`: one request, two where it is longer than TAIL_BYTES.

    Raises ShardError: it cannot be read, is no Parquet, cut short or lacks a column.
    """
    return ask(lambda: _load(path, number, source, remote))


def _load(path: str, number: int, source: Source, remote: Remote) -> ParquetFile:
    tail, size = read_tail(path, TAIL_BYTES, remote)
    try:
        needed = footer_bytes(tail)
        if needed > len(tail):
            if needed > size:
                raise ValueError("cut short or damaged: the footer would be longer than the file")
            tail, _ = read_tail(path, needed, remote)
        footer = tail[-needed:]
        check_columns(parse_footer(footer).schema.to_arrow_schema(), source)
    except (ValueError, OSError, pa.ArrowException) as error:
        raise HopelessError(str(error)) from error
    digest = hashlib.blake2b(footer, digest_size=8).hexdigest()
    return ParquetFile(
        path=path, source=number, size=size, footer=zlib.compress(footer, 1), digest=digest
    )
