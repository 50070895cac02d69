"""LibriSpeech as published (openslr.org/12): ROOT/SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac, 16 kHz.

Of the Hub: sources: [{path: openslr/librispeech_asr, config: other, split: train.500}].
"""

import dataclasses
import math
from pathlib import Path, PurePosixPath

from mtl_dist.data.corpora.base import CorpusConfig, register_corpus
from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.corpora.hours import take_hours
from mtl_dist.data.corpora.listing import Listing, require_folder, shuffled
from mtl_dist.data.corpora.synthetic import resolve_root
from mtl_dist.data.sources import ours


@register_corpus("librispeech")
@dataclasses.dataclass(kw_only=True)
class LibriSpeech(CorpusConfig):
    """LibriSpeech, unlabelled: read English speech."""

    root: str | None = None
    """Folder named LibriSpeech, with one folder per split, or a prepared one; `synthetic` makes a small stand-in."""
    splits: list[str] = dataclasses.field(default_factory=lambda: ["train-clean-100"])
    """Splits of a folder, published or prepared, by name, such as [train-clean-100, train-other-500]. Those that begin with
    dev or test are the sides for validation and test; without any, speakers are held out."""
    hours: float | None = None
    """Train on so many hours: the same clips for the same data.split_seed; null for all."""
    heldout_share: float = 0.02
    """Share of the speakers of a folder, or of the blocks of a stream without such splits, set aside for validation, and as
    many again for test; at least one each."""

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

    def open(self, name: str, seed: int) -> Corpus:
        """As CorpusConfig.open; then take the hours asked for."""
        corpus = super().open(name, seed)
        if self.hours is not None:
            take_hours(corpus, self.hours, seed)
        return corpus

    def heldout_shares(self) -> tuple[float, float]:
        """As CorpusConfig has it."""
        return self.heldout_share, self.heldout_share

    def chosen_splits(self, there: list[str]) -> list[str]:
        """Return the training splits chosen and all others; all, where a data set does not tell training splits apart."""
        several = [split for split in there if split.startswith("train.")]
        wanted = [split.replace("-", ".") for split in self.splits if ours(split) == "train"]
        missing = [split for split in wanted if split not in there]
        if several and missing:
            raise ValueError(f"splits: {missing[0]} is not there (there: {', '.join(there)})")
        return [split for split in there if split not in several or split in wanted]

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the utterances of the chosen splits of a folder as published. Raises ValueError as `open` does."""
        folder = require_folder(
            resolve_root(root, name, "LibriSpeech"),
            field,
            "point it at the folder LibriSpeech of the unpacked archives",
        )
        rows = []
        for split in self.splits:
            own = require_folder(
                folder / split,
                f"corpora.{name}.splits",
                f"there are {_folders(folder)} in {folder}",
            )
            rows += [
                self.clip_at(PurePosixPath(split, path.name), field) | {"path": path}
                for path in own.glob("*/*/*.flac")
            ]
        if not rows:
            raise ValueError(
                f"{field}: no SPEAKER/CHAPTER/S-C-UTTERANCE.flac in the folders {', '.join(self.splits)} of {folder}"
            )
        return Listing(rows=rows)

    def clip_at(self, place: PurePosixPath, field: str) -> dict:
        """Return the row of an utterance: its id begins with the split, its name with the speaker."""
        split = next((part for part in place.parts if "-" in part), "train")
        common = {"label": None, "speaker": place.name.split("-")[0], "split": split}
        return {"id": f"{split}/{place.stem}"} | common

    def divide(self, rows: list[dict], name: str, seed: int) -> list[dict]:
        """Take validation and test from their own splits, or hold speakers out for them."""
        of_split = {f"{name}/{row['id']}": ours(row["split"]) for row in rows}
        train = {f"{name}/{row['id']}": row for row in rows if ours(row["split"]) == "train"}
        if not {"validation", "test"} <= set(of_split.values()):
            there = set(of_split.values())
            held = hold_out(train, self.heldout_share, seed, name)
            of_split |= {clip: split for clip, split in held.items() if split not in there}
        return [row | {"split": of_split[f"{name}/{row['id']}"]} for row in rows]


def _folders(root: Path) -> str:
    names = sorted(path.name for path in root.iterdir() if path.is_dir())
    return f"the folders {', '.join(names)}" if names else "no folders"


def hold_out(rows: dict[str, dict], share: float, seed: int, name: str) -> dict[str, str]:
    """Return {clip id: "validation" or "test"} for the speakers that are not trained on.

    Raises:
        ValueError: a clip has no speaker, or there are fewer than three.
    """
    nameless = [clip for clip, row in rows.items() if not row["speaker"]]
    if nameless:
        raise ValueError(
            f"corpora.{name}: {len(nameless)} clips have no speaker, such as {nameless[0]}, and speakers are held out"
        )
    speakers = {row["speaker"] for row in rows.values()}
    if len(speakers) < 3:
        raise ValueError(
            f"corpora.{name}: {len(rows)} FLAC files of {len(speakers)} speakers found; at least 3 speakers are "
            "needed (SPLIT/SPEAKER/CHAPTER/SPEAKER-CHAPTER-UTTERANCE.flac): one each for training, validation, test"
        )
    order = shuffled(speakers, seed, name, "heldout")
    count = math.ceil(share * len(order))
    part = dict.fromkeys(order[:count], "validation") | dict.fromkeys(
        order[count : 2 * count], "test"
    )
    return {clip: part[row["speaker"]] for clip, row in rows.items() if row["speaker"] in part}
