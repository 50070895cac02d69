"""Your own audio: a CSV manifest with the columns path and, for labelled tasks, label; or a folder of files.

In a folder, ROOT/LABEL/**/clip.wav gives labels by folder name (labelled: true), and any depth will do without labels.
There are three of the kind, so that labelled clips, unlabelled audio and noise of your own can stand side by side.
"""

import dataclasses
import logging
from pathlib import Path

from mtl_dist.corpora.base import (
    SPLITS,
    Corpus,
    Listing,
    alike,
    read_table,
    register_corpus,
    require_folder,
    require_label,
    stratified_share,
)
from mtl_dist.corpora.sharded import InShards
from mtl_dist.streams.sources import AUDIO_SUFFIXES

log = logging.getLogger("mtl_dist")


@register_corpus("noise_folder")
@register_corpus("unlabelled_folder")
@register_corpus("folder")
@dataclasses.dataclass(kw_only=True)
class Folder(InShards):
    """A plain folder or CSV manifest of your own."""

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
            if row["label"]:
                require_label(
                    row["label"],
                    classes,
                    f"{row.get('path') or row['id']}, not among the training labels",
                )
        return found.corpus(name, rows, classes)

    def listing(self, name: str) -> Listing:
        """List the clips; their split is None where no manifest names it. Raises ValueError as `load` does."""
        sharded = self.from_shards(name, "folder")
        if sharded is not None:
            return _undivided(sharded)
        if self.manifest is not None:
            rows, missing = self._from_manifest(name)
        elif self.root is not None:
            rows, missing = self._from_folder(name), []
        else:
            raise ValueError(
                f"corpora.{name}: set root (a folder), manifest (a CSV file) or sources (Parquet)"
            )
        if not rows:
            raise ValueError(
                f"corpora.{name}: no audio files in {self.manifest or self.root} ({len(missing)} missing)"
            )
        return Listing(rows=rows, missing={"any": missing})

    def _from_folder(self, name: str) -> list[dict]:
        root = require_folder(
            Path(self.root).expanduser(), f"corpora.{name}.root", "set it to your audio"
        )
        paths = sorted(p for p in root.rglob("*") if p.suffix.lower() in AUDIO_SUFFIXES)
        paths = [path for path in paths if path.is_file()]
        rows = []
        for path in paths:
            parts = path.relative_to(root).parts
            if self.labelled and len(parts) < 2:
                raise ValueError(
                    f"{path}: no label; with labelled: true files lie in {root}/LABEL/"
                )
            label = parts[0] if self.labelled else None
            rows.append(_row("/".join(parts), path, label, None))
        return rows

    def _from_manifest(self, name: str) -> tuple[list[dict], list[str]]:
        table = Path(self.manifest).expanduser()
        if not table.is_file():
            raise ValueError(f"corpora.{name}.manifest: the file {table} does not exist")
        root = Path(self.root).expanduser() if self.root is not None else table.parent
        rows, missing, seen = [], [], set()
        for where, row in read_table(table, ["path"]):
            if "label" in row and not row["label"]:
                raise ValueError(f"{where}, column label: empty; every clip needs a label")
            split = row.get("split") or None
            if split not in (None, *SPLITS):
                raise ValueError(f"{where}, column split: {split!r} (allowed: {', '.join(SPLITS)})")
            path = root / row["path"]
            if row["path"] in seen:
                raise ValueError(f"{where}: {row['path']} stands twice")
            seen.add(row["path"])
            if path.is_file():
                rows.append(_row(row["path"], path, row.get("label"), split))
            else:
                missing.append(str(path))
        return rows, missing


def _undivided(found: Listing) -> Listing:
    """Leave it to the shares what is held out where shards know of no split but train."""
    if {row["split"] for row in found.rows} <= {"train", None}:
        return dataclasses.replace(found, rows=[row | {"split": None} for row in found.rows])
    return found


def _row(clip: str, path: Path, label: str | None, split: str | None) -> dict:
    return {"id": clip, "path": path, "label": label, "speaker": None, "split": split}
