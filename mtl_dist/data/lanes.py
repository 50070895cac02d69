"""The endless order of clips: blocks dealt to lanes, a lane's rows one after the other, free of ranks and workers.

Every epoch deals the blocks anew, shuffled, to L lanes, going on where the last epoch's deal ended; a lane reads its blocks
one after the other, the rows of each table shuffled, and goes on to the next epoch by itself. Its position is (epoch, turn,
row): which of its blocks of that epoch, and which row of it comes next. Tested by tests/test_lanes.py.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa

from mtl_dist.audio.clips import Row
from mtl_dist.data.columns import rows_of
from mtl_dist.data.faults import DataError, call_with_timeout, rank_label, reason
from mtl_dist.data.keys import generator
from mtl_dist.data.listed import RowFiles
from mtl_dist.data.streams import StreamFiles

Position = tuple[int, int, int]
START: Position = (0, 0, 0)


@dataclasses.dataclass(kw_only=True)
class Part:
    """What a corpus' split takes of one source.

    Attributes:
        blocks: (file, part) of each: int64 (blocks, 2).
        keep: which ids, where not all; of labelled corpora.
        clips: how many; `exact` unless they were estimated by one block.
        span: share of each recording that may be heard, of noise.
    """

    corpus: str
    split: str
    files: StreamFiles | RowFiles
    blocks: np.ndarray
    keep: Callable[[str], bool] | None = None
    classes: Mapping[str, int] = dataclasses.field(default_factory=dict)
    source: int = 0
    clips: int = 0
    exact: bool = True
    span: tuple[float, float] = (0.0, 1.0)


class Blocks:
    """The blocks of some parts by number, and the rows in them.

    Args:
        rank: for messages.
        patience_seconds: a read that takes longer is given up.

    Raises:
        ValueError: there are no blocks.
    """

    def __init__(
        self, parts: Sequence[Part], rank: int | None = None, patience_seconds: float = 300
    ):
        self.parts, self.rank, self.patience = list(parts), rank, patience_seconds
        counts = [len(part.blocks) for part in self.parts]
        if not sum(counts):
            raise ValueError(
                f"{', '.join({p.corpus for p in parts}) or 'the stream'}: holds no clips"
            )
        self._part = np.repeat(np.arange(len(counts)), counts)
        self._place = np.concatenate([part.blocks for part in self.parts])
        self._order: dict[tuple, np.ndarray] = {}
        self.empty: set[int] = set()
        """The numbers of those that were read and hold no rows; lanes pass over them."""

    def __len__(self) -> int:
        return len(self._place)

    def order(self, *key: object) -> np.ndarray:
        """Return the numbers of the blocks in the order of a key; the latest are kept, as all lanes ask for the same."""
        if key not in self._order:
            while len(self._order) > 2:
                self._order.pop(next(iter(self._order)))
            self._order[key] = generator(*key).permutation(len(self))
        return self._order[key]

    def note_empty(self, number: int) -> None:
        """Let lanes pass over a block. Raises DataError where there is no other left."""
        self.empty.add(number)
        if len(self.empty) == len(self):
            corpora = ", ".join(dict.fromkeys(part.corpus for part in self.parts))
            raise DataError(
                f"{rank_label(self.rank)}, corpus {corpora}: none of its {len(self)} blocks holds a clip"
            )

    def rows(self, number: int, key: tuple, first: int = 0) -> Iterator[tuple[int, Row]]:
        """Yield (place, row) of a block from place `first` on, those of each table shuffled by the key.

        Raises:
            DataError: it cannot be read, naming rank, corpus, file and the reason.
        """
        part, (file, block) = self.parts[self._part[number]], self._place[number].tolist()
        tables, name = part.files.read(file, block), part.files.name(file, block)
        place = before = 0
        while (found := self._next(tables, part, name)) is not None:
            rows, audio_of = found
            kept = [n for n, row in enumerate(rows) if part.keep is None or part.keep(row["id"])]
            order = range(len(kept))
            if len(kept) > 1:
                order = generator(*key, "rows", number, before).permutation(len(kept)).tolist()
            for offset, drawn in enumerate(order):
                if place + offset >= first:
                    at = kept[drawn]
                    row = _row(part, rows[at], audio_of(at), (name, f"{file}-{block}"), before + at)
                    yield place + offset, row
            place, before = place + len(kept), before + len(rows)

    def _next(self, tables: Iterator[pa.Table], part: Part, name: str):
        """Return the next table's rows as rows_of has them. Raises DataError."""

        def ask():
            table = next(tables, None)
            return None if table is None else rows_of(table)

        if isinstance(part.files, RowFiles):
            return ask()
        what = f"{rank_label(self.rank)}, corpus {part.corpus}, {name}"
        try:
            return call_with_timeout(ask, self.patience, what)
        except Exception as error:  # whatever file systems, transports and formats raise
            raise DataError(f"{what}: {reason(error)}") from error


