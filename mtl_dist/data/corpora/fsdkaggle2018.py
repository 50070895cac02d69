"""FSDKaggle2018 as published on Zenodo (record 2552860): folders of WAV files and CSVs.

ROOT/FSDKaggle2018.audio_train/*.wav   ROOT/FSDKaggle2018.meta/train_post_competition.csv
ROOT/FSDKaggle2018.audio_test/*.wav    ROOT/FSDKaggle2018.meta/test_post_competition_scoring_clips.csv
"""

import dataclasses
import os
from pathlib import Path, PurePosixPath
from typing import ClassVar

from mtl_dist.data.corpora.base import CorpusConfig, register_corpus
from mtl_dist.data.corpora.listing import (
    Listing,
    alike,
    check_share,
    read_table,
    require_folder,
    require_label,
    stratified_share,
)
from mtl_dist.data.corpora.synthetic import resolve_root

META = "FSDKaggle2018.meta"
TABLES = {"train": "train_post_competition.csv", "test": "test_post_competition_scoring_clips.csv"}


@register_corpus("fsdkaggle2018")
@dataclasses.dataclass(kw_only=True)
class FSDKaggle2018(CorpusConfig):
    """FSDKaggle2018, labelled: 9,473 training and 1,600 test clips, 41 classes."""

    LABELLED: ClassVar[bool] = True

    root: str | None = None
    """Folder that holds FSDKaggle2018.audio_train, .audio_test and .meta, or a prepared one; `synthetic` makes a small
    stand-in."""
    validation_share: float = 0.1
    """Share of the training clips set aside for validation, of every label alike (paper section 5); prepared shards have
    theirs set aside already."""
    train_share: float = 1.0
    """Share of every label's training clips to train on, at least one of each: the same clips for the same data.split_seed,
    and a smaller share is part of a larger one."""

    def __post_init__(self):
        check_share(self.train_share)
        if not 0 <= self.validation_share < 1:
            raise ValueError(
                f"validation_share: {self.validation_share} is not allowed; use 0 to below 1"
            )

    def divide(self, rows: list[dict], name: str, seed: int) -> list[dict]:
        """Set a share of every label's training clips aside for validation, where no split is."""
        for row in rows:
            row["split"] = row["split"] or ("train" if "stream" in row else None)
            if row["split"] is None or not row["label"]:
                raise ValueError(
                    f"corpora.{name}.sources: {row['id']} has the split {row['split']!r} and the label {row['label']!r}; "
                    "every clip needs the split train or test, by a column or by its source, and a label"
                )
        if any(row["split"] == "validation" for row in rows):
            return rows
        labels = {f"{name}/{r['id']}": r["label"] for r in rows if r["split"] == "train"}
        chosen = stratified_share(labels, self.validation_share, seed, name, "validation")
        return [
            row | ({"split": "validation"} if f"{name}/{row['id']}" in chosen else {})
            for row in rows
        ]

    def clip_at(self, place: PurePosixPath, field: str) -> dict:
        """Refuse audio files at URLs: this corpus is more than those."""
        raise ValueError(
            f"{field}: holds audio files, such as {place}, but this corpus as published is read from a disk only; fetch it "
            "and name the folder, or name the Parquet that `mtl-dist prepare` makes of it"
        )

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the clips of a folder as published. Raises ValueError as `open` does."""
        root = resolve_root(root, name, "FSDKaggle2018")
        train, missing_train, classes = _read_table(root, "train", None, field)
        if alike(classes):
            raise ValueError(
                f"{root / META / TABLES['train']}: the labels {alike(classes)} differ in case or spaces only; write "
                "them alike"
            )
        test, missing_test, _ = _read_table(root, "test", classes, field)
        rows = [
            {
                "id": fname,
                "path": root / f"FSDKaggle2018.audio_{split}" / fname,
                "label": label,
                "speaker": None,
                "split": split,
            }
            for split, labels in (("train", train), ("test", test))
            for fname, label in labels.items()
        ]
        missing = {"train": missing_train, "test": missing_test}
        return Listing(rows=rows, classes=classes, missing=missing)


def _read_table(
    root: Path, part: str, classes: list[str] | None, field: str
) -> tuple[dict[str, str], list[str], list[str]]:
    """Return {file name: label} of the rows whose file is there, the paths of the others, and all labels."""
    remedy = "unpack the Zenodo archives (record 2552860) side by side there"
    folder = require_folder(root / f"FSDKaggle2018.audio_{part}", field, remedy)
    table = require_folder(root / META, field, remedy) / TABLES[part]
    if not table.is_file():
        raise ValueError(f"{field}: the file {table} does not exist; {remedy}")
    there = {entry.name for entry in os.scandir(folder)}
    labels, missing = {}, []
    for where, row in read_table(table, ["fname", "label"]):
        label = row["label"]
        if not label:
            raise ValueError(f"{where}, column label: empty; every clip needs a label")
        if row["fname"] in labels:
            raise ValueError(f"{where}: {row['fname']} stands twice")
        known = require_label(label, classes, f"{where}, column label") if classes else label
        labels[row["fname"]] = known
    if not labels:
        raise ValueError(f"{table}: holds no clips")
    every = sorted(set(labels.values()))
    for fname in [fname for fname in labels if fname not in there]:
        missing.append(str(folder / fname))
        del labels[fname]
    if not labels:
        raise ValueError(f"{table}: none of its {len(missing)} files is in {folder}")
    return labels, missing, every
