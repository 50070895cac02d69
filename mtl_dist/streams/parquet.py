"""Parquet out of ranges of bytes: footers, where the columns of a row group lie, and a file that has only these ranges.

So that one row group costs one request, and no byte of audio is read for a listing.
"""

import bisect
import struct
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist.streams.range_file import SeekableFile

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


def plain_groups(meta: pq.FileMetaData, leaf: int) -> np.ndarray:
    """Return for each row group (rows, where a leaf column begins, where it ends): int64 (row groups, 3)."""
    return np.array(
        [
            (meta.row_group(group).num_rows, *chunk_range(meta, group, leaf))
            for group in range(meta.num_row_groups)
        ],
        np.int64,
    ).reshape(-1, 3)


def plain_values(chunk: memoryview, count: int) -> list[memoryview] | None:
    """Return the values of an optional column of bytes as views of its pages, if they are stored plainly, else None.

    That is uncompressed, PLAIN, in data pages of version 1, and none of them null: as `mtl-dist prepare` writes. (Parquet's
    format: github.com/apache/parquet-format, Encodings.md and parquet.thrift.) Arrow would copy all of them, and needs the
    file's whole footer, 9 kB a row group once it is parsed.
    """
    values: list[memoryview] = []
    at = 0
    try:
        while at < len(chunk):
            page, at = thrift_struct(chunk, at)
            if page[PAGE_TYPE] != DATA_PAGE or page[DATA_PAGE_HEADER][ENCODING] != PLAIN:
                return None
            if page[STORED_BYTES] != page[PLAIN_BYTES]:
                return None
            end = at + page[STORED_BYTES]
            at += 4 + int.from_bytes(chunk[at : at + 4], "little")  # which values are null
            while at < end:
                first = at + 4
                at = first + int.from_bytes(chunk[at:first], "little")
                values.append(chunk[first:at])
            if at != end or end > len(chunk):
                return None
    except (IndexError, KeyError, TypeError, ValueError):
        return None
    return values if len(values) == count else None


PAGE_TYPE, PLAIN_BYTES, STORED_BYTES, DATA_PAGE_HEADER, ENCODING = 1, 2, 3, 5, 2
"""Numbers of fields: of PageHeader, the last of DataPageHeader."""
DATA_PAGE, PLAIN = 0, 0
TRUE, FALSE, BYTE, INTEGERS, BINARY, STRUCT = 1, 2, 3, (4, 5, 6), 8, 12
"""Types of Thrift's compact protocol."""


def thrift_struct(data: memoryview, at: int) -> tuple[dict[int, object], int]:
    """Read a struct of Thrift's compact protocol: ({number of the field: value}, where it ends).

    Raises IndexError where the data ends within it, ValueError for types that are not in a page's header.
    """
    fields: dict[int, object] = {}
    number = 0
    while head := data[at]:
        at, kind = at + 1, head & 15
        number += head >> 4
        if head < 16:
            number, at = _zigzag(data, at)
        if kind in (TRUE, FALSE):
            fields[number] = kind == TRUE
        elif kind == BYTE:
            fields[number], at = data[at], at + 1
        elif kind in INTEGERS:
            fields[number], at = _zigzag(data, at)
        elif kind == BINARY:
            size, at = _varint(data, at)
            fields[number], at = data[at : at + size], at + size
        elif kind == STRUCT:
            fields[number], at = thrift_struct(data, at)
        else:
            raise ValueError(f"type {kind} in a page's header")
    return fields, at + 1


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte, at = data[at], at + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, at


def _zigzag(data: memoryview, at: int) -> tuple[int, int]:
    value, at = _varint(data, at)
    return value >> 1 ^ -(value & 1), at


class Window(SeekableFile):
    """A readable file of which only some ranges are there: {start: bytes}."""

    def __init__(self, parts: dict[int, bytes], size: int):
        self.parts, self.size = parts, size
        self.starts = sorted(parts)

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
