"""The steps of a run: for every task the micro-batches of one optimizer step, by one loader per rank that feeds them all.

Tasks with the same sources hear one stream: a row is read once, and each task cuts its own crop of it. A stream has L lanes
(data.lanes; by default a step's clips), and each gives global_batch / L clips a step: rank r of R owns the r-th of R equal
shares of them, and each of its loader workers some of those. So the clips of step k, with crops, noise and SNRs, are a
function of (seed, corpora, k). Tested by tests/test_lanes.py, and with whole clips by tests/test_whole_clips.py.
"""

import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch.utils.data import IterableDataset, get_worker_info

from mtl_dist.audio.clips import Clip, ClipReader
from mtl_dist.audio.reading import stored_bytes
from mtl_dist.data.batches import (
    Positions,
    Read,
    Round,
    Share,
    micro_batches,
    prepare,
    read_crops,
)
from mtl_dist.data.faults import DataError
from mtl_dist.data.lanes import START, Blocks, Lane, Part, deal_lanes
from mtl_dist.data.noise import NOISE_CUTS, Beside, read_bounded
from mtl_dist.data.workers import Rounds
from mtl_dist.runtime import World
from mtl_dist.tasks.base import Task


class ClipStream:
    """What the tasks with the same sources hear: lanes dealt to groups of parts, and lanes of noise beside them.

    Args:
        parts: of all corpora in the sources.
        noise: {corpus: parts of its recordings}.
        weights: {corpus: weight of each of its sources}.

    Raises:
        ValueError: there are no clips, or a source gets no lane.
    """

    def __init__(
        self,
        tasks: Sequence[str],
        sources: Sequence[str],
        parts: Sequence[Part],
        noise: Mapping[str, Sequence[Part]],
        *,
        lanes: int,
        weights: Mapping[str, Sequence[float]],
        rank: int | None = None,
        patience_seconds: float = 300.0,
    ):
        self.name, self.tasks, self.lanes = "+".join(sources), list(tasks), lanes
        self.bound = common = rank, patience_seconds
        self.groups = [
            (Blocks(own, *common), count) for own, count in deal_lanes(parts, lanes, weights)
        ]
        self.noise = {corpus: Blocks(own, *common) for corpus, own in noise.items()}

    def known(self) -> list:
        """Return StreamFiles.known of all files."""
        every = (*(blocks for blocks, _ in self.groups), *self.noise.values())
        return [part.files.known for blocks in every for part in blocks.parts]

    def lane(self, number: int, seed: int, positions: Positions) -> Lane:
        """Return a lane of clips at its position."""
        position = positions.get(self.name, {}).get(number, START)
        first = 0
        for group, (blocks, count) in enumerate(self.groups):
            if number < first + count:
                key = (seed, self.name, *([group] if group else []))
                return Lane(blocks, count, number - first, key, position)
            first += count
        raise ValueError(f"lane {number} of {self.lanes}")

    def noise_lanes(self, number: int, seed: int, positions: Positions) -> dict[str, Lane]:
        """Return {corpus: the lane of noise beside a lane of clips}."""
        lanes = {}
        for corpus, blocks in self.noise.items():
            name = f"{self.name}/{corpus}"
            position = positions.get(name, {}).get(number, START)
            key = seed, name
            lanes[corpus] = Lane(blocks, self.lanes, number, key, position, times=NOISE_CUTS)
        return lanes


