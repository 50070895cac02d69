"""Rounds: for every task the micro-batches of one optimizer step, and one loader per rank that feeds them all.

The clips of round k, with crops, noise and SNRs, are a function of (seed, task, k): round k takes positions
k G .. (k + 1) G - 1 of each task's order (G is the global batch), rank r of R the r-th of R equal shares of them.
Memory of a worker: one permutation per task and one round of float32 crops. Tested by tests/test_streams.py, and with whole
clips by tests/test_whole_clips.py.
"""

import dataclasses
import itertools
import signal
import time
from collections.abc import Iterator, Mapping

from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import stored_bytes
from mtl_dist.runtime import World
from mtl_dist.streams.batches import MicroBatch, Read, micro_batches, prepare
from mtl_dist.streams.order import Order
from mtl_dist.streams.retry import ShardError
from mtl_dist.streams.table import Table
from mtl_dist.tasks.base import Task, TaskBatch


@dataclasses.dataclass(kw_only=True)
class Round:
    """What one rank needs for one optimizer step: {task: [micro-batch] * accumulation}."""

    number: int
    micro_batches: dict[str, list[MicroBatch]]
    bad: list[str] = dataclasses.field(default_factory=list)
    """"file: reason" of every clip that could not be used; its place is empty."""
    clips: int = 0
    audio_seconds: float = 0.0
    read: dict[str, "Read"] = dataclasses.field(default_factory=dict)
    """By corpus, of all its clips in the round."""
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


SECONDS_AFTER_SIGTERM = 120
"""A worker that is told to stop ends with its training process, and after this at the latest."""

PARTS_AHEAD = 4
"""How many parts of rounds each worker prepares ahead."""


@dataclasses.dataclass(kw_only=True)
class Part:
    """What one worker prepares of a round: {task: its clips' batch and ids}, in order of their places in the round."""

    number: int
    batches: dict[str, MicroBatch] = dataclasses.field(default_factory=dict)
    bad: list[str] = dataclasses.field(default_factory=list)
    read: dict[str, Read] = dataclasses.field(default_factory=dict)
    failure: str | None = None
    """Why there is nothing in it, if so; it is the worker's last."""


