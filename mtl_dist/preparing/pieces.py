"""Which pieces of which files go into which shard: known before any sound is read, and a function of list and seed.

A clip is one piece, from its first frame to its last. CHiME-3's recordings are cut at the borders of the stretches that
each split may hear (corpora/noise.py), and these into pieces of at most 10 s.
"""

import dataclasses
import hashlib
import itertools
import math
from collections.abc import Iterable
from pathlib import Path

from mtl_dist.corpora.base import shuffled
from mtl_dist.corpora.noise import SPLIT_SPANS

RATE = 16_000
NOISE_SECONDS = 10
BYTES_PER_SECOND = {"flac": 0.6 * 2 * RATE, "wav": 2 * RATE}
"""What 16 kHz speech takes with 16 bits, about (FLAC of LibriSpeech: 0.57 of its samples' bytes)."""


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """`frames` frames from `start` of a file with `rate` Hz, and what its row says."""

    id: str
    path: str
    name: str
    """What the file is called in the manifest: its path within the published folder."""
    label: str | None
    speaker: str | None
    split: str
    start: int
    frames: int
    rate: int
    encoding: str = "flac"
    """How it will be stored, flac or wav."""

    @property
    def seconds(self) -> float:
        """How long it is."""
        return self.frames / self.rate

    @property
    def bytes(self) -> float:
        """About how much it will take."""
        return self.seconds * BYTES_PER_SECOND[self.encoding]


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file to be written, and the pieces in it, in order."""

    split: str
    file: str
    pieces: list[Piece]


def expected_bytes(pieces: Iterable[Piece]) -> float:
    """Return about how many bytes the pieces will take."""
    return sum(piece.bytes for piece in pieces)


def name_within(folder: Path, path: Path) -> str:
    """Return a path as it is called below `folder`, or as it is if it lies elsewhere."""
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)


def cut(row: dict, name: str, frames: int, rate: int, kind: str, encoding: str) -> list[Piece]:
    """Return the pieces of a file of `frames` frames at `rate` Hz."""
    common = {"path": str(row["path"]), "name": name, "label": row["label"]}
    common |= {"speaker": row["speaker"], "rate": rate, "encoding": encoding}
    if kind != "chime3":
        return [Piece(id=row["id"], split=row["split"], start=0, frames=frames, **common)]
    spans = []
    for split, (low, high) in SPLIT_SPANS.items():
        start, stop = int(low * frames), int(high * frames)
        count = math.ceil((stop - start) / (NOISE_SECONDS * rate))
        borders = [start + (stop - start) * i // count for i in range(count)] + [stop]
        spans += [(split, a, b) for a, b in itertools.pairwise(borders)]
    return [
        Piece(id=f"{row['id']}_{n:04d}", split=split, start=a, frames=b - a, **common)
        for n, (split, a, b) in enumerate(spans)
    ]


def plan_shards(
    pieces: list[Piece], seed: int, rows_per_group: int, shard_mb: float
) -> list[Shard]:
    """Shuffle the pieces of each split by the seed and cut them into shards of about `shard_mb`, by their durations.

    A shard holds whole row groups of `rows_per_group` pieces, as long as all of its pieces can be used.
    """
    by_id = {piece.id: piece for piece in pieces}
    ids_of: dict[str, list[str]] = {}
    for piece in pieces:
        ids_of.setdefault(piece.split, []).append(piece.id)
    shards = []
    for split in sorted(ids_of):
        order = [by_id[i] for i in shuffled(ids_of[split], seed, "prepare", split)]
        groups = [order[i : i + rows_per_group] for i in range(0, len(order), rows_per_group)]
        total = expected_bytes(order)
        target = total / max(1, round(total / (1e6 * shard_mb)))
        begins = [0.0, *itertools.accumulate(expected_bytes(group) for group in groups)]
        numbers = [int(begin / target) for begin in begins[:-1]]
        parts = [
            [piece for _, group in part for piece in group]
            for _, part in itertools.groupby(zip(numbers, groups, strict=True), key=lambda p: p[0])
        ]
        shards += [
            Shard(split, f"{split}-{n:05d}-of-{len(parts):05d}.parquet", part)
            for n, part in enumerate(parts)
        ]
    return shards


def list_digest(pieces: list[Piece], sizes: dict[str, int], unusable: list[dict]) -> str:
    """Return a digest of what is to be prepared: another list of files, or another file in it, has another."""
    digest = hashlib.blake2b(digest_size=16)
    for p in sorted(pieces, key=lambda piece: piece.id):
        facts = (p.id, p.name, p.label, p.speaker, p.split, p.start, p.frames, p.rate)
        digest.update(repr((*facts, sizes[p.path])).encode())
    for entry in sorted(unusable, key=lambda entry: entry["file"]):
        digest.update(repr((entry["file"], entry["reason"])).encode())
    return digest.hexdigest()
