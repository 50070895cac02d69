"""LibriSpeech as published (openslr.org/12): ROOT/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac, 16 kHz."""

import dataclasses
import io
import math
import re
from pathlib import Path

import soundfile

from mtl_dist.corpora.base import (
    Corpus,
    Listing,
    register_corpus,
    require_folder,
    shuffled,
)
from mtl_dist.corpora.sharded import FromSources
from mtl_dist.corpora.synthetic import resolve_root
from mtl_dist.streams.shards import Shards

UTTERANCE = re.compile(r"(?:.*/)?(\d+)-\d+-\d+(?:\.\w+)?")
"""Ids that begin with the speaker."""


@register_corpus("librispeech")
@dataclasses.dataclass(kw_only=True)
class LibriSpeech(FromSources):
    """LibriSpeech, unlabelled: read English speech."""

    root: str | None = None
    """Folder named LibriSpeech, with one folder per split, or a prepared one; `synthetic` makes a small stand-in."""
    splits: list[str] = dataclasses.field(default_factory=lambda: ["train-clean-100"])
    """Splits to train on, by folder name, such as [train-clean-100, train-other-500]; of folders, published or prepared."""
    hours: float | None = None
    """Train on so many hours: the same utterances for the same data.split_seed; null for all."""
    heldout_share: float = 0.02
    """Share of the speakers set aside for validation, and as many again for test; at least one speaker each."""

    def __post_init__(self):
        if self.hours is not None and not self.hours > 0:
            raise ValueError(
                f"hours: {self.hours} is not allowed; use more than 0, or leave the corpus out of the tasks' sources"
            )
        if not 0 < self.heldout_share < 0.5:
            raise ValueError(
                f"heldout_share: {self.heldout_share} is not allowed; use above 0, below 0.5"
            )
        if not self.splits:
            raise ValueError("splits: is empty; name at least one, such as [train-clean-100]")

    def load(self, name: str, split_seed: int) -> Corpus:
        """List the utterances. Raises ValueError naming the folder or split that is wrong."""
        found = self.listing(name)
        rows = {f"{name}/{row['id']}": row for row in found.rows}
        heldout = _hold_out(rows, self.heldout_share, split_seed, name)
        train = [clip for clip in rows if clip not in heldout]
        if self.hours is not None:
            order = shuffled(train, split_seed, name, "hours")
            train = _subset(order, rows, self.hours, name, found.shards)
        split_of = dict.fromkeys(sorted(train), "train") | dict(sorted(heldout.items()))
        rows_of = [rows[clip] | {"id": clip, "split": split} for clip, split in split_of.items()]
        return found.corpus(name, rows_of)

    def listing(self, name: str) -> Listing:
        """List the utterances of the chosen splits, by the names of their folders. Raises ValueError as `load` does."""
        found = self.from_sources(name, "librispeech", self.splits)
        for row in found.rows:
            if row["speaker"] is None and (match := UTTERANCE.fullmatch(row["id"])):
                row["speaker"] = match[1]
        return found

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the utterances of the chosen splits of a folder as published. Raises ValueError as `load` does."""
        root = require_folder(
            resolve_root(root, name, "LibriSpeech"),
            field,
            "point it at the folder LibriSpeech of the unpacked archives",
        )
        rows = []
        for split in self.splits:
            folder = require_folder(
                root / split, f"corpora.{name}.splits", f"there are {_folders(root)} in {root}"
            )
            rows += [
                {
                    "id": f"{split}/{path.stem}",
                    "path": path,
                    "label": None,
                    "speaker": path.name.split("-")[0],
                    "split": split,
                }
                for path in folder.glob("*/*/*.flac")
            ]
        return Listing(rows=rows)


def _folders(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return f"the folders {', '.join(names)}" if names else "no folders"


def _hold_out(rows: dict[str, dict], share: float, split_seed: int, name: str) -> dict[str, str]:
    """Return {clip id: "validation" or "test"} for the speakers that are not trained on."""
    nameless = [clip for clip, row in rows.items() if not row["speaker"]]
    if nameless:
        raise ValueError(
            f"corpora.{name}: {len(nameless)} clips have no speaker, such as {nameless[0]}, and speakers are held out; name "
            "the column that says it by columns.speaker of the source"
        )
    speakers = {row["speaker"] for row in rows.values()}
    if len(speakers) < 3:
        raise ValueError(
            f"corpora.{name}: {len(rows)} FLAC files of {len(speakers)} speakers found; at least 3 speakers are "
            "needed (SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac): one each for training, validation, test"
        )
    order = shuffled(speakers, split_seed, name, "heldout")
    count = math.ceil(share * len(order))
    part = dict.fromkeys(order[:count], "validation") | dict.fromkeys(
        order[count : 2 * count], "test"
    )
    return {clip: part[row["speaker"]] for clip, row in rows.items() if row["speaker"] in part}


def _subset(
    order: list[str], rows: dict[str, dict], hours: float, name: str, shards: Shards | None
) -> list[str]:
    """Take utterances in `order` until `hours` are reached; unreadable ones are taken too, and skipped in training.

    Shards that do not say how long their clips are have to be read: those of one block then follow each other.
    """
    taken, seconds, block = [], 0.0, (-1, [])
    turn: dict[object, int] = {}
    for n, clip in enumerate(order):
        turn.setdefault(_read_with(clip, rows[clip]), n)
    for clip in sorted(order, key=lambda clip: turn[_read_with(clip, rows[clip])]):
        if seconds >= hours * 3600:
            return taken
        taken.append(clip)
        row = rows[clip]
        if row.get("seconds") is not None:
            seconds += row["seconds"]
            continue
        audio = row.get("path")
        if audio is None:
            if row["block"] != block[0]:
                block = row["block"], shards.read(row["block"])
            audio = io.BytesIO(block[1][row["place"]] or b"")
        try:
            seconds += soundfile.info(audio).duration
        except soundfile.LibsndfileError:
            continue
    if seconds < hours * 3600:
        raise ValueError(
            f"corpora.{name}.hours: {hours:g} h asked for, but the training speakers have {seconds / 3600:.2f} h; "
            "add a split, or set null to take all"
        )
    return taken


def _read_with(clip: str, row: dict) -> object:
    """Return the block that has to be read for a clip's duration, or the clip where it is by itself."""
    alone = row.get("path") is not None or row.get("seconds") is not None
    return clip if alone else row["block"]
