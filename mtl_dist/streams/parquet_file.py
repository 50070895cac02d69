"""A Parquet file with its footer: its blocks are its row groups."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterable

import numpy as np
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
    plain_groups,
    plain_values,
)
from mtl_dist.streams.retry import HopelessError, Remote
from mtl_dist.streams.shard_file import Ask, Audio, ShardFile
from mtl_dist.streams.sources import Source

FOOTERS = 256
"""Files of which a process keeps the parsed footer, about 0.3 MB each: parsed again for every block they cost more, because
what they leave behind cuts up the heap."""


@dataclasses.dataclass(eq=False, kw_only=True)
class ParquetFile(ShardFile):
    """A Parquet file."""

    footer: bytes
    """Compressed."""
    groups: np.ndarray
    """Of each row group: its rows, and where its audio begins and ends; int64 (row groups, 3)."""

    @functools.lru_cache(maxsize=FOOTERS)  # noqa: B019  bounded, and files live as long as their process
    def meta(self) -> pq.FileMetaData:
        """Return the parsed footer."""
        return parse_footer(zlib.decompress(self.footer))

    def rows(self) -> list[int]:
        """Return how many rows each row group has."""
        return self.groups[:, 0].tolist()

    def block_name(self, block: int) -> str:
        """Return the number of the row group."""
        return f"row group {block}"

    def audio_ranges(self, block: int, source: Source) -> list[tuple[int, int]]:
        """Return where the bytes of audio lie."""
        return [tuple(self.groups[block, 1:].tolist())]

    def audio(self, block: int, source: Source, parts: dict[int, bytes]) -> list[Audio]:
        """Return the audio of each row, by Arrow where it is not stored plainly."""
        (chunk,) = parts.values()
        values = plain_values(memoryview(chunk), int(self.groups[block, 0]))
        if values is not None:
            return values
        leaf = self.meta().schema.column(audio_leaf(self.meta(), source)).path
        table = self._decode([block], [leaf], parts)
        while pa.types.is_struct(table.schema.field(0).type):
            table = pa.Table.from_struct_array(table.column(0))
        return table.column(0).to_pylist()

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


def audio_leaf(meta: pq.FileMetaData, source: Source) -> int:
    """Return the number of the leaf column that holds the bytes of audio."""
    name = source.column("audio")
    paths = [meta.schema.column(i).path for i in range(meta.num_columns)]
    return paths.index(name) if name in paths else paths.index(f"{name}.bytes")


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
        meta = parse_footer(footer)
        check_columns(meta.schema.to_arrow_schema(), source)
        groups = plain_groups(meta, audio_leaf(meta, source))
    except (ValueError, OSError, pa.ArrowException) as error:
        raise HopelessError(str(error)) from error
    digest = hashlib.blake2b(footer, digest_size=8).hexdigest()
    return ParquetFile(
        path=path,
        source=number,
        size=size,
        footer=zlib.compress(footer, 1),
        digest=digest,
        groups=groups,
    )
