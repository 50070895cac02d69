"""LibriSpeech as published (openslr.org/12): ROOT/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac, 16 kHz."""

import dataclasses
import math
from pathlib import Path

import soundfile

from mtl_dist.corpora.base import (
    Corpus,
    make_corpus,
    register_corpus,
    require_folder,
    shuffled,
)
from mtl_dist.corpora.synthetic import resolve_root


@register_corpus("librispeech")
@dataclasses.dataclass(kw_only=True)
class LibriSpeech:
    """LibriSpeech, unlabelled: read English speech."""

    root: str | None = None
    """Folder named LibriSpeech, with one folder per split; `synthetic` makes a small stand-in."""
    splits: list[str] = dataclasses.field(default_factory=lambda: ["train-clean-100"])
    """Splits to train on, by folder name, such as [train-clean-100, train-other-500]."""
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
        root = require_folder(
            resolve_root(self.root, name, "LibriSpeech"),
            f"corpora.{name}.root",
            "point it at the folder LibriSpeech of the unpacked archives",
        )
        files: dict[str, Path] = {}
        for split in self.splits:
            folder = require_folder(
                root / split, f"corpora.{name}.splits", f"there are {_folders(root)} in {root}"
            )
            files |= {f"{name}/{split}/{path.stem}": path for path in folder.glob("*/*/*.flac")}
        heldout = _hold_out(files, self.heldout_share, split_seed, name)
        train = [clip for clip in files if clip not in heldout]
        if self.hours is not None:
            train = _subset(shuffled(train, split_seed, name, "hours"), files, self.hours, name)
        rows = [{"id": c, "path": files[c], "label": None, "split": "train"} for c in sorted(train)]
        rows += [
            {"id": c, "path": files[c], "label": None, "split": heldout[c]} for c in sorted(heldout)
        ]
        return make_corpus(name, rows)


def _folders(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return f"the folders {', '.join(names)}" if names else "no folders"


def _hold_out(files: dict[str, Path], share: float, split_seed: int, name: str) -> dict[str, str]:
    """Return {clip id: "validation" or "test"} for the speakers that are not trained on."""
    speakers = {path.name.split("-")[0] for path in files.values()}
    if len(speakers) < 3:
        raise ValueError(
            f"corpora.{name}: {len(files)} FLAC files of {len(speakers)} speakers found; at least 3 speakers are "
            "needed (SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac): one each for training, validation, test"
        )
    order = shuffled(speakers, split_seed, name, "heldout")
    count = math.ceil(share * len(order))
    part = dict.fromkeys(order[:count], "validation") | dict.fromkeys(
        order[count : 2 * count], "test"
    )
    speaker_of = {clip: path.name.split("-")[0] for clip, path in files.items()}
    return {clip: part[speaker] for clip, speaker in speaker_of.items() if speaker in part}


def _subset(order: list[str], files: dict[str, Path], hours: float, name: str) -> list[str]:
    """Take utterances in `order` until `hours` are reached; unreadable ones are taken too, and skipped in training."""
    taken, seconds = [], 0.0
    for clip in order:
        if seconds >= hours * 3600:
            return taken
        taken.append(clip)
        try:
            seconds += soundfile.info(files[clip]).duration
        except soundfile.LibsndfileError:
            continue
    if seconds < hours * 3600:
        raise ValueError(
            f"corpora.{name}.hours: {hours:g} h asked for, but the training speakers have {seconds / 3600:.2f} h; "
            "add a split, or set null to take all"
        )
    return taken
