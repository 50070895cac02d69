"""A corpus: for each split, the parts of its sources that lanes read; made of listed rows and of streams.

Streams without labels are never listed. Those that have no validation or test side of their own give whole blocks to it.
Tested by tests/test_corpora.py and tests/test_sources.py.
"""

import dataclasses
import hashlib
from collections.abc import Callable, Sequence

import datasets
import fsspec
import numpy as np
from datasets import Dataset, IterableDataset, concatenate_datasets

from mtl_dist.data.columns import FEATURES
from mtl_dist.data.corpora.listing import Listing, require_labels, shuffled
from mtl_dist.data.faults import named
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Part
from mtl_dist.data.listed import RowFiles
from mtl_dist.data.sources import SPLITS, ours
from mtl_dist.data.streams import StreamFiles

LOOKED = 64
"""Blocks that are held out after being looked for; of more, some that hold nothing do not matter."""
ROW_FEATURES = datasets.Features({**FEATURES, "number": datasets.Value("int64")})

SPLIT_SPANS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Share of every recording that each split may hear: held-out noise is noise that was not trained on."""
Streams = Sequence[tuple[int, str, StreamFiles]]
"""[(number of the source, split of the data set, files)]."""


@dataclasses.dataclass(frozen=True)
class Ids:
    """Keeps the rows of these ids."""

    ids: frozenset[str]

    def __call__(self, clip: str) -> bool:
        """Return whether a clip is one of them."""
        return clip in self.ids


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


def make_corpus(
    name: str,
    listing: Listing,
    streams: Streams = (),
    *,
    seed: int = 0,
    divide: Callable[[list[dict], str, int], list[dict]] | None = None,
    labelled: bool = False,
    keep: Callable[[str], bool] | None = None,
    shares: tuple[float, float] = (0.0, 0.0),
) -> Corpus:
    """Divide rows and streams among the splits.

    Args:
        divide: (rows, name, seed) -> rows with their splits; of listed rows.
        labelled: list the streams that have labels, without their audio, to divide them like rows.
        keep: which ids of streams are taken.
        shares: of the blocks of streams for validation and test, where there is no such split.

    Raises:
        ValueError: two rows have one id, a label is not known, or there are too few blocks.
    """
    rows, listed = list(listing.rows), set()
    sides: dict[int, set[str]] = {}
    for number, split, _ in streams:
        sides.setdefault(number, set()).add(ours(split))
    for place, (number, split, files) in enumerate(streams):
        with named(f"corpora.{name}"):
            found = _labels(name, files, keep) if labelled else {}
        own = None if divide is not None and sides[number] == {"train"} else ours(split)
        common = {"speaker": None, "split": own, "stream": place, "source": number}
        rows += [{"id": clip, "label": label, **common} for clip, label in found.items()]
        listed |= {place} if found else set()
    corpus = Corpus(name=name, missing=listing.missing)
    _refuse_twice(rows, name)
    if rows and divide is not None:
        rows = divide(rows, name, seed)
    corpus.classes = require_labels(rows, listing.classes, name)
    _add_rows(corpus, [row for row in rows if "stream" not in row], seed)
    for place, (number, split, files) in enumerate(streams):
        own = [row for row in rows if row.get("stream") == place] if place in listed else None
        with named(f"corpora.{name}"):
            _add_stream(corpus, number, split, files, keep, own)
    wanted = [
        (split, share)
        for split, share in zip(SPLITS[1:], shares, strict=True)
        if share > 0 and not corpus.parts.get(split)
    ]
    left = 1.0
    for number, (split, share) in enumerate(wanted):
        _hold_out(corpus, split, share / left, seed, others=len(wanted) - number)
        left -= share
    corpus.parts = {split: corpus.parts.get(split, []) for split in SPLITS}
    return corpus


def _labels(name: str, files: StreamFiles, keep) -> dict[str, str]:
    """Return {id: label} of a stream; nothing where it has no labels, which the first rows tell."""
    labels: dict[str, str] = {}
    for file, table in files.listing():
        if not labels and table["label"].null_count == len(table):
            return {}
        for clip, label in zip(table["id"].to_pylist(), table["label"].to_pylist(), strict=True):
            if clip is None or label is None:
                lacks = "id" if clip is None else "label"
                raise ValueError(f"corpora.{name}: {file}: a row has no {lacks} ({clip})")
            if clip in labels:
                raise ValueError(f"corpora.{name}: {file}: two clips have the id {clip!r}")
            if keep is None or keep(clip):
                labels[clip] = label
    return labels


def _refuse_twice(rows: list[dict], name: str) -> None:
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"corpora.{name}: two clips have the id {row['id']!r}")
        seen.add(row["id"])


def _add_rows(corpus: Corpus, rows: list[dict], seed: int) -> None:
    """Add parts of listed rows, in an order by seed, so that the rows of a block have nothing in common."""
    index, corpus.listed = {c: n for n, c in enumerate(corpus.classes)}, len(rows)
    groups: dict[tuple, dict[str, dict]] = {}
    for number, row in enumerate(rows):
        key = SPLITS.index(row["split"] or "train"), row.get("source", 0)
        groups.setdefault(key, {})[row["id"]] = row | {"number": number}
    for (place, source), own in sorted(groups.items(), key=lambda item: item[0]):
        split = SPLITS[place]
        table = [
            {name: own[clip].get(name) for name in ROW_FEATURES}
            | {"audio": {"bytes": None, "path": str(own[clip]["path"])}}
            for clip in shuffled(own, seed, corpus.name, "rows", split)
        ]
        urls = (row["audio"]["path"] for row in table if "://" in row["audio"]["path"])
        first = {url.split("://")[0]: url for url in urls}.values()
        systems = [fsspec.url_to_fs(url)[0] for url in first]
        files = RowFiles(Dataset.from_list(table, features=ROW_FEATURES), systems=systems)
        part = Part(corpus=corpus.name, split=split, files=files, blocks=files.blocks())
        part = dataclasses.replace(part, classes=index, source=source, clips=len(table))
        corpus.parts.setdefault(split, []).append(part)


def _add_stream(
    corpus: Corpus, number: int, split: str, files: StreamFiles, keep, rows: list[dict] | None
) -> None:
    """Add a stream's part: all of it, or, where its rows are listed, a part of each split with the rows that are of it."""
    index = {label: n for n, label in enumerate(corpus.classes)}
    part = Part(corpus=corpus.name, split=ours(split), files=files, blocks=files.blocks())
    part = dataclasses.replace(part, classes=index, source=number, keep=keep)
    if rows is None:
        exact = files.exact and keep is None
        part = dataclasses.replace(part, clips=files.clips, exact=exact)
        corpus.parts.setdefault(part.split, []).append(part)
    for own in SPLITS if rows is not None else ():
        ids = frozenset(row["id"] for row in rows if row["split"] == own)
        if ids:
            chosen = dataclasses.replace(part, split=own, keep=Ids(ids), clips=len(ids))
            corpus.parts.setdefault(own, []).append(chosen)


