"""Audio files at URLs, a clip or a recording each: opened where they lie, and read by the pieces that are asked for.

The beginnings of large files, with their headers, are kept, so that a stretch of a recording is one request. Memory of a
process: 16 MiB of beginnings a corpus, and of an open file one piece: at most 1 MiB, or the stretch that was asked for.
Tested by tests/test_audio_files_by_url.py.
"""

import collections
import dataclasses
import functools
from collections.abc import Callable, Iterable

from mtl_dist.streams.range_file import LARGEST_PIECE, RangeFile
from mtl_dist.streams.shard_file import SourceFile

PIECE = 65_536
"""Least bytes of a request: two seconds of 16 bits at 16 kHz."""
SMALL = 4 * PIECE
"""Files of at most so many bytes are fetched whole, by one request."""
BEGINNINGS = 256
"""Files of a corpus whose first piece a process keeps."""

Fetch = Callable[[SourceFile, int, int], bytes]
"""Returns the bytes first .. end - 1 of a file."""


@dataclasses.dataclass(eq=False, kw_only=True)
class AudioFile(SourceFile):
    """A file that is a clip itself; `name` is its path below the folder of its source."""

    name: str


class AudioFiles:
    """The audio files of a corpus, by their paths. Small, and picklable before the first is read."""

    def __init__(self, files: Iterable[AudioFile]):
        self.by_path = {file.path: file for file in files}
        self._beginnings: collections.OrderedDict[str, bytes] = collections.OrderedDict()

    def open(self, path: str, fetch: Fetch) -> RangeFile:
        """Open a file; a request is made when something is read. Reading raises what `fetch` raises."""
        file = self.by_path[path]
        first_piece = file.size if file.size <= SMALL else PIECE
        fetch_known = functools.partial(self._fetch, file, fetch)
        return RangeFile(fetch_known, file.size, LARGEST_PIECE, max(1, first_piece))

    def _fetch(self, file: AudioFile, fetch: Fetch, first: int, end: int) -> bytes:
        beginning = self._beginnings.get(file.path, b"")
        if end <= len(beginning):
            self._beginnings.move_to_end(file.path)
            return beginning[first:end]
        data = fetch(file, first, end)
        if first == 0 and file.size > SMALL:
            self._beginnings[file.path] = bytes(data[:PIECE])
            while len(self._beginnings) > BEGINNINGS:
                self._beginnings.popitem(last=False)
        return data


def in_pieces(first: int, end: int, size: int) -> list[tuple[int, int]]:
    """Return the pieces of a file that are kept in a cache, always the same, and that hold bytes first .. end - 1."""
    begins = range(first - first % LARGEST_PIECE, end, LARGEST_PIECE)
    return [(begin, min(size, begin + LARGEST_PIECE)) for begin in begins]
