"""Clips in shards: a folder that `mtl-dist prepare` wrote, or Parquet files of the Hub, of a disk, or of any fsspec URL.

Every kind of corpus can come from them, with the same splits and held-out clips as from the published folder.
"""

import dataclasses
import json
from collections import Counter

import fsspec

from mtl_dist.corpora.base import SPLITS, Listing
from mtl_dist.streams.fetch import Remote
from mtl_dist.streams.retry import ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source

MANIFEST = "manifest.json"
FORMAT = 1


@dataclasses.dataclass(kw_only=True)
class InShards:
    """What a kind of corpus can be told of shards; its `root` may be a folder that `mtl-dist prepare` wrote, too."""

    sources: list[Source] = dataclasses.field(default_factory=list)
    """Instead of root: Parquet of the Hub, of a disk or of a URL, such as [{path: openslr/librispeech_asr, config: clean,
    split: train.100, columns: {speaker: speaker_id}}]."""
    remote: Remote = dataclasses.field(default_factory=Remote)
    """How shards are fetched, over a network or from a disk, and how long a fault is borne."""

    def from_shards(self, name: str, kind: str, splits: list[str] | None = None) -> Listing | None:
        """List the clips of `sources`, or of a prepared folder at `root`; None where there are neither.

        Raises:
            ValueError: root was prepared from another kind of corpus, or lacks one of `splits`; shards cannot be read.
        """
        try:
            if self.sources:
                return _listing(name, self.sources, self.remote)
            if self.root is None or not is_prepared(self.root):
                return None
            manifest = _manifest(name, self.root, kind, splits)
            sources = [
                Source(path=f"{self.root}/{split}-*.parquet") for split in manifest["splits"]
            ]
            found = _listing(name, sources, self.remote)
            return dataclasses.replace(
                found, classes=manifest["classes"], in_pieces=kind == "chime3"
            )
        except ShardError as error:
            raise ValueError(f"corpora.{name}: {error}") from error


def is_prepared(root: str) -> bool:
    """Return whether there is a folder with a manifest of `mtl-dist prepare`."""
    system, path = fsspec.url_to_fs(str(root))
    return system.exists(f"{path}/{MANIFEST}")


def _manifest(name: str, root: str, kind: str, splits: list[str] | None) -> dict:
    """Read the manifest, with the chosen splits only."""
    with fsspec.open(f"{root}/{MANIFEST}", "r", encoding="utf-8") as file:
        manifest = json.load(file)
    if (manifest.get("kind"), manifest.get("format")) != (kind, FORMAT):
        raise ValueError(
            f"corpora.{name}.root: {root} was prepared as {manifest.get('kind')!r} in format {manifest.get('format')}, "
            f"this corpus wants {kind!r} in format {FORMAT}"
        )
    missing = [split for split in splits or [] if split not in manifest["splits"]]
    if missing:
        raise ValueError(
            f"corpora.{name}.splits: {missing[0]} is not in {root} (there: {', '.join(manifest['splits'])})"
        )
    chosen = {s: about for s, about in manifest["splits"].items() if splits is None or s in splits}
    return manifest | {"splits": {s: about for s, about in chosen.items() if about["clips"]}}


def _listing(name: str, sources: list[Source], remote: Remote) -> Listing:
    """List the rows of all shards: a clip without an id is named by block and place."""
    given = [source.weight is not None for source in sources]
    if any(given) and not all(given):
        raise ValueError(f"corpora.{name}.sources: give every source a weight, or none")
    shards = Shards.open(f"corpora.{name}", sources, remote)
    rows = shards.listing().to_pylist()
    for row in rows:
        source = sources[shards.source[row["block"]]]
        row["id"] = row.get("id") or f"{row['block']}-{row['place']}"
        for column in ("label", "speaker", "seconds"):
            row.setdefault(column, None)
        row["split"] = source.split if source.split in SPLITS else row.get("split")
    twice = [clip for clip, count in Counter(row["id"] for row in rows).items() if count > 1]
    if twice:
        raise ValueError(
            f"corpora.{name}.sources: {len(twice)} ids stand twice, such as {twice[0]}"
        )
    return Listing(rows=rows, shards=shards)