def _row(part: Part, values: dict, audio: dict, names: tuple[str, str], place: int) -> Row:
    """Return a row of a block; what has no id is called by its place there, the same in every epoch."""
    name, nameless = names
    clip = values.pop("id") or f"{nameless}-{place}"
    if audio["bytes"] is None and not audio["path"]:
        audio = {"bytes": b"", "path": None}
    if audio["bytes"] is not None:
        audio["path"] = f"{name}, row {place} ({clip})"
    return Row(
        id=f"{part.corpus}/{clip}",
        audio=audio,
        label=part.classes.get(values.pop("label"), -1),
        split=part.split,
        corpus=part.corpus,
        span=part.span,
        **values,
    )


class Lane:
    """One lane's endless rows: an iterator of (epoch, row); `position` is where the next one is.

    Args:
        lanes, number: how many lanes there are, and which this is.
        key: what the order is for.
        times: how often each row comes, one time after the other; the position's last number counts them all.
    """

    def __init__(
        self,
        blocks: Blocks,
        lanes: int,
        number: int,
        key: tuple,
        position: Sequence[int] = START,
        times: int = 1,
    ):
        self.blocks, self.lanes, self.number, self.key, self.times = (
            blocks,
            lanes,
            number,
            key,
            times,
        )
        self.position: Position = tuple(position)
        self._walk = self._rows()

    def __iter__(self) -> "Lane":
        return self

    def __next__(self) -> tuple[int, Row]:
        """Return the next (epoch, row). Raises DataError where it cannot be read."""
        return next(self._walk)

    def own(self, epoch: int) -> np.ndarray:
        """Return the numbers of the lane's blocks in an epoch; the deal goes on where that of the epoch before ended."""
        first = (self.number - epoch * len(self.blocks)) % self.lanes
        return self.blocks.order(*self.key, "blocks", epoch)[first :: self.lanes]

    def _rows(self) -> Iterator[tuple[int, Row]]:
        epoch, first_turn, first_row = self.position
        count = len(self.blocks)
        while True:
            epoch += (
                (self.number - epoch * count) % self.lanes // count
            )  # those that deal it nothing
            own = self.own(epoch).tolist()
            for turn in range(first_turn, len(own)):
                if own[turn] in self.blocks.empty:
                    continue
                heard = first_row > 0
                first, again = divmod(first_row, self.times)
                for place, row in self.blocks.rows(own[turn], (*self.key, epoch), first):
                    for time in range(again, self.times):
                        self.position, heard = (epoch, turn, place * self.times + time + 1), True
                        yield epoch, row
                    again = 0
                first_row = 0
                if not heard:
                    self.blocks.note_empty(own[turn])
            epoch, first_turn = epoch + 1, 0


def deal_lanes(parts: Sequence[Part], lanes: int, weights: Mapping[str, Sequence[float]]):
    """Deal lanes to groups of parts: [(parts, lanes)]; one group where no source has a weight.

    The clips of a corpus with weights are as many as without, but each source has a group, and its share by weight.

    Args:
        weights: {corpus: weight of each of its sources}, of those that have weights.

    Raises:
        ValueError: a source would not get a lane.
    """
    others = [part for part in parts if part.corpus not in weights]
    groups = [(others, "the other corpora", sum(part.clips for part in others))]
    for corpus, shares in weights.items():
        own = [part for part in parts if part.corpus == corpus]
        clips = sum(part.clips for part in own)
        for number, weight in enumerate(shares):
            chosen = [part for part in own if part.source == number]
            groups.append(
                (chosen, f"corpora.{corpus}.sources[{number}]", clips * weight / sum(shares))
            )
    groups = [group for group in groups if group[2] > 0]
    if not groups:
        raise ValueError("the corpora hold no training clips")
    ideal = lanes * np.array([share for *_, share in groups]) / sum(s for *_, s in groups)
    counts = np.floor(ideal).astype(int)
    for number in np.argsort(counts - ideal, kind="stable")[: lanes - counts.sum()]:
        counts[number] += 1
    for (chosen, what, _), count in zip(groups, counts.tolist(), strict=True):
        if count == 0 or not chosen:
            raise ValueError(
                f"{what}: {count} of {lanes} lanes by its weight, and {sum(p.clips for p in chosen)} clips; raise the "
                "weight, train.global_batch or data.lanes, or leave it out"
            )
    return [(chosen, count) for (chosen, *_), count in zip(groups, counts.tolist(), strict=True)]
