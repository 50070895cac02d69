"""The endless order of a task's clips: position n -> (epoch, row), a function of the key and n alone."""

from collections.abc import Iterator
from itertools import groupby

import datasets
import numpy as np

from mtl_dist.streams.keys import generator


class Order:
    """All clips of a table once an epoch, each epoch in a new order; position n counts clips since the beginning.

    Memory: one permutation (8 bytes a row). Seeking to any position costs that and nothing else.
    """

    def __init__(self, table: datasets.Dataset, *key: object):
        if not len(table):
            raise ValueError(f"the stream {key} has no clips")
        self.table, self.key = table, key

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the row numbers of an epoch, in order: int64 (rows,)."""
        return generator(*self.key, "order", epoch).permutation(len(self.table))

    def rows(self, positions: Iterator[int]) -> Iterator[tuple[int, dict]]:
        """Yield (epoch, row) for ascending positions, read by `datasets` row by row, an epoch at a time.

        Not through `to_iterable_dataset`: inside a loader's worker that splits its shards over the workers by itself,
        and all workers but the first would get nothing of what is theirs already.
        """
        for epoch, group in groupby(positions, key=lambda n: n // len(self.table)):
            places = [n % len(self.table) for n in group]
            picked = self.table.select(self.permutation(epoch)[places])
            for row in picked:
                yield epoch, row