def _hold_out(corpus: Corpus, split: str, share: float, seed: int, others: int) -> None:
    """Take whole blocks of the training streams, by seed, for a side that nothing else gives; leave one to `others` each."""
    parts = [p for p in corpus.parts.get("train", []) if isinstance(p.files, StreamFiles)]
    parts = [part for part in parts if not isinstance(part.keep, Ids)]
    owner = np.repeat(np.arange(len(parts)), [len(part.blocks) for part in parts])
    count = max(1, round(share * len(owner)))
    if parts and len(owner) < count + others:
        raise ValueError(
            f"corpora.{corpus.name}: {parts[0].files.names[0]} has {len(owner)} blocks, too few to hold some for {split}: "
            f"name a source with the split {split}, or write more files or row groups (mtl-dist prepare)"
        )
    held, every = np.zeros(len(owner), bool), [part for part in parts for _ in part.blocks]
    places = np.concatenate([part.blocks for part in parts]) if parts else held
    order = generator(seed, corpus.name, "held out", split).permutation(len(owner))
    for looked, place in enumerate(order.tolist()):
        if held.sum() == count:
            break
        there = looked >= LOOKED or every[place].files.shard(*places[place].tolist()) is not None
        held[place] = there  # a file may have fewer row groups than the first
    for number, part in enumerate(parts):
        own = held[owner == number]
        clips = round(part.clips * own.mean())
        out = dataclasses.replace(
            part, split=split, blocks=part.blocks[own], clips=clips, exact=False
        )
        corpus.parts.setdefault(split, []).extend([out] if own.any() else [])
        part.blocks, part.clips = part.blocks[~own], part.clips - clips
        part.exact = part.exact and not own.any()
    if parts:
        note = f"{count} of {len(owner)} blocks held out for {split}, by data.split_seed"
        corpus.notes.append(note)
