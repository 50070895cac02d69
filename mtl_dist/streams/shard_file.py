"""A Parquet file with its footer: what a rank sends to the others so that they need not ask for it."""

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist.streams.columns import check_columns
from mtl_dist.streams.fetch import read_tail
from mtl_dist.streams.parquet import (
    TAIL_BYTES,
    chunk_range,
    footer_bytes,
    joined,
    leaves,
    parse_footer,
)
from mtl_dist.streams.retry import HopelessError, Remote
from mtl_dist.streams.sources import HUB_URL, Source

FOOTERS = 256
"""Files of which a process keeps the parsed footer, about 0.3 MB each: parsed again for every block they cost more, because
what they leave behind cuts up the heap."""


@dataclasses.dataclass(eq=False, kw_only=True)
class ShardFile:
    """A file of a source (its number), with its footer."""

    path: str
    source: int
    size: int
    footer: bytes
    """Compressed."""
    digest: str

    @functools.lru_cache(maxsize=FOOTERS)  # noqa: B019  bounded, and files live as long as their process
    def meta(self) -> pq.FileMetaData:
        """Return the parsed footer."""
        return parse_footer(zlib.decompress(self.footer))

    def shown(self) -> str:
        """Return the path for messages: of a Hub file without the commit."""
        match = HUB_URL.fullmatch(self.path)
        return f"{match['repo']}/{match['path']}" if match else self.path

    def ranges(self, groups: Iterable[int], columns: list[str]) -> list[tuple[int, int]]:
        """Return where the bytes of these row groups' columns begin and end, and nothing but them."""
        numbers = leaves(self.meta(), columns)
        return joined(chunk_range(self.meta(), group, leaf) for group in groups for leaf in numbers)


def load_file(path: str, number: int, source: Source, remote: Remote) -> ShardFile:
    """Read the footer of a file of source `number`, one attempt: one request, two where it is longer than TAIL_BYTES.

    Raises:
        TryAgainError, HopelessError: of the transport; or the file is no Parquet, cut short or lacks a column.
    """
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
    return ShardFile(
        path=path, source=number, size=size, footer=zlib.compress(footer, 1), digest=digest
    )
