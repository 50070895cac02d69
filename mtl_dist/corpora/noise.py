"""A bank of background recordings: a random stretch of a random file, none of it shared between splits."""

import datasets
import numpy as np

from mtl_dist.audio.reading import open_clip, read_stretch
from mtl_dist.audio.transforms import tile_to
from mtl_dist.corpora.base import Corpus
from mtl_dist.streams.table import Table

SPLIT_SPANS = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
"""Share of every recording that each split may hear: held-out noise is noise that was not trained on."""


class NoiseBank:
    """Draws noise at `rate` Hz from all recordings of a corpus; splits share files, but not stretches of them.

    A prepared corpus is in pieces already, of which each split has its own.
    """

    def __init__(self, corpus: Corpus, rate: int):
        if not corpus.in_pieces:
            every = datasets.concatenate_datasets(list(corpus.splits.values()))
            rows, self.spans = dict.fromkeys(SPLIT_SPANS, every), SPLIT_SPANS
        else:
            rows, self.spans = corpus.splits, dict.fromkeys(SPLIT_SPANS, (0.0, 1.0))
        empty = [split for split, part in rows.items() if not len(part)]
        if empty:
            raise ValueError(
                f"corpora.{corpus.name}: holds no recordings to draw noise from for {', '.join(empty)}"
            )
        tables = {split: Table(part, {corpus.name: corpus.shards}) for split, part in rows.items()}
        self.read = {split: table.reader(held=1) for split, table in tables.items()}
        self.count = {split: len(table) for split, table in tables.items()}
        self.rate = rate

    def draw(self, samples: int, split: str, generator: np.random.Generator) -> np.ndarray:
        """Return (samples,) float32 of background; a stretch shorter than that is repeated.

        Raises:
            BadClipError: the recording that was drawn cannot be read.
        """
        low, high = self.spans[split]
        row = self.read[split](int(generator.integers(self.count[split])))
        with open_clip(row["audio"]) as file:
            start, stop = int(low * file.frames), max(1, int(high * file.frames))
            start = min(start, stop - 1)
            frames = min(stop - start, -(-samples * file.samplerate // self.rate))
            start += int(generator.integers(0, stop - start - frames + 1))
            return tile_to(read_stretch(file, start, frames, self.rate), samples)
