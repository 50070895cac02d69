"""A folder that keeps fetched blocks, bounded in bytes, shared by any number of processes without locks.

A block is a file of its bytes and their checksum, written under a temporary name and renamed. What was not used for
longest goes first. Tested by tests/test_block_cache.py.
"""

import logging
import os
import uuid
import zlib
from pathlib import Path

log = logging.getLogger("mtl_dist")

CHECKSUM_BYTES = 4
FULL, ROOMY = 0.9, 0.8
"""Shares of the limit: room is made when the first is passed, down to the second."""
UNCOUNTED = 1 / 200
"""Share of the limit that a process writes before it looks at the folder again: 20 writers at once stay within it."""
LARGEST = 1 / 20
"""Share of the limit that one block may have; a larger one is not kept."""


class BlockCache:
    """Blocks by key in `folder`, at most `limit` bytes of them. Picklable."""

    def __init__(self, folder: Path, limit: int):
        self.folder, self.limit = Path(folder).expanduser(), limit
        self.uncounted = limit  # so that the first block makes this process look
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(
                f"cache: cannot make the folder {self.folder} ({error.strerror})"
            ) from error

    def get(self, key: str, size: int) -> bytes | None:
        """Return the bytes of a block, or None where it is not there or not whole."""
        path = self.folder / key
        try:
            data = path.read_bytes()
            os.utime(path)  # access times are often switched off
        except FileNotFoundError:
            return None
        except OSError as error:
            log.warning("cache: %s cannot be read (%s)", path, error)
            return None
        block = data[:-CHECKSUM_BYTES]
        if len(block) == size and _checksum(block) == data[-CHECKSUM_BYTES:]:
            return block
        path.unlink(missing_ok=True)
        return None

    def put(self, key: str, block: bytes) -> None:
        """Keep a block, unless it is large; a disk that is full is a warning, and the end of keeping."""
        if len(block) > self.limit * LARGEST:
            return
        temporary = self.folder / f"{key}.{uuid.uuid4().hex}.part"
        try:
            temporary.write_bytes(bytes(block) + _checksum(block))
            temporary.replace(self.folder / key)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            log.warning("cache %s: no more blocks are kept (%s)", self.folder, error)
            self.limit = 0
            return
        self.uncounted += len(block)
        if self.uncounted > self.limit * UNCOUNTED:
            self._make_room()
            self.uncounted = 0

    def _make_room(self) -> None:
        found = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # another process makes room, too
                    continue
                found.append((stat.st_mtime_ns, stat.st_size, entry.path))
        total = sum(size for _, size, _ in found)
        if total <= self.limit * FULL:
            return
        for _, size, path in sorted(found):
            if total <= self.limit * ROOMY:
                return
            Path(path).unlink(missing_ok=True)
            total -= size


def _checksum(block: bytes) -> bytes:
    return zlib.crc32(block).to_bytes(CHECKSUM_BYTES, "little")
