"""The steps of a run: for every task the micro-batches of one optimizer step, by one loader per rank that feeds them all.

Tasks with the same sources hear one stream: a row is read once, and each task cuts its own crop of it. A stream has L lanes
(data.lanes; by default a step's clips), and each gives global_batch / L clips a step: rank r of R owns the r-th of R equal
shares of them, and each of its loader workers some of those. So the clips of step k, with crops, noise and SNRs, are a
function of (seed, corpora, k). Tested by tests/test_lanes.py, and with whole clips by tests/test_whole_clips.py.
"""

import dataclasses
import functools
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TypeVar

import fsspec
import numpy as np
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from mtl_dist.audio.clips import Background, Clip, ClipReader, Row
from mtl_dist.audio.reading import FarFileError, stored_bytes
from mtl_dist.data.batches import MicroBatch, Read, micro_batches, prepare, read_crops
from mtl_dist.data.faults import DataError, call_with_timeout, rank_label, reason
from mtl_dist.data.lanes import START, Blocks, Lane, Part, Position, deal_lanes
from mtl_dist.runtime import World
from mtl_dist.tasks.base import Task, TaskBatch

Result = TypeVar("Result")

SECONDS_AFTER_SIGTERM = 120
"""A worker that is told to stop ends with its training process, and after this at the latest."""

NOISE_CUTS = 8
"""How many clips of a lane, one after the other, have noise cut from one recording or piece, each at a place of its own: a
row group of noise is read as seldom as one of clips, and takes a fraction of the memory."""

PARTS_AHEAD = 4
"""How many parts of rounds each worker prepares ahead."""

Positions = dict[str, dict[int, Position]]
"""{stream: {lane: where its next clip is}}; noise beside a stream has the name STREAM/CORPUS."""


@dataclasses.dataclass(kw_only=True)
class Round:
    """What one rank needs for one optimizer step: {task: [micro-batch] * accumulation}."""

    number: int
    micro_batches: dict[str, list[MicroBatch]]
    bad: list[str] = dataclasses.field(default_factory=list)
    """"file: reason" of every clip that could not be used; its place is empty."""
    clips: int = 0
    audio_seconds: float = 0.0
    read: dict[str, Read] = dataclasses.field(default_factory=dict)
    """By corpus, of all its clips in the round."""
    positions: Positions = dataclasses.field(default_factory=dict)
    """Of this rank's lanes, after the round."""
    ahead: float = 0.0
    """How many rounds were ready when this one was asked for."""
    waited: float = 0.0
    """Seconds until it was there."""
    failure: str | None = None
    """Why this rank has no audio for it, if so; it has none for later ones either."""

    def pin_memory(self) -> "Round":
        """Let the loader move the batches to page-locked memory, from where a GPU fetches them by itself."""
        for name, batches in self.micro_batches.items():
            self.micro_batches[name] = [
                dataclasses.replace(m, batch=TaskBatch(*(t.pin_memory() for t in m.batch)))
                for m in batches
            ]
        return self


@dataclasses.dataclass(kw_only=True)
class Share:
    """What one worker prepares of a round: {task: its clips' batch and ids}, in order of their places in the round."""

    number: int
    batches: dict[str, MicroBatch] = dataclasses.field(default_factory=dict)
    bad: list[str] = dataclasses.field(default_factory=list)
    read: dict[str, Read] = dataclasses.field(default_factory=dict)
    positions: Positions = dataclasses.field(default_factory=dict)
    failure: str | None = None
    """Why there is nothing in it, if so; it is the worker's last."""


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
                found = read_bounded(cut, [row], *self.bound)
                so_far = share.read.get(row.corpus, Read())
                share.read[row.corpus] = so_far + Read(1, stored_bytes(row.audio))
                for task, clip in found.items():
                    clips.setdefault(task, []).append((epoch, clip))
            share.positions.setdefault(stream.name, {})[number] = lane.position
            for corpus, beside in noise.items():
                share.positions.setdefault(f"{stream.name}/{corpus}", {})[number] = beside.position
        for name, own in clips.items():
            share.batches[name] = prepare(self.tasks[name], own, self.seed, share.bad)

    def rounds(self, workers: int, pin_memory: bool) -> "Rounds":
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


