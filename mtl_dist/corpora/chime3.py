"""CHiME-3 background recordings: ROOT/**/BGD_<yymmdd>_<nnn>_<BUS|CAF|PED|STR>.CH<1-6>.wav (or .flac), 16 kHz."""

import dataclasses
import re
from pathlib import PurePath

from mtl_dist.corpora.base import Corpus, Listing, register_corpus, require_folder
from mtl_dist.corpora.sharded import FromSources
from mtl_dist.corpora.synthetic import resolve_root

PIECE = re.compile(r"(?:.*/)?BGD_\d+_\w+?_([A-Z]{3})(?:\.CH(\d))?(?:_\d+)?(?:\.(?:wav|flac))?$")
NAME = re.compile(r"BGD_\d+_\w+?_([A-Z]{3})(?:\.CH(\d))?\.(?:wav|flac)$")


@register_corpus("chime3")
@dataclasses.dataclass(kw_only=True)
class Chime3(FromSources):
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

    def load(self, name: str, split_seed: int) -> Corpus:
        """List the recordings; every one serves all splits, each split with a stretch of its own (corpora/noise.py)."""
        found = self.listing(name)
        return found.corpus(name, [row | {"id": f"{name}/{row['id']}"} for row in found.rows])

    def listing(self, name: str) -> Listing:
        """List the recordings of the chosen environments and channels. Raises ValueError where there are none."""
        found = self.from_sources(name, "chime3")
        return dataclasses.replace(found, rows=self._chosen(found.rows, name))

    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the recordings of a folder as published. Raises ValueError where there are none."""
        root = require_folder(
            resolve_root(root, name, "CHiME3"),
            field,
            "point it at the CHiME-3 backgrounds, in the original data/audio/16kHz/backgrounds",
        )
        found = [
            (path, match)
            for path in sorted(root.rglob("BGD_*"))
            if (match := NAME.match(path.name))
        ]
        rows = [
            self.clip_at(path, field) | {"path": path}
            for path, match in found
            if match[1] in self.environments and int(match[2] or 1) in self.channels
        ]
        if not rows:
            there = sorted({match[1] for _, match in found})
            raise ValueError(
                f"corpora.{name}: no BGD_*.wav of the environments {self.environments} and channels {self.channels} "
                f"under {root}; environments there: {there or 'none'}"
            )
        return Listing(rows=rows)

    def clip_at(self, place: PurePath, field: str) -> dict:
        """Return the row of a recording, named by its file."""
        return {"id": place.stem, "label": None, "speaker": None, "split": "train"}

    def _chosen(self, rows: list[dict], name: str) -> list[dict]:
        """Return the rows, recordings or pieces of them, of the chosen environments and channels."""
        chosen = []
        for row in rows:
            match = PIECE.match(row["id"])
            if match and match[1] in self.environments and int(match[2] or 1) in self.channels:
                chosen.append(row | {"split": row["split"] or "train"})
        if not chosen:
            raise ValueError(
                f"corpora.{name}: none of the {len(rows)} recordings is named as CHiME-3 names those of the environments "
                f"{self.environments} and channels {self.channels}"
            )
        return chosen
