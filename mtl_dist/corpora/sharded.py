"""What a corpus comes from: folders as published or prepared, CSV manifests, Parquet, tars and audio files, in any mixture.

Every kind of corpus lists them alike, with the same splits and held-out clips from each. Tested by tests/test_sharded.py
and tests/test_one_notation.py.
"""

import abc
import dataclasses
import json
import re
from collections import Counter
from pathlib import Path, PurePosixPath
from typing import ClassVar

import fsspec

from mtl_dist.corpora.base import SPLITS, Listing
from mtl_dist.corpora.manifest import read_manifest
from mtl_dist.corpora.synthetic import SYNTHETIC
from mtl_dist.streams.fetch import Remote
from mtl_dist.streams.retry import ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import AUDIO_SUFFIXES, COMPRESSED, SHARDS, Source

MANIFEST = "manifest.json"
FORMAT = 1
NOT_A_FOLDER = re.compile(r"^hf://|[*?\[{]|\.(parquet|tar|tar\.\w+)$")
"""What is shards for sure; of a prepared folder on the Hub only the Parquet is looked at."""


@dataclasses.dataclass(kw_only=True)
class FromSources(abc.ABC):
    """What a kind of corpus can be told of its sources; its `root` is the short form of one: a folder."""

    CLASSES_GROW: ClassVar[bool] = False
    """Whether a source may have classes that another has not."""

    sources: list[Source] = dataclasses.field(default_factory=list)
    """Instead of root, a list of any of these: Parquet or tars, of the Hub, of a disk or of a URL; folders that root would
    take; CSV manifests; audio files of the Hub or of a URL. Such as [{path: openslr/librispeech_asr, config: clean, split:
    train.100, columns: {speaker: speaker_id}}, {path: "tars/train-{00000..00007}.tar"}, {path: data/LibriSpeech}, {path:
    clips.csv}], or [{path: chimechallenge/chime3-background-noise}]."""
    remote: Remote = dataclasses.field(default_factory=Remote)
    """How shards and audio files are fetched, over a network or from a disk, and how long a fault is borne."""

    @abc.abstractmethod
    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the clips of a folder as published; `field` is what named it. Raises ValueError for what is wrong in it."""

    def clip_at(self, place: PurePosixPath, field: str) -> dict:
        """Return the row, but for the path, of an audio file at a URL, by its place below the folder of its source.

        `field` is what named the source. Raises ValueError for what is wrong with it; here, because a corpus of this kind
        is more than its audio files.
        """
        raise ValueError(
            f"{field}: holds audio files, such as {place}, but this corpus as published is read from a disk only; fetch it "
            "and name the folder, or name the Parquet that `mtl-dist prepare` makes of it"
        )

    def from_sources(self, name: str, kind: str, splits: list[str] | None = None) -> Listing:
        """List the clips of `sources`, or of the folder at `root`, as published or prepared from the same `kind`.

        Raises:
            ValueError: a source is not there or is wrong, sources do not go together, or two clips have one id.
        """
        if not self.sources and (self.root is None or not is_prepared(self.root)):
            return self.published(name, self.root, f"corpora.{name}.root")
        sources = self.sources or [Source(path=str(self.root))]
        given = [source.weight is not None for source in sources]
        if any(given) and not all(given):
            raise ValueError(f"corpora.{name}.sources: give every source a weight, or none")
        fields = [f"corpora.{name}.sources[{n}]" for n in range(len(self.sources))]
        found, sharded = [], []
        for number, field in enumerate(fields or [f"corpora.{name}.root"]):
            listing, shards = self._look(name, field, sources[number], kind, splits)
            listing.rows = [row | {"source": number} for row in listing.rows]
            found.append(listing)
            sharded += [(number, source) for source in shards]
        listing = _together(name, found, self.CLASSES_GROW)
        if sharded:
            try:
                listing = self._listed(name, sharded, listing)
            except ShardError as error:
                raise ValueError(f"corpora.{name}: {error}") from error
        twice = [i for i, n in Counter(row["id"] for row in listing.rows).items() if n > 1]
        if twice:
            raise ValueError(
                f"corpora.{name}.sources: {len(twice)} ids stand twice, such as {twice[0]}"
            )
        weights = [source.weight for source in sources] if all(given) else None
        return dataclasses.replace(listing, weights=weights)

    def _look(
        self, name: str, field: str, source: Source, kind: str, splits: list[str] | None
    ) -> tuple[Listing, list[Source]]:
        """Return what a source is known to hold without reading shards, and the sources to be listed."""
        if source.path.endswith(".csv"):
            table = Path(source.path).expanduser()
            return read_manifest(table, None, field, source.columns), []
        if not (
            source.config or source.split or source.on_hub() or NOT_A_FOLDER.search(source.path)
        ):
            if is_prepared(source.path):
                about = _manifest(field, source.path, kind, splits)
                paths = [f"{source.path}/{split}-*.parquet" for split in about["splits"]]
                known = Listing(rows=[], classes=about["classes"], in_pieces=kind == "chime3")
                return known, [dataclasses.replace(source, path=path) for path in paths]
            if source.path == SYNTHETIC or _is_published(Path(source.path).expanduser()):
                if source.columns:
                    raise ValueError(f"{field}.columns: a folder of audio has no columns")
                return self.published(name, source.path, field), []
        return Listing(rows=[]), [source]

    def _listed(self, name: str, sharded: list[tuple[int, Source]], others: Listing) -> Listing:
        """Add the rows of all shards and audio files at URLs, of (number, source) pairs.

        A clip in a shard that has no id is named by block and place.
        """
        sources = [source for _, source in sharded]
        shards = Shards.open(f"corpora.{name}", sources, self.remote)
        rows = shards.listing().to_pylist() if len(shards) else []
        for row in rows:
            row["source"], source = sharded[shards.source[row["block"]]]
            row["id"] = row.get("id") or f"{row['block']}-{row['place']}"
            for column in ("label", "speaker", "seconds"):
                row.setdefault(column, None)
            row["split"] = source.split if source.split in SPLITS else row.get("split")
        for file in shards.alone.by_path.values():
            number, source = sharded[file.source]
            row = self.clip_at(PurePosixPath(file.name), f"corpora.{name}.sources[{number}]")
            split = source.split if source.split in SPLITS else row["split"]
            rows.append(row | {"path": file.path, "source": number, "split": split})
        return dataclasses.replace(others, rows=rows + others.rows, shards=shards)


def _is_published(folder: Path) -> bool:
    """Return whether a local folder holds audio, or at least no shards."""
    if any(path.suffix.lower() in AUDIO_SUFFIXES for path in folder.rglob("*")):
        return True
    packed = any(path.name.endswith((*SHARDS, *COMPRESSED)) for path in folder.rglob("*"))
    return folder.is_dir() and not packed


def _together(name: str, found: list[Listing], classes_grow: bool) -> Listing:
    """Return the rows and what is missing of all sources, and the classes and pieces that all have."""
    pieces = [listing.in_pieces for listing in found]
    if any(pieces) and not all(pieces):
        raise ValueError(
            f"corpora.{name}.sources[{pieces.index(True)}] holds pieces of recordings, of which every split has its own, "
            f"and sources[{pieces.index(False)}] does not; prepare both"
        )
    stated = {n: listing.classes for n, listing in enumerate(found) if listing.classes}
    first = next(iter(stated), 0)
    for number, classes in {} if classes_grow else stated.items():
        if differing := sorted({*classes} ^ {*stated[first]}):
            raise ValueError(
                f"corpora.{name}.sources[{number}] has other classes than sources[{first}]: they differ in "
                f"{', '.join(differing)}; sources of one corpus need the same classes"
            )
    missing: dict[str, list[str]] = {}
    for listing in found:
        for part, paths in listing.missing.items():
            missing[part] = missing.get(part, []) + paths
    return Listing(
        rows=[row for listing in found for row in listing.rows],
        classes=stated.get(first, []),
        missing=missing,
        in_pieces=pieces[0],
    )


def is_prepared(root: str) -> bool:
    """Return whether there is a folder with a manifest of `mtl-dist prepare`."""
    system, path = fsspec.url_to_fs(str(root))
    return system.exists(f"{path}/{MANIFEST}")


def _manifest(field: str, root: str, kind: str, splits: list[str] | None) -> dict:
    """Read the manifest, with the chosen splits only."""
    with fsspec.open(f"{root}/{MANIFEST}", "r", encoding="utf-8") as file:
        manifest = json.load(file)
    if (manifest.get("kind"), manifest.get("format")) != (kind, FORMAT):
        raise ValueError(
            f"{field}: {root} was prepared as {manifest.get('kind')!r} in format {manifest.get('format')}, "
            f"this corpus wants {kind!r} in format {FORMAT}"
        )
    missing = [split for split in splits or [] if split not in manifest["splits"]]
    if missing:
        raise ValueError(
            f"{field}: the split {missing[0]} is not in {root} (there: {', '.join(manifest['splits'])})"
        )
    chosen = {s: about for s, about in manifest["splits"].items() if splits is None or s in splits}
    return manifest | {"splits": {s: about for s, about in chosen.items() if about["clips"]}}
