"""What a file of blocks is to those who read them: streams/parquet_file.py and streams/tar_file.py are the two kinds.

A file is what a rank sends to the others, with its footer or index, so that they need not ask for it.
"""

import abc
import dataclasses
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import PurePosixPath
from typing import TypeVar

import pyarrow as pa

from mtl_dist.streams.sources import HUB_URL, Source

Audio = bytes | memoryview | None
"""An audio file in memory; None or nothing where a row has none."""
Result = TypeVar("Result")
Ask = Callable[[Callable[[], Result]], Result]
"""Makes attempts until one works, and names corpus and file when none does: streams/retry.py's `persist`."""


@dataclasses.dataclass(eq=False, kw_only=True)
class SourceFile:
    """A file of a source (its number). Small and picklable."""

    path: str
    source: int
    size: int
    digest: str
    """Of the footer or index, or what a listing says; another digest means that the clips may not be the same."""

    def shown(self) -> str:
        """Return the path for messages: of a Hub file without the commit."""
        match = HUB_URL.fullmatch(self.path)
        return f"{match['repo']}/{match['path']}" if match else self.path


@dataclasses.dataclass(eq=False, kw_only=True)
class ShardFile(SourceFile, abc.ABC):
    """A file of blocks of rows, each in ranges of bytes of its own.

    A range is (first byte, byte after the last); `parts` is {first byte: bytes} of ranges that were asked for.
    """

    @abc.abstractmethod
    def rows(self) -> list[int]:
        """Return how many rows each block has."""

    @abc.abstractmethod
    def block_name(self, block: int) -> str:
        """Return what to call a block in messages."""

    @abc.abstractmethod
    def audio_ranges(self, block: int, source: Source) -> list[tuple[int, int]]:
        """Return where the audio of a block lies; next to nothing but it."""

    @abc.abstractmethod
    def audio(self, block: int, source: Source, parts: dict[int, bytes]) -> list[Audio]:
        """Return the audio of each row of a block, not decoded; it may be views of `parts`.

        Raises OSError or ValueError where the bytes are not what they were when the file was opened.
        """

    @abc.abstractmethod
    def listing_ranges(
        self, blocks: list[int], source: Source, columns: Iterable[str] | None
    ) -> list[tuple[int, int]]:
        """Return where the columns of a listing of these blocks lie, without audio."""

    @abc.abstractmethod
    def listing(
        self,
        blocks: list[int],
        source: Source,
        columns: Iterable[str] | None,
        parts: dict[int, bytes],
    ) -> pa.Table:
        """Return the rows of these blocks, without audio: our columns by our names, then others; raises as `audio` does."""

    def named_by_key(self, source: Source) -> bool:
        """Return whether ids are keys of this file, which may come in another file of the source too."""
        return False


def names_below(files: Sequence[SourceFile]) -> list[str]:
    """Return for each file its path below the folder that the files of its source share."""
    paths = [PurePosixPath(file.shown()) for file in files]
    parents: dict[int, list[PurePosixPath]] = {}
    for file, path in zip(files, paths, strict=True):
        parents.setdefault(file.source, []).append(path.parent)
    shared = {number: os.path.commonpath(found) for number, found in parents.items()}
    return [
        str(path.relative_to(shared[file.source])) for file, path in zip(files, paths, strict=True)
    ]
