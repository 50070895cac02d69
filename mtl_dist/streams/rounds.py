"""Rounds: for every task the micro-batches of one optimizer step, and one loader per rank that feeds them all.

The clips of round k, with crops, noise and SNRs, are a function of (seed, task, k): round k takes positions
k G .. (k + 1) G - 1 of each task's order (G is the global batch), rank r of R the r-th of R equal shares of them.
Memory of a worker: one permutation per task and one round of float32 crops. Tested by tests/test_streams.py.
"""

import dataclasses
import signal
from collections.abc import Iterator, Mapping
from functools import partial

import datasets
import torch
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torch.utils.data.dataloader import _MultiProcessingDataLoaderIter

from mtl_dist.audio.clips import Clip, ClipReader
from mtl_dist.audio.reading import BadClipError
from mtl_dist.runtime import World
from mtl_dist.streams.keys import generator
from mtl_dist.streams.order import Order
from mtl_dist.tasks.base import Keyed, Task, TaskBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One task's clips of one micro-step: the batch and, for messages, the clips' ids."""

    batch: TaskBatch
    ids: list[str]


@dataclasses.dataclass(kw_only=True)
class Round:
    """What one rank needs for one optimizer step: {task: [micro-batch] * accumulation}."""

    number: int
    micro_batches: dict[str, list[MicroBatch]]
    bad: list[str] = dataclasses.field(default_factory=list)
    """"file: reason" of every clip that could not be used; its place is empty."""
    clips: int = 0
    audio_seconds: float = 0.0

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


class RoundStream(IterableDataset):
    """Yields the rounds of one rank from `first_round` on, without end.

    Args:
        tables: {task: rows of all its sources}.
        positions: {task: clips consumed by all ranks before `first_round`}.
        global_batch: clips per task and round over all ranks; a multiple of world.size * accumulation.
    """

    def __init__(
        self,
        *,
        tasks: Mapping[str, Task],
        tables: Mapping[str, datasets.Dataset],
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

    def __iter__(self) -> Iterator[Round]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        share = self.global_batch // self.world.size
        sources = {
            name: Order(self.tables[name], self.seed, name).rows(
                self._own_positions(self.positions[name], worker, workers, share)
            )
            for name in self.tasks
        }
        number = self.first_round + worker
        while True:
            yield self._build(number, sources, share)
            number += workers

    def _own_positions(self, start: int, worker: int, workers: int, share: int) -> Iterator[int]:
        """Positions of this rank and worker: its share of every `workers`-th round."""
        step = worker
        while True:
            first = start + step * self.global_batch + self.world.rank * share
            yield from range(first, first + share)
            step += workers

    def _build(self, number: int, sources: Mapping[str, Iterator], share: int) -> Round:
        result = Round(number=number, micro_batches={})
        size = share // self.accumulation
        for name, task in self.tasks.items():
            result.micro_batches[name] = []
            for _ in range(self.accumulation):
                picked = [next(sources[name]) for _ in range(size)]
                micro_batch, bad = prepare(task, picked, self.reader, self.seed)
                result.micro_batches[name].append(micro_batch)
                result.bad += bad
                result.audio_seconds += float(micro_batch.batch.valid.sum()) / self.reader.rate
            result.clips += share
        return result


def keyed_generators(seed: int, task: str, epoch: int) -> Keyed:
    """Return keyed(clip id, purpose) -> generator for the draws of a task in an epoch."""
    return partial(generator, seed, task, epoch)


def prepare(
    task: Task, rows: list[tuple[int, dict]], reader: ClipReader, seed: int
) -> tuple[MicroBatch, list[str]]:
    """Read and prepare the crops of (epoch, row) pairs: (micro-batch, ["file: reason"] of bad clips)."""
    parts, bad = [], []
    for epoch, row in rows:
        keyed = keyed_generators(seed, task.name, epoch)
        try:
            clip: Clip = reader.crop(row, task.crop_samples, keyed(row["id"], "crop"))
            parts.append(task.prepare([task.augment(clip, keyed)], keyed))
        except BadClipError as error:
            bad.append(str(error))
            parts.append(task.prepare([reader.absent(row)], keyed))
    batch = TaskBatch(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    return MicroBatch(batch=batch, ids=[row["id"] for _, row in rows]), bad


def make_loader(stream: RoundStream, workers: int, pin_memory: bool) -> DataLoader:
    """Return the loader of a rank: rounds in order, prepared ahead by worker processes."""
    return DataLoader(
        stream,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        prefetch_factor=2 if workers else None,
        worker_init_fn=_outlive_signals,
    )


def end_workers(rounds: Iterator[Round]) -> None:
    """End the workers of a loader's iterator now, for `del` may come too late: the traceback of an error keeps it alive.

    Its process would then wait at its exit for workers that outlive signals, and an elastic restart for the process.
    """
    if isinstance(rounds, _MultiProcessingDataLoaderIter):
        rounds._shutdown_workers()


def _outlive_signals(worker: int) -> None:
    """Let a loader's worker go on when the whole process group is told to stop: the round has to be finished."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(SECONDS_AFTER_SIGTERM))
