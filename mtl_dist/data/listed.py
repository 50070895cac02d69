"""Rows that are listed, as lanes read them: their audio lies in files of their own. Tested by tests/test_lanes.py."""

import dataclasses
import functools
import os
from collections.abc import Iterator

import numpy as np
import pyarrow as pa
from datasets import Dataset, IterableDataset

LISTED_BLOCKS, MOST_LISTED_ROWS = 512, 256
"""Blocks that listed rows are cut into, or up to twice as many, of so many rows at most."""


@dataclasses.dataclass
class RowFiles:
    """Listed rows, whose audio lies in files of their own: a Dataset with our columns, in the order of its blocks."""

    rows: Dataset
    table_bytes = 0
    systems: list = dataclasses.field(default_factory=list)
    """The fsspec file systems of URLs."""

    @property
    def known(self) -> object:
        """As StreamFiles has it."""
        return self.systems

    @functools.cached_property
    def size(self) -> int:
        """Rows of a block."""
        return min(MOST_LISTED_ROWS, max(1, len(self.rows) // LISTED_BLOCKS))

    @functools.cached_property
    def table(self) -> pa.Table:
        """All rows."""
        return self.rows.with_format("arrow")[:]

    def blocks(self) -> np.ndarray:
        """As StreamFiles has it."""
        count = -(-len(self.rows) // self.size)
        return np.stack([np.arange(count), np.zeros(count, np.int64)], axis=1)

    def read(self, file: int, part: int) -> Iterator[pa.Table]:
        """Yield the table of a block."""
        yield self.table[file * self.size : (file + 1) * self.size]

    def read_lengths(self, file: int, part: int) -> Iterator[pa.Table]:
        """As StreamFiles has it."""
        return self.read(file, part)

    def name(self, file: int, part: int) -> str:
        """As StreamFiles has it."""
        return f"listed rows from {file * self.size} on"

    def unseen(self) -> str | None:
        """As StreamFiles has it, of the first row: the others lie beside it."""
        path = self.rows[0]["audio"]["path"] if len(self.rows) else None
        return path if path and "://" not in path and not os.path.exists(path) else None

    def select(self, blocks: np.ndarray) -> IterableDataset:
        """Return some blocks as one stream."""
        numbers = [n for f, _ in blocks.tolist() for n in range(f * self.size, (f + 1) * self.size)]
        rows = self.rows.select([n for n in numbers if n < len(self.rows)])
        return rows.to_iterable_dataset(num_shards=min(64, max(1, len(rows))))
