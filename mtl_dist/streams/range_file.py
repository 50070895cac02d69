"""A file that is read by ranges of bytes, for libraries that want to read and seek."""

import io
from collections.abc import Callable

FIRST_PIECE, LARGEST_PIECE = 16_384, 1 << 20
"""Bytes of a request: of the first, and of one to which they were doubled while reads lay close to each other."""


class SeekableFile(io.RawIOBase):
    """What is the same in every readable file of a known size."""

    size: int
    position: int = 0

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


class RangeFile(SeekableFile):
    """A file of `size` bytes, read by fetch(first, end): a piece at a time, larger ones where reading goes straight on.

    Only the last piece is kept. One read never takes more than one fetch.
    """

    def __init__(
        self,
        fetch: Callable[[int, int], bytes],
        size: int,
        largest_piece: int,
        first_piece: int = FIRST_PIECE,
    ):
        self.fetch, self.size = fetch, size
        self.first_piece, self.largest_piece = first_piece, largest_piece
        self.start, self.data, self.piece = 0, b"", first_piece

    def read(self, count: int = -1) -> bytes:
        """Return `count` bytes, or those up to the end."""
        first = self.position
        end = self.size if count < 0 else min(self.size, first + count)
        if end <= first:
            return b""
        have = self.start + len(self.data)
        if not self.start <= first <= end <= have:
            close = self.data and self.start <= first <= have + self.piece
            self.piece = min(self.largest_piece, 2 * self.piece) if close else self.first_piece
            # Of the end of a file a whole piece: what is read there is often read from behind.
            self.start = min(first, max(0, self.size - self.piece))
            self.data = self.fetch(self.start, min(self.size, max(end, first + self.piece)))
        self.position = end
        return bytes(self.data[first - self.start : end - self.start])
