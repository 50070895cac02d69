"""A corpus: for each split, the parts of its sources that lanes read.

Tested by tests/test_corpora.py and tests/test_sources.py.
"""

import dataclasses
import hashlib

from datasets import IterableDataset, concatenate_datasets

from mtl_dist.data.columns import FEATURES
from mtl_dist.data.lanes import Part
from mtl_dist.data.streams import StreamFiles

SPLIT_SPANS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Share of every recording that each split may hear: held-out noise is noise that was not trained on."""


@dataclasses.dataclass(kw_only=True)
class Corpus:
    """The parts of each split, the classes that labels index, and the files that were listed but are not there."""

    name: str
    parts: dict[str, list[Part]] = dataclasses.field(default_factory=dict)
    classes: list[str] = dataclasses.field(default_factory=list)
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """{split, or `any` where a table does not say: paths that are listed and not there}."""
    weights: list[float] | None = None
    """The shares that the sources have of the corpus' clips in a step, by their numbers; None for all clips alike."""
    listed: int = 0
    """Rows that are listed, numbered from 0."""
    in_pieces: bool = False
    """Whether recordings of noise were cut into pieces, of which every split has its own."""
    notes: list[str] = dataclasses.field(default_factory=list)
    """What was decided about it, for the log."""
    sendable: bool = True
    """Whether rank 0 can send it to the others; a stream of a user's own code cannot be: every rank opens it."""

    def stream(self, split: str) -> IterableDataset:
        """Return a split as a stream with the columns of mtl_dist/data/columns.py; audio as bytes or a path, not decoded.

        Raises:
            ValueError: the split has no clips.
        """
        if not self.parts[split]:
            raise ValueError(f"corpora.{self.name}: holds no clips for {split}")
        streams = []
        for part in self.parts[split]:
            whole = isinstance(part.files, StreamFiles)
            whole = whole and len(part.blocks) == len(part.files.blocks())
            stream = part.files.stream if whole else part.files.select(part.blocks)
            stream = stream.select_columns(list(FEATURES)).cast(FEATURES)
            if part.keep is not None:
                stream = stream.with_format(None).filter(part.keep, input_columns="id")
            streams.append(stream.with_format(None))
        return streams[0] if len(streams) == 1 else concatenate_datasets(streams)

    def noise(self, split: str) -> list[Part]:
        """Return what noise for a split is cut from: its own pieces, or a stretch of every recording.

        Raises:
            ValueError: there is nothing.
        """
        if self.in_pieces:
            parts = self.parts[split]
        else:
            span = SPLIT_SPANS[split]
            every = [part for parts in self.parts.values() for part in parts]
            parts = [dataclasses.replace(part, split=split, span=span) for part in every]
        if not parts:
            raise ValueError(
                f"corpora.{self.name}: holds no recordings to draw noise from for {split}"
            )
        return parts

    def check_seen(self) -> None:
        """Raise ValueError if this process cannot see a file that rank 0 has found."""
        for part in (part for parts in self.parts.values() for part in parts):
            lost = part.files.unseen()
            if lost is not None:
                raise ValueError(
                    f"corpora.{self.name}: {lost} is not there, or not the file that rank 0 sees; let all nodes see it"
                )

    def clips(self, split: str) -> int:
        """Return how many clips a split has, or about how many."""
        return sum(part.clips for part in self.parts.get(split, []))

    def describe(self) -> str:
        """One line for the log."""
        sizes = []
        for split, parts in self.parts.items():
            about = "" if all(part.exact for part in parts) else "about "
            sizes.append(f"{about}{self.clips(split)} {split}")
        labels = f", {len(self.classes)} classes" if self.classes else ""
        absent = self.all_missing()
        missing = f", {len(absent)} files missing, such as {absent[0]}" if absent else ""
        return "; ".join([f"{self.name}: {', '.join(sizes)} clips{labels}{missing}", *self.notes])

    def all_missing(self) -> list[str]:
        """Return the paths of all files that are listed and not there."""
        return [path for paths in self.missing.values() for path in paths]

    def fingerprint(self) -> dict[str, str]:
        """Return {what: digest} of what the order of training clips hangs on: files of streams, ids and labels of rows."""
        found: dict[str, str] = {}
        for part in self.parts.get("train", []):
            if isinstance(part.files, StreamFiles):
                files = part.files.fingerprint().items()
                for file, digest in files:  # splits may have files of the same name
                    key = f"source {part.source}: {file}"
                    found[key] = f"{found[key]} {digest}" if key in found else digest
                chosen = (
                    part.blocks.tobytes() + repr(sorted(getattr(part.keep, "ids", ()))).encode()
                )
            else:
                rows = part.files.rows
                chosen = repr(list(zip(rows["id"][:], rows["label"][:], strict=True))).encode()
            key = f"source {part.source}: its training clips"
            chosen += found.get(key, "").encode()
            found[key] = hashlib.blake2b(chosen, digest_size=16).hexdigest()
        return found
