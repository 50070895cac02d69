"""Rows of clips, and their audio: in files of their own, here or at URLs, or in blocks (row groups) that are read whole."""

import collections
import dataclasses
from collections.abc import Callable, Mapping

import datasets
import numpy as np

from mtl_dist.streams.shard_file import Audio
from mtl_dist.streams.shards import Shards


@dataclasses.dataclass(frozen=True)
class Table:
    """Rows as corpora/base.py has them, and {corpus: where its blocks are read} for those without a file of their own.

    `weights` is {corpus: weight of each of its sources} of those that have weights.
    """

    rows: datasets.Dataset
    shards: Mapping[str, Shards] = dataclasses.field(default_factory=dict)
    weights: Mapping[str, list[float]] = dataclasses.field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key):
        """Return a column by name, or a row, without the audio of blocks, by number."""
        return self.rows[key]

    def blocks(self) -> np.ndarray:
        """Return which rows lie together: int64 (rows,), equal numbers from 0 for rows of one block."""
        block = np.asarray(self.rows.with_format("numpy")["block"][:], dtype=np.int64)
        alone = block < 0
        if alone.all():
            return np.arange(len(self))
        corpus = np.unique(np.asarray(self.rows["corpus"][:]), return_inverse=True)[1].reshape(-1)
        owner = np.where(alone, -1, corpus)
        place = np.where(alone, np.arange(len(self)), block)
        both = (owner + 1) * (place.max() + 1) + place
        return np.unique(both, return_inverse=True)[1].reshape(-1).astype(np.int64)

    def dealt(self, places: int) -> list[tuple[np.ndarray, range]]:
        """Deal the places of a round to groups of rows: [(row numbers, places)]; one group where no source has a weight.

        The clips of a corpus with weights are as many as without, but each source has a group, and its share by weight.

        Raises:
            ValueError: a source would not get one clip a round.
        """
        corpus = np.asarray(self.rows["corpus"][:])
        source = np.asarray(self.rows["source"][:])
        others = ~np.isin(corpus, list(self.weights))
        groups, shares = [(np.flatnonzero(others), "the other corpora")], [others.sum()]
        for name, weights in self.weights.items():
            count = (corpus == name).sum()
            for number, weight in enumerate(weights):
                rows = np.flatnonzero((corpus == name) & (source == number))
                groups.append((rows, f"corpora.{name}.sources[{number}]"))
                shares.append(count * weight / sum(weights))
        ideal = places * np.array(shares) / sum(shares)
        counts = np.floor(ideal).astype(int)
        for number in np.argsort(counts - ideal, kind="stable")[: places - counts.sum()]:
            counts[number] += 1
        for (rows, what), share, count in zip(groups, shares, counts, strict=True):
            if share > 0 and (count == 0 or not len(rows)):
                raise ValueError(
                    f"{what}: {len(rows)} clips and {count} of a round's {places} by its weight; raise the weight or "
                    "train.global_batch, or leave it out"
                )
        ends = np.cumsum(counts).tolist()
        dealt = [range(end - count, end) for end, count in zip(ends, counts.tolist(), strict=True)]
        return [(rows, own) for (rows, _), own in zip(groups, dealt, strict=True) if len(own)]

    def reader(self, held: int) -> Callable[[int], dict]:
        """Return read(row number) -> row with its audio, which keeps the last `held` blocks in memory.

        Raises ShardError, when it is called, for a block that cannot be read.
        """
        blocks: collections.OrderedDict[tuple[str, int], list[Audio]] = collections.OrderedDict()
        table = self.rows.with_format("arrow")[:]  # a row of `datasets` takes twenty times as long
        columns = {name: table[name].combine_chunks() for name in table.column_names}

        def read(number: int) -> dict:
            row = {name: values[number].as_py() for name, values in columns.items()}
            corpus, block, place = row["corpus"], row["block"], row["place"]
            if block < 0:
                path = row["audio"]["path"] or ""
                return row | {"audio": self.shards[corpus].clip(path)} if "://" in path else row
            shards = self.shards[corpus]
            if (corpus, block) not in blocks:
                while len(blocks) >= max(1, held):
                    blocks.popitem(last=False)
                blocks[corpus, block] = shards.read(block)
            blocks.move_to_end((corpus, block))
            data = blocks[corpus, block][place]
            name = f"{shards.name(block)}, row {place} ({row['id']})"
            return row | {"audio": {"path": name, "bytes": data or b""}}

        return read
