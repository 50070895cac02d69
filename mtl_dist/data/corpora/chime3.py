"""CHiME-3 background recordings: ROOT/**/BGD_<yymmdd>_<nnn>_<BUS|CAF|PED|STR>.CH<1-6>.wav (or .flac), 16 kHz."""

import dataclasses
import re
from collections.abc import Callable
from pathlib import PurePosixPath

from mtl_dist.data.corpora.base import CorpusConfig, register_corpus
from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.corpora.listing import Listing, require_folder
from mtl_dist.data.corpora.synthetic import resolve_root

PIECE = re.compile(r"(?:.*/)?BGD_\d+_\w+?_([A-Z]{3})(?:\.CH(\d))?(?:_\d+)?(?:\.(?:wav|flac))?$")
NAME = re.compile(r"BGD_\d+_\w+?_([A-Z]{3})(?:\.CH(\d))?\.(?:wav|flac)$")


@register_corpus("chime3")
@dataclasses.dataclass(kw_only=True)
class Chime3(CorpusConfig):
    """CHiME-3 backgrounds, unlabelled noise."""

    root: str | None = None
    """Folder that holds the BGD_*.wav files at any depth, or a prepared one; `synthetic` makes a small stand-in."""
    environments: list[str] = dataclasses.field(
        default_factory=lambda: ["BUS", "CAF", "PED", "STR"]
    )
    """Environments to use: bus, cafe, pedestrian area, street junction. (The paper also lists BTH, the booth, which
    the published backgrounds do not hold.)"""
    channels: list[int] = dataclasses.field(default_factory=lambda: [1, 2, 3, 4, 5, 6])
    """Microphones to use, 1 to 6."""

    def open(self, name: str, seed: int) -> Corpus:
        """As CorpusConfig.open; prepared ones are in pieces, of which every split has its own."""
        corpus = super().open(name, seed)
        return dataclasses.replace(corpus, in_pieces=bool(corpus.parts["validation"]))

    def keep(self) -> Callable[[str], bool]:
        """Return whether an id names a recording, or a piece, of the chosen environments and channels."""
        return Recordings(tuple(self.environments), tuple(self.channels))

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the recordings of a folder as published. Raises ValueError where there are none."""
        root = require_folder(
            resolve_root(root, name, "CHiME3"),
            field,
            "point it at the CHiME-3 backgrounds, in the original data/audio/16kHz/backgrounds",
        )
        found = [path for path in sorted(root.rglob("BGD_*")) if NAME.match(path.name)]
        keep = self.keep()
        rows = [self.clip_at(p, field) | {"path": p} for p in found if keep(p.name)]
        if not rows:
            there = sorted({NAME.match(path.name)[1] for path in found})
            raise ValueError(
                f"corpora.{name}: no BGD_*.wav of the environments {self.environments} and channels {self.channels} "
                f"under {root}; environments there: {there or 'none'}"
            )
        return Listing(rows=rows)

    def clip_at(self, place: PurePosixPath, field: str) -> dict:
        """Return the row of a recording, named by its file."""
        return {"id": place.stem, "label": None, "speaker": None, "split": "train"}


@dataclasses.dataclass(frozen=True)
class Recordings:
    """Keeps what is named as CHiME-3 names its backgrounds, of some environments and channels."""

    environments: tuple[str, ...]
    channels: tuple[int, ...]

    def __call__(self, clip: str) -> bool:
        """Return whether an id is one of them."""
        match = PIECE.match(clip)
        return bool(match and match[1] in self.environments and int(match[2] or 1) in self.channels)