class RoundStream(IterableDataset):
    """Yields the shares of one rank's rounds from `first_round` on, without end; `rounds` puts them together.

    Args:
        streams: those of all tasks.
        positions: where all lanes are; those that are not named are at the start.
        global_batch: clips per task and round over all ranks; a multiple of world.size * accumulation.

    Raises:
        ValueError: lanes and ranks do not go together.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Task],
        streams: Sequence[ClipStream],
        reader: ClipReader,
        seed: int,
        world: World,
        global_batch: int,
        accumulation: int,
        first_round: int = 0,
        positions: Positions | None = None,
    ):
        self.tasks, self.streams, self.reader, self.seed = tasks, streams, reader, seed
        self.world, self.global_batch, self.accumulation = world, global_batch, accumulation
        self.first_round, self.positions = first_round, positions or {}
        self.bound = streams[0].bound if streams else (None, 0.0)
        self.made: Sequence[int] = [0]
        self.known = b""
        self.end_pipe: tuple[int, int] | None = None
        for stream in streams:
            check_lanes(stream.lanes, global_batch, world.size)

    def own_lanes(self, worker: int, workers: int) -> list[tuple[ClipStream, int]]:
        """Return the (stream, lane) pairs of a worker of this rank: equal shares of them, lane by lane."""
        pairs = [
            (lane, number)
            for number, stream in enumerate(self.streams)
            for lane in range(
                stream.lanes * self.world.rank // self.world.size,
                stream.lanes * (self.world.rank + 1) // self.world.size,
            )
        ]
        pairs.sort()
        first, last = (len(pairs) * n // workers for n in (worker, worker + 1))
        return [(self.streams[number], lane) for lane, number in pairs[first:last]]

    def __iter__(self) -> Iterator[Share]:
        info = get_worker_info()
        own = self.own_lanes(*((info.id, info.num_workers) if info else (0, 1)))
        lanes = [
            (
                stream,
                number,
                stream.lane(number, self.seed, self.positions),
                stream.noise_lanes(number, self.seed, self.positions),
            )
            for stream, number in own
        ]
        for number in itertools.count(self.first_round):
            share = Share(number=number)
            try:
                self._fill(share, lanes)
            except DataError as error:  # for the ranks to say, and to end on, together
                share = Share(number=number, failure=str(error))
            self.made[info.id if info else 0] += 1
            yield share
            if share.failure:
                return

    def _fill(self, share: Share, lanes: list) -> None:
        clips: dict[str, list[tuple[int, Clip]]] = {}
        for stream, number, lane, noise in lanes:
            tasks = [self.tasks[name] for name in stream.tasks]
            for _ in range(self.global_batch // stream.lanes):
                epoch, row = next(lane)
                row.backgrounds = {
                    corpus: Beside(next(own)[1], self.reader.rate, self.bound)
                    for corpus, own in noise.items()
                }
                cut = functools.partial(
                    read_crops, row, epoch, tasks, self.reader, self.seed, share.bad
                )
                found = read_bounded(cut, row, *self.bound)
                so_far = share.read.get(row.corpus, Read())
                share.read[row.corpus] = so_far + Read(1, stored_bytes(row.audio))
                for task, clip in found.items():
                    clips.setdefault(task, []).append((epoch, clip))
            share.positions.setdefault(stream.name, {})[number] = lane.position
            for corpus, beside in noise.items():
                share.positions.setdefault(f"{stream.name}/{corpus}", {})[number] = beside.position
        for name, own in clips.items():
            share.batches[name] = prepare(self.tasks[name], own, self.seed, share.bad)

    def rounds(self, workers: int, pin_memory: bool) -> Rounds:
        """Return the iterator of this rank's whole rounds, prepared ahead by worker processes."""
        return Rounds(self, workers, pin_memory)

    def join(self, shares: list[Share]) -> Round:
        """Put the shares of all workers together and cut them into micro-batches."""
        size = self.global_batch // self.world.size // self.accumulation
        result = Round(number=shares[0].number, micro_batches={name: [] for name in self.tasks})
        result.failure = next((share.failure for share in shares if share.failure), None)
        for name in self.tasks if not result.failure else ():
            own = [share.batches[name] for share in shares if name in share.batches]
            result.micro_batches[name] = micro_batches(self.tasks[name], own, size)
            result.clips += sum(len(micro.ids) for micro in own)
            samples = sum(int(micro.batch.valid.sum()) for micro in own)
            result.audio_seconds += samples / self.reader.rate
        result.bad = [message for share in shares for message in share.bad]
        for share in shares:
            for stream, lanes in share.positions.items():
                result.positions.setdefault(stream, {}).update(lanes)
        corpora = dict.fromkeys(s for task in self.tasks.values() for s in task.config.sources)
        result.read = {
            corpus: sum((share.read.get(corpus, Read()) for share in shares), Read())
            for corpus in corpora
        }
        return result


def check_lanes(lanes: int, global_batch: int, ranks: int) -> None:
    """Raise ValueError unless lanes give whole numbers of clips a step, and ranks own whole numbers of lanes."""
    if global_batch % lanes or lanes % ranks:
        fits = [n for n in range(1, global_batch + 1) if not global_batch % n and not n % ranks]
        raise ValueError(
            f"data.lanes: {lanes} lanes, {ranks} ranks and a train.global_batch of {global_batch} do not go together: lanes "
            f"must divide the batch and be a multiple of the ranks; use {', '.join(map(str, fits)) or 'other ranks'}"
        )
