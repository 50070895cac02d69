"""A tar as WebDataset writes it, with an index of its samples: its blocks are runs of them, each read by one request."""

import dataclasses
import functools
import hashlib
import logging
from collections.abc import Iterable

import numpy as np
import pyarrow as pa

from mtl_dist.streams.fetch import read_range, read_tail
from mtl_dist.streams.range_file import FIRST_PIECE, LARGEST_PIECE, RangeFile
from mtl_dist.streams.retry import HopelessError, Remote
from mtl_dist.streams.shard_file import Ask, Audio, ShardFile
from mtl_dist.streams.sources import Source, index_of
from mtl_dist.streams.tar_index import (
    HEADER,
    Member,
    MisplacedError,
    check_header,
    read_headers,
    read_index,
)
from mtl_dist.streams.tar_samples import LISTED, list_samples

log = logging.getLogger("mtl_dist")

INDICES = 32
"""Files of which a process keeps the parsed index."""
LARGEST_INDEX = 1 << 30


@dataclasses.dataclass(eq=False, kw_only=True)
class TarFile(ShardFile):
    """A tar with its index (streams/tar_samples.py), compressed."""

    index: bytes

    @functools.lru_cache(maxsize=INDICES)  # noqa: B019  bounded, and files live as long as their process
    def samples(self) -> pa.Table:
        """Return the index."""
        return pa.ipc.open_stream(self.index).read_all()

    @functools.lru_cache(maxsize=INDICES)  # noqa: B019  as above
    def bounds(self) -> np.ndarray:
        """Return the first sample of each block, and the number of samples at the end: int64 (blocks + 1,)."""
        block = self.samples()["block"].to_numpy()
        return np.searchsorted(block, np.arange(block[-1] + 2))

    def rows(self) -> list[int]:
        """Return how many samples each block has."""
        return np.diff(self.bounds()).tolist()

    def block_name(self, block: int) -> str:
        """Return the numbers of the first and the last sample."""
        first, end = self.bounds()[block : block + 2]
        return f"samples {first} to {end - 1}"

    def audio_ranges(self, block: int, source: Source) -> list[tuple[int, int]]:
        """Return where the block lies, from the header of its first audio to the end of its last."""
        there = [member for member in self._members(block) if member.offset >= 0]
        if not there:
            return []
        return [(there[0].offset - HEADER, there[-1].offset + there[-1].size)]

    def audio(self, block: int, source: Source, parts: dict[int, bytes]) -> list[Audio]:
        """Return the audio of each sample."""
        found = []
        for member in self._members(block):
            data = None
            if member.offset >= 0:
                ((first, part),) = parts.items()
                part, begin = memoryview(part), member.offset - first
                check_header(part[begin - HEADER : begin], member)
                data = part[begin : begin + member.size]
            found.append(data)
        return found

    def listing_ranges(
        self, blocks: list[int], source: Source, columns: Iterable[str] | None
    ) -> list[tuple[int, int]]:
        """Return nothing: what is listed was read with the index."""
        return []

    def listing(
        self,
        blocks: list[int],
        source: Source,
        columns: Iterable[str] | None,
        parts: dict[int, bytes],
    ) -> pa.Table:
        """Return id, label, speaker, seconds and split; others are not kept."""
        return self.samples().select(LISTED.names)

    def named_by_key(self, source: Source) -> bool:
        """Return whether the sample's key is its id."""
        return "id" not in source.columns

    def _members(self, block: int) -> list[Member]:
        first, end = self.bounds()[block : block + 2]
        part = self.samples().slice(first, end - first)
        return [
            Member(*values)
            for values in zip(*(part[f].to_pylist() for f in Member._fields), strict=True)
        ]


def load_tar(
    path: str, number: int, source: Source, remote: Remote, ask: Ask, indexed: bool
) -> TarFile:
    """List the samples of a tar of source `number`: by the index file beside it, if `indexed` and it fits, or by headers.

    Only headers and the small members that are listed are read; of a file far away also what lies between where they are
    close. A request each for a local file; each is retried by itself.

    Raises ShardError: it cannot be read, is no tar, cut short, or a sample cannot be listed.
    """

    def fetch(first: int, end: int) -> bytes | bytearray:
        received = bytearray()
        return ask(lambda: read_range(path, first, end, received, remote)[0])

    _, size = ask(lambda: read_tail(path, 1, remote))
    file = RangeFile(fetch, size, LARGEST_PIECE if "://" in path else FIRST_PIECE)
    beside = index_of(path)
    text = ask(lambda: read_tail(beside, LARGEST_INDEX, remote))[0] if indexed else b""

    def listed() -> tuple[pa.Table, list[str]]:
        try:
            if indexed:
                try:
                    members = read_index(text.decode("utf-8", "surrogateescape"), file)
                    return list_samples(members, file, source)
                except MisplacedError as error:
                    log.warning(
                        "%s does not fit its tar (%s): the headers are read instead", beside, error
                    )
            return list_samples(read_headers(file), file, source)
        except ValueError as error:
            raise HopelessError(str(error)) from error

    index, lines = ask(listed)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(
        sink, index.schema, options=pa.ipc.IpcWriteOptions(compression="zstd")
    ) as writer:
        writer.write_table(index)
    digest = hashlib.blake2b("\n".join(lines).encode("utf-8", "surrogateescape"), digest_size=8)
    return TarFile(
        path=path,
        source=number,
        size=size,
        digest=digest.hexdigest(),
        index=sink.getvalue().to_pybytes(),
    )
