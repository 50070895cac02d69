"""Your own audio: a CSV manifest with the columns path and, for labelled tasks, label; or a folder of files.

In a folder, ROOT/LABEL/**/clip.wav gives labels by folder name (labelled: true), and any depth will do without labels.
There are three of the kind, so that labelled clips, unlabelled audio and noise of your own can stand side by side.
"""

import dataclasses
import logging
from pathlib import Path, PurePosixPath
from typing import ClassVar

from mtl_dist.data.corpora.base import CorpusConfig, register_corpus
from mtl_dist.data.corpora.listing import (
    Listing,
    alike,
    check_share,
    read_manifest,
    require_folder,
    stratified_share,
)
from mtl_dist.data.sources import AUDIO_SUFFIXES

log = logging.getLogger("mtl_dist")


@register_corpus("folder")
@dataclasses.dataclass(kw_only=True)
class Folder(CorpusConfig):
    """A plain folder or CSV manifest of your own."""

    LABELLED: ClassVar[bool] = True
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
    train_share: float = 1.0
    """Share of every label's training clips to train on, at least one of each: the same clips for the same data.split_seed,
    and a smaller share is part of a larger one."""

    def __post_init__(self):
        check_share(self.train_share)
        shares = self.validation_share, self.test_share
        if min(shares) < 0 or sum(shares) >= 1:
            raise ValueError(
                f"validation_share, test_share: {shares} is not allowed; use 0 or more, together below 1"
            )

    def heldout_shares(self) -> tuple[float, float]:
        """As CorpusConfig has it."""
        return self.validation_share, self.test_share

    def divide(self, rows: list[dict], name: str, seed: int) -> list[dict]:
        """Draw a share of every label's clips for validation and test, of those whose split nothing names."""
        labels = {f"{name}/{row['id']}": row["label"] or "" for row in rows}
        test = stratified_share(labels, self.test_share, seed, name, "test")
        rest = {clip: label for clip, label in labels.items() if clip not in test}
        share = self.validation_share / (1 - self.test_share)
        validation = stratified_share(rest, share, seed, name, "validation")
        of_clip = dict.fromkeys(validation, "validation") | dict.fromkeys(test, "test")
        divided = [
            row | {"split": row["split"] or of_clip.get(f"{name}/{row['id']}", "train")}
            for row in rows
        ]
        classes = sorted({row["label"] for row in rows if row["label"]})
        if alike(classes):
            log.warning(
                "corpora.%s: two classes differ in case or spaces only: %s", name, alike(classes)
            )
        return divided

    def _look(self, name: str, field: str, source):
        """As CorpusConfig has it; a manifest stands for the root."""
        if source is None and self.manifest is not None:
            root = None if self.root is None else Path(self.root).expanduser()
            return read_manifest(self.manifest, root, f"corpora.{name}.manifest")
        return super()._look(name, field, source)

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List a folder of audio files. Raises ValueError as `open` does."""
        if root is None:
            raise ValueError(
                f"corpora.{name}: set root (a folder), manifest (a CSV file) or sources (a list of any kind)"
            )
        folder = require_folder(Path(root).expanduser(), field, "set it to your audio")
        paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        paths = [path for path in paths if path.is_file()]
        rows = [
            self.clip_at(PurePosixPath(path.relative_to(folder)), field) | {"path": path}
            for path in paths
        ]
        if not rows:
            raise ValueError(f"{field}: no audio files in {root}")
        return Listing(rows=rows)

    def clip_at(self, place: PurePosixPath, field: str) -> dict:
        """Return the row of a file, named by its place. Raises ValueError where it should have a label and has none."""
        if self.labelled and len(place.parts) < 2:
            raise ValueError(
                f"{field}: {place}: no label; with labelled: true files lie in folders named by their labels"
            )
        label = place.parts[0] if self.labelled else None
        return {"id": place.as_posix(), "label": label, "speaker": None, "split": None}


@register_corpus("unlabelled_folder")
@dataclasses.dataclass(kw_only=True)
class UnlabelledFolder(Folder):
    """Audio of your own for tasks that need no labels; streams are never listed."""

    LABELLED: ClassVar[bool] = False


@register_corpus("noise_folder")
@dataclasses.dataclass(kw_only=True)
class NoiseFolder(UnlabelledFolder):
    """Background noise of your own."""
