"""Parquet out of ranges of bytes: footers, where the columns of a row group lie, and a file that has only these ranges.

So that one row group costs one request, and no byte of audio is read for a listing.
"""

import bisect
import io
import struct
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

MAGIC = b"PAR1"
TAIL_BYTES = 65_536
"""What is asked for first of a file's end; a second request follows where the footer is longer."""


def footer_bytes(tail: bytes) -> int:
    """Return the size of the footer, with its length and magic number, that `tail` is the end of.

    Raises:
        ValueError: not the end of a Parquet file.
    """
    if len(tail) < 12 or tail[-4:] != MAGIC:
        raise ValueError(
            "not a Parquet file, or cut short: it does not end as one; write or fetch it again"
        )
    return struct.unpack("<I", tail[-8:-4])[0] + 8


def parse_footer(footer: bytes) -> pq.FileMetaData:
    """Parse a footer that ends with its length and magic number."""
    return pq.read_metadata(pa.BufferReader(MAGIC + footer))


def chunk_range(meta: pq.FileMetaData, row_group: int, leaf: int) -> tuple[int, int]:
    """Return where the bytes of a row group's column begin and end in the file."""
    chunk = meta.row_group(row_group).column(leaf)
    start = min(
        offset
        for offset in (chunk.dictionary_page_offset, chunk.data_page_offset)
        if offset is not None and offset > 0
    )
    return start, start + chunk.total_compressed_size


def leaves(meta: pq.FileMetaData, columns: Iterable[str]) -> list[int]:
    """Return the numbers of the leaf columns that the named columns consist of."""
    wanted = set(columns)
    names = (meta.schema.column(i).path.partition(".")[0] for i in range(meta.num_columns))
    return [i for i, name in enumerate(names) if name in wanted]


def joined(ranges: Iterable[tuple[int, int]]) -> list[tuple[int, int]]:
    """Join ranges that touch; what lies between others is not read."""
    result: list[tuple[int, int]] = []
    for start, end in sorted(ranges):
        if result and start <= result[-1][1]:
            result[-1] = result[-1][0], max(end, result[-1][1])
        else:
            result.append((start, end))
    return result


class Window(io.RawIOBase):
    """A readable file of which only some ranges are there: {start: bytes}."""

    def __init__(self, parts: dict[int, bytes], size: int):
        self.parts, self.size, self.position = parts, size, 0
        self.starts = sorted(parts)

    def readable(self) -> bool:
        """Say that it can be read."""
        return True

    def seekable(self) -> bool:
        """Say that it can be read in any order."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move the position."""
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.size}[whence]
        self.position = origin + offset
        return self.position

    def read(self, count: int = -1) -> memoryview:
        """Return `count` bytes, or fewer (none) where they do not lie in one of the ranges."""
        place = bisect.bisect_right(self.starts, self.position) - 1
        if place < 0:
            return memoryview(b"")
        start = self.starts[place]
        first = self.position - start
        data = memoryview(self.parts[start])[first : first + count]
        self.position += len(data)
        return data
