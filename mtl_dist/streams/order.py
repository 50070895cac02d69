"""The endless order of a task's clips: position n -> (epoch, row), a function of the key and n alone.

Rows that lie in blocks (row groups of Parquet files) are read a block at a time. So an epoch permutes the blocks and the
rows within each, and deals the result to `lanes`: position n is the next row of lane n mod lanes. With a lane for every clip
of a round, a rank that takes the same places of every round owns their lanes, and reads each of their blocks once, one after
the other. Rows with a file of their own are blocks of one, and their order is a plain permutation.
"""

import dataclasses
from collections.abc import Iterator
from itertools import groupby

import numpy as np

from mtl_dist.streams.keys import generator


@dataclasses.dataclass(frozen=True)
class Order:
    """Every row once an epoch, each epoch in a new order; position n counts rows since the beginning.

    Args:
        blocks: int (rows,), the number of the block in which each row lies.
        lanes: how many blocks are read side by side; the clips of a round.
        key: what the order is for.

    Memory: 16 bytes a row. Seeking to any position costs one permutation and reads one block a lane.
    """

    blocks: np.ndarray
    lanes: int
    key: tuple

    def __post_init__(self):
        if not len(self.blocks):
            raise ValueError(f"the stream {self.key} has no clips")

    def __len__(self) -> int:
        """Return the number of rows, the positions of an epoch."""
        return len(self.blocks)

    def permutation(self, epoch: int) -> np.ndarray:
        """Return the row numbers of an epoch, by position: int64 (rows,)."""
        draw, count = generator(*self.key, "order", epoch), int(self.blocks.max()) + 1
        rank_of_block = draw.permutation(count)
        if count == len(self):
            return rank_of_block  # every row a block of its own: nothing is gained by lanes
        by_block = np.lexsort((draw.permutation(len(self)), rank_of_block[self.blocks]))
        lane = (epoch * len(self) + np.arange(len(self))) % self.lanes
        rows = np.empty(len(self), dtype=np.int64)
        rows[np.argsort(lane, kind="stable")] = by_block
        return rows

    def rows(self, positions: Iterator[int]) -> Iterator[tuple[int, int]]:
        """Yield (epoch, row number) for ascending positions; works out an epoch's permutation once."""
        for epoch, group in groupby(positions, key=lambda n: n // len(self)):
            permutation = self.permutation(epoch)
            for n in group:
                yield epoch, int(permutation[n % len(self)])
