"""How rows and streams are divided among the splits of a corpus.

Streams without labels are never listed. Those that have no validation or test side of their own give whole blocks to it.
Tested by tests/test_corpora.py and tests/test_sources.py.
"""

import dataclasses
from collections.abc import Callable, Sequence

import datasets
import fsspec
import numpy as np
from datasets import Dataset

from mtl_dist.data.columns import FEATURES
from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.corpora.listing import Listing, keep_share, require_labels, shuffled
from mtl_dist.data.faults import named
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Part
from mtl_dist.data.listed import RowFiles
from mtl_dist.data.sources import SPLITS, ours
from mtl_dist.data.streams import StreamFiles

LOOKED = 64
"""Blocks that are held out after being looked for; of more, some that hold nothing do not matter."""
ROW_FEATURES = datasets.Features({**FEATURES, "number": datasets.Value("int64")})
Streams = Sequence[tuple[int, str, StreamFiles]]
"""[(number of the source, split of the data set, files)]."""


@dataclasses.dataclass(frozen=True)
class Ids:
    """Keeps the rows of these ids."""

    ids: frozenset[str]

    def __call__(self, clip: str) -> bool:
        """Return whether a clip is one of them."""
        return clip in self.ids


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
    train_share: float = 1.0,
) -> Corpus:
    """Divide rows and streams among the splits.

    Args:
        divide: (rows, name, seed) -> rows with their splits; of listed rows.
        labelled: list the streams that have labels, without their audio, to divide them like rows.
        keep: which ids of streams are taken.
        shares: of the blocks of streams for validation and test, where there is no such split.
        train_share: of every label's listed training clips, what is kept.

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
    rows = keep_share(rows, train_share, seed, name)
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
