"""Where the members of a tar lie: from its headers or from an index that NVIDIA DALI's wds2idx wrote; never the audio.

Names are read as WebDataset reads them: a/b.left.flac is the column left.flac of the sample a/b.
"""

import re
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from mtl_dist.streams.range_file import RangeFile

HEADER = tarfile.BLOCKSIZE
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")
ENTRY = re.compile(r"(\S*) (\d+) (\d+) (.+?)(?:$| (?=\S* \d+ \d+ \S))")


class MisplacedError(ValueError):
    """An index does not fit, or a member does not lie where it should."""


class Member(NamedTuple):
    """A file in a tar: where its bytes lie."""

    name: str
    offset: int
    size: int

    def key_and_column(self) -> tuple[str, str] | None:
        """Return the sample and the column, in small letters; None for what is hidden or has no extension."""
        match = NAME.fullmatch(self.name)
        if match is None or match[1].rpartition("/")[2].startswith("__"):
            return None
        return match[1], match[2].lower()


def read_headers(file: RangeFile, start: int = 0) -> Iterator[Member]:
    """Yield the files of a tar from byte `start` on, in order; the position of `file` may be moved in between.

    Raises:
        ValueError: not a tar, cut short, or a damaged header.
    """
    file.seek(start)
    name = None
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            for info in tar:
                name = info.name
                if info.isreg():
                    yield Member(info.name, info.offset_data, info.size)
                tar.members.clear()  # it would keep them all
            end = tar.offset
    except tarfile.TarError as error:
        after = "" if name is None else f" at or after member {name}"
        raise ValueError(
            f"not a tar, cut short or damaged{after} ({error}); write or fetch it again"
        ) from error
    file.seek(end)  # where tarfile is silent about a header that is cut short, damaged or not there
    if file.read(HEADER) != bytes(HEADER):
        after = "" if name is None else f" after member {name}"
        raise ValueError(f"cut short or damaged{after}: it does not end as a tar; fetch it again")


def check_header(header: bytes, member: Member) -> None:
    """Raise MisplacedError unless these bytes, which lie before a member's, are the header of one of its size."""
    try:
        size = tarfile.TarInfo.frombuf(bytes(header), "utf-8", "surrogateescape").size
    except tarfile.TarError as error:
        raise MisplacedError(f"no header lies before member {member.name}: {error}") from error
    if size != member.size:
        raise MisplacedError(f"member {member.name} has {size} bytes, not {member.size}")


def read_member(file: RangeFile, member: Member) -> bytes:
    """Return the bytes of a member. Raises MisplacedError where it is another."""
    file.seek(member.offset - HEADER)
    check_header(file.read(HEADER), member)
    return file.read(member.size)


def read_index(text: str, file: RangeFile) -> list[Member]:
    """Return the members that an index of version 1.2 names, in order; the first, the last and the end are looked at.

    Of tars with extended headers, such as those of WebDataset's TarWriter, wds2idx writes wrong offsets.

    Raises:
        MisplacedError: another version, a line that is cut or damaged, or an index that does not fit the tar.
    """
    try:
        members = sorted(_parsed(text), key=lambda member: member.offset)
        for member in (members[0], members[-1]) if members else ():
            file.seek(member.offset - HEADER)
            check_header(file.read(HEADER), member)
        end = members[-1].offset + members[-1].size if members else 0
        for member in read_headers(file, -(-end // HEADER) * HEADER):
            if member.key_and_column():
                raise ValueError(f"it lacks member {member.name}")
        return members
    except ValueError as error:
        raise MisplacedError(str(error)) from error


def _parsed(text: str) -> Iterator[Member]:
    head, _, body = text.partition("\n")
    lines = body.splitlines()
    if head != f"v1.2 {len(lines)}":
        raise ValueError(f"it begins with {head[:40]!r} and lists {len(lines)} samples")
    for number, line in enumerate(lines, start=2):
        found = list(ENTRY.finditer(line))
        if not found or sum(len(entry[0]) for entry in found) != len(line):
            raise ValueError(f"line {number} is not: extension offset size name ...")
        yield from (Member(entry[4], int(entry[2]), int(entry[3])) for entry in found)