class RoundStream(IterableDataset):
    """Yields the parts of one rank's rounds from `first_round` on, without end; `rounds` puts them together.

    A worker takes the same places of every round, and so the same lanes of the order (streams/order.py).

    Args:
        tables: {task: rows of all its sources}.
        positions: {task: clips consumed by all ranks before `first_round`}.
        global_batch: clips per task and round over all ranks; a multiple of world.size * accumulation.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Task],
        tables: Mapping[str, Table],
        reader: ClipReader,
        seed: int,
        world: World,
        global_batch: int,
        accumulation: int,
        first_round: int = 0,
        positions: Mapping[str, int] | None = None,
    ):
        self.tasks, self.tables, self.reader, self.seed = tasks, tables, reader, seed
        self.world, self.global_batch, self.accumulation = world, global_batch, accumulation
        self.first_round = first_round
        self.positions = dict(positions or dict.fromkeys(tasks, 0))

    def own_places(self, worker: int, workers: int) -> dict[str, range]:
        """Return {task: places in the round} of a worker of this rank: equal shares of all (place, task) pairs.

        Place by place, so that workers have the same work; with fewer places than workers, they share the tasks of one.
        """
        share, names = self.global_batch // self.world.size, list(self.tasks)
        first, last = (share * len(names) * n // workers for n in (worker, worker + 1))
        begin = self.world.rank * share
        return {
            name: range(begin + -(-(first - t) // len(names)), begin + -(-(last - t) // len(names)))
            for t, name in enumerate(names)
        }

    def __iter__(self) -> Iterator[Part]:
        number = self.first_round
        try:
            for part in self._parts():
                yield part
                number += 1
        except ShardError as error:  # for the ranks to say, and to end on, together
            yield Part(number=number, failure=str(error))

    def _parts(self) -> Iterator[Part]:
        info = get_worker_info()
        own = self.own_places(*((info.id, info.num_workers) if info else (0, 1)))
        rows = {name: self._rows(name, places) for name, places in own.items()}
        for number in itertools.count(self.first_round):
            part = Part(number=number)
            for name, places in own.items():
                if places:
                    picked = [next(rows[name]) for _ in places]
                    part.batches[name], bad = prepare(
                        self.tasks[name], picked, self.reader, self.seed
                    )
                    part.bad += bad
                    for _, row in picked:
                        so_far = part.read.get(row["corpus"], Read())
                        part.read[row["corpus"]] = so_far + Read(1, stored_bytes(row["audio"]))
            yield part

    def _rows(self, name: str, places: range) -> Iterator[tuple[int, dict]]:
        """Yield (epoch, row with its audio) of the places of all rounds to come."""
        table = self.tables[name]
        first = self.positions[name] // self.global_batch
        walks = []
        for number, (rows, dealt) in enumerate(table.dealt(self.global_batch)):
            own = range(max(places.start, dealt.start), min(places.stop, dealt.stop))
            key = (self.seed, name, *([number] if number else []))
            order = Order(table.blocks()[rows], len(dealt), key)
            positions = endless_positions(first, own, dealt)
            walks.append((order.rows(positions), rows, len(own)))
        read = table.reader(held=len(places))
        while True:
            for walk, rows, count in walks:
                for epoch, row in itertools.islice(walk, count):
                    yield epoch, read(int(rows[row]))

    def rounds(self, workers: int, pin_memory: bool) -> "Rounds":
        """Return the iterator of this rank's whole rounds, prepared ahead by worker processes."""
        return Rounds(self, workers, pin_memory)

    def join(self, parts: list[Part]) -> Round:
        """Put the parts of all workers together and cut them into micro-batches."""
        size = self.global_batch // self.world.size // self.accumulation
        result = Round(number=parts[0].number, micro_batches={})
        result.failure = next((part.failure for part in parts if part.failure), None)
        for name in self.tasks:
            if result.failure:
                result.micro_batches[name] = []
                continue
            own = [part.batches[name] for part in parts if name in part.batches]
            result.micro_batches[name] = micro_batches(self.tasks[name], own, size)
            result.clips += sum(len(micro.ids) for micro in own)
            samples = sum(int(micro.batch.valid.sum()) for micro in own)
            result.audio_seconds += samples / self.reader.rate
        result.bad = [message for part in parts for message in part.bad]
        corpora = dict.fromkeys(s for task in self.tasks.values() for s in task.config.sources)
        result.read = {
            corpus: sum((part.read.get(corpus, Read()) for part in parts), Read())
            for corpus in corpora
        }
        return result


def endless_positions(first_round: int, own: range, dealt: range) -> Iterator[int]:
    """Yield the positions, in the order of a group with the places `dealt`, of the places `own` of all rounds to come."""
    return (
        n * len(dealt) + place - dealt.start for n in itertools.count(first_round) for place in own
    )


class Rounds:
    """The whole rounds of one rank, in order."""

    def __init__(self, stream: RoundStream, workers: int, pin_memory: bool):
        self.stream, self.parts, self.pin_memory = stream, max(1, workers), pin_memory
        loader = DataLoader(
            stream,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=PARTS_AHEAD if workers else None,
            worker_init_fn=_outlive_signals,
        )
        self.loader = iter(loader)

    def __iter__(self) -> "Rounds":
        return self

    def __next__(self) -> Round:
        """Wait for the next round."""
        ahead, began = self.ahead(), time.perf_counter()
        parts = [next(self.loader) for _ in range(self.parts)]
        assert len({part.number for part in parts}) == 1, "the loader asks its workers in turns"
        round_ = self.stream.join(parts)
        round_.ahead, round_.waited = ahead, time.perf_counter() - began
        return round_.pin_memory() if self.pin_memory else round_

    def ahead(self) -> float:
        """Return how many rounds the workers have ready."""
        if not isinstance(self.loader, _MultiProcessingDataLoaderIter):
            return 0.0
        taken_out_of_turn = sum(len(info) == 2 for info in self.loader._task_info.values())
        return (self.loader._data_queue.qsize() + taken_out_of_turn) / self.parts

    def close(self) -> None:
        """End the workers now: the traceback of an error keeps this alive, and `del` would come too late.

        The process would then wait at its exit for workers that outlive signals, and an elastic restart for the process.
        """
        if isinstance(self.loader, _MultiProcessingDataLoaderIter):
            self.loader._shutdown_workers()
            for worker in self.loader._workers:  # one that waits for data hears of nothing else
                worker.kill()


def _outlive_signals(worker: int) -> None:
    """Let a loader's worker go on when the whole process group is told to stop: the round has to be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SECONDS_AFTER_SIGTERM))
