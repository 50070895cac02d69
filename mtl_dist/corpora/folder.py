"""Your own audio: a CSV manifest with the columns path and, for labelled tasks, label; or a folder of files.

In a folder, ROOT/LABEL/**/clip.wav gives labels by folder name (labelled: true), and any depth will do without labels.
There are three of the kind, so that labelled clips, unlabelled audio and noise of your own can stand side by side.
"""

import dataclasses
import logging
from pathlib import Path, PurePath
from typing import ClassVar

from mtl_dist.corpora.base import (
    Corpus,
    Listing,
    alike,
    register_corpus,
    require_folder,
    require_label,
    stratified_share,
)
from mtl_dist.corpora.manifest import read_manifest
from mtl_dist.corpora.sharded import FromSources
from mtl_dist.streams.sources import AUDIO_SUFFIXES

log = logging.getLogger("mtl_dist")


@register_corpus("noise_folder")
@register_corpus("unlabelled_folder")
@register_corpus("folder")
@dataclasses.dataclass(kw_only=True)
class Folder(FromSources):
    """A plain folder or CSV manifest of your own."""

    CLASSES_GROW: ClassVar[bool] = True

    root: str | None = None
    """Folder of audio files; with a manifest, the folder that its relative paths start from."""
    manifest: str | None = None
    """CSV file with the column path, and optionally label and split (train, validation or test)."""
    labelled: bool = False
    """Without a manifest: take each clip's label from the first folder below root."""
    validation_share: float = 0.1
    """Share of every label's clips for validation, where the manifest has no column split."""
    test_share: float = 0.1
    """Share of every label's clips for test, where the manifest has no column split."""

    def __post_init__(self):
        shares = self.validation_share, self.test_share
        if min(shares) < 0 or sum(shares) >= 1:
            raise ValueError(
                f"validation_share, test_share: {shares} is not allowed; use 0 or more, together below 1"
            )

    def load(self, name: str, split_seed: int) -> Corpus:
        """List the clips. Raises ValueError naming the file, column or row that is wrong."""
        found = self.listing(name)
        rows = [row | {"id": f"{name}/{row['id']}"} for row in found.rows]
        labels = {row["id"]: row["label"] or "" for row in rows}
        test = stratified_share(labels, self.test_share, split_seed, name, "test")
        rest = {clip: label for clip, label in labels.items() if clip not in test}
        share = self.validation_share / (1 - self.test_share)
        validation = stratified_share(rest, share, split_seed, name, "validation")
        for row in rows:
            if row["split"] is None:
                row["split"] = (
                    "test"
                    if row["id"] in test
                    else "validation"
                    if row["id"] in validation
                    else "train"
                )
        classes = sorted({row["label"] for row in rows if row["label"] and row["split"] == "train"})
        if alike(classes):
            log.warning(
                "corpora.%s: two classes differ in case or spaces only: %s", name, alike(classes)
            )
        for row in rows:
            if row["label"] or classes:
                require_label(
                    row["label"],
                    classes,
                    f"{row.get('path') or row['id']}, not among the training labels",
                )
        return found.corpus(name, rows, classes)

    def listing(self, name: str) -> Listing:
        """List the clips; their split is None where no manifest names it. Raises ValueError as `load` does."""
        if self.manifest is not None and not self.sources:
            root = None if self.root is None else Path(self.root).expanduser()
            table = Path(self.manifest).expanduser()
            return read_manifest(table, root, f"corpora.{name}.manifest")
        return _undivided(self.from_sources(name, "folder"))

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List a folder of audio files. Raises ValueError as `load` does."""
        if root is None:
            raise ValueError(
                f"corpora.{name}: set root (a folder), manifest (a CSV file) or sources (a list of any kind)"
            )
        folder = require_folder(Path(root).expanduser(), field, "set it to your audio")
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        paths = [path for path in paths if path.is_file()]
        rows = [self.clip_at(path.relative_to(folder), field) | {"path": path} for path in paths]
        if not rows:
            raise ValueError(f"{field}: no audio files in {root}")
        return Listing(rows=rows)

    def clip_at(self, place: PurePath, field: str) -> dict:
        """Return the row of a file, named by its place. Raises ValueError where it should have a label and has none."""
        if self.labelled and len(place.parts) < 2:
            raise ValueError(
                f"{field}: {place}: no label; with labelled: true files lie in folders named by their labels"
            )
        label = place.parts[0] if self.labelled else None
        return {"id": place.as_posix(), "label": label, "speaker": None, "split": None}


def _undivided(found: Listing) -> Listing:
    """Leave it to the shares what is held out where shards know of no split but train."""
    if {row["split"] for row in found.rows if "block" in row} <= {"train", None}:
        rows = [row | {"split": None} if "block" in row else row for row in found.rows]
        return dataclasses.replace(found, rows=rows)
    return found