def read_bounded(
    action: Callable[[], Result], rows: Sequence[Row], rank: int | None, seconds: float
) -> Result:
    """Return `action()`, which reads the audio of rows; where it is not in memory, within so many seconds.

    Raises:
        DataError: it is not there in time, or a file at a URL cannot be read.
    """
    outside = [row for row in rows if row.audio.get("bytes") is None]
    if not outside:
        return action()
    more = f" or {len(outside) - 1} others" if len(outside) > 1 else ""
    corpora = ", ".join(dict.fromkeys(row.corpus for row in outside))
    who = f"{rank_label(rank)}, corpus {corpora}"
    what = f"{who}, {outside[0].audio['path']}{more}"
    try:
        return call_with_timeout(action, seconds, what)
    except FarFileError as error:  # it names its file
        raise DataError(f"{who}, {reason(error).removeprefix('FarFileError: ')}") from error
    except TimeoutError as error:
        raise DataError(f"{what}: {reason(error)}") from error


@dataclasses.dataclass(frozen=True)
class Beside(Background):
    """A recording beside a clip; `bound` is (rank, seconds) of read_bounded."""

    bound: tuple[int | None, float]

    def cut(self, samples: int, generator: np.random.Generator) -> np.ndarray:
        """As Background.cut, within the time. Raises DataError as read_bounded does, too."""
        cut = functools.partial(Background.cut, self, samples, generator)
        return read_bounded(cut, [self.row], *self.bound)


class Rounds:
    """The whole rounds of one rank, in order."""

    def __init__(self, stream: RoundStream, workers: int, pin_memory: bool):
        self.stream, self.workers, self.pin_memory = stream, workers, pin_memory
        self.taken = 0
        stream.made = multiprocessing.RawArray(
            "q", max(1, workers)
        )  # a killed process holds no lock
        stream.known = pickle.dumps([one.known() for one in stream.streams])
        stream.end_pipe = os.pipe() if workers else None
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PARTS_AHEAD if workers else None,
            worker_init_fn=_start_worker,
        )
        self.loader = iter(loader)

    def __iter__(self) -> "Rounds":
        return self

    def __next__(self) -> Round:
        """Wait for the next round."""
        ahead, began = self.ahead(), time.perf_counter()
        shares = [next(self.loader) for _ in range(max(1, self.workers))]
        self.taken += len(shares)
        assert len({share.number for share in shares}) == 1, "the loader asks its workers in turns"
        round_ = self.stream.join(shares)
        round_.ahead, round_.waited = ahead, time.perf_counter() - began
        return round_.pin_memory() if self.pin_memory else round_

    def ahead(self) -> float:
        """Return how many rounds the workers have ready."""
        return (sum(self.stream.made) - self.taken) / self.workers if self.workers else 0.0

    def close(self) -> None:
        """End the workers now, also those that wait for data: the process would wait for them at its exit."""
        if self.stream.end_pipe is not None:
            receive, send = self.stream.end_pipe
            os.write(send, bytes(self.workers))
            self.stream.end_pipe = None
            self.loader = None
            os.close(receive)
            os.close(send)


def _start_worker(worker: int) -> None:
    """Let a worker outlive a signal to the whole process group, as the round has to be finished, and end when told so.

    `datasets` resets fsspec's lock after a fork in an iteration that lanes do not use.
    """
    fsspec.asyn.reset_lock()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SECONDS_AFTER_SIGTERM))
    pickle.loads(get_worker_info().dataset.known)
    receive, send = get_worker_info().dataset.end_pipe
    os.close(send)

    def end() -> None:
        os.read(receive, 1)  # or its end, if the training process is gone
        os._exit(0)

    threading.Thread(target=end, daemon=True).start()
