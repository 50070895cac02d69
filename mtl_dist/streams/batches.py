"""Batches: the crops of some rows of a task, read, augmented and prepared; every draw by key, never by process.

Tested by tests/test_streams.py.
"""

import dataclasses
import itertools
from functools import partial
from typing import NamedTuple

import torch

from mtl_dist.audio.clips import Clip, ClipReader
from mtl_dist.audio.reading import BadClipError
from mtl_dist.streams.keys import generator
from mtl_dist.tasks.base import Keyed, Task, TaskBatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One task's clips of one micro-step: the batch and, for messages, the clips' ids."""

    batch: TaskBatch
    ids: list[str]


class Read(NamedTuple):
    """How many clips were heard, and how many bytes they have as they are stored."""

    clips: int = 0
    stored_bytes: int = 0

    def __add__(self, other: "Read") -> "Read":
        """Add up both."""
        return Read(self.clips + other.clips, self.stored_bytes + other.stored_bytes)


def keyed_generators(seed: int, task: str, epoch: int) -> Keyed:
    """Return keyed(clip id, purpose) -> generator for the draws of a task in an epoch."""
    return partial(generator, seed, task, epoch)


def prepare(
    task: Task, rows: list[tuple[int, dict]], reader: ClipReader, seed: int
) -> tuple[MicroBatch, list[str]]:
    """Read and prepare the crops of (epoch, row) pairs: (micro-batch, ["file: reason"] of bad clips)."""
    clips, bad = [], []
    for epoch, row in rows:
        keyed = keyed_generators(seed, task.name, epoch)
        try:
            clip: Clip = reader.crop(row, task.crop_samples, keyed(row["id"], "crop"))
            clips.append((epoch, task.augment(clip, keyed)))
        except BadClipError as error:
            bad.append(str(error))
            clips.append((epoch, reader.absent(row)))
    parts = []
    for epoch, group in itertools.groupby(clips, key=lambda pair: pair[0]):
        keyed = keyed_generators(seed, task.name, epoch)
        parts += _batches([clip for _, clip in group], task, keyed, bad)
    return MicroBatch(batch=joined(parts), ids=[row["id"] for _, row in rows]), bad


def _batches(clips: list[Clip], task: Task, keyed: Keyed, bad: list[str]) -> list[TaskBatch]:
    """Return the batch of some clips; or, where the noise of one cannot be read, batches of one, noting it in `bad`."""
    try:
        return [task.prepare(clips, keyed)]
    except BadClipError as error:
        if len(clips) > 1:
            return [batch for clip in clips for batch in _batches([clip], task, keyed, bad)]
        bad.append(str(error))
        absent = dataclasses.replace(clips[0], wave=clips[0].wave[:0], label=-1)
        return [task.prepare([absent], keyed)]


def joined(batches: list[TaskBatch]) -> TaskBatch:
    """Put the clips of batches together, zero-padded to the longest."""
    if len(batches) == 1:
        return batches[0]
    samples = max(batch.inputs.shape[-1] for batch in batches)
    equal = (batch.with_samples(samples) for batch in batches)
    return TaskBatch(*map(torch.cat, zip(*equal, strict=True)))


def micro_batches(task: Task, parts: list[MicroBatch], size: int) -> list[MicroBatch]:
    """Cut the clips of a round's parts into micro-batches of `size` clips, in their order.

    Whole clips are sorted first, the longest to the front, and a micro-batch ends with its longest: so little is padded, and
    the gradient is that of any other order.
    """
    ids = [clip for part in parts for clip in part.ids]
    whole = joined([part.batch for part in parts])
    if not task.whole:
        groups = [slice(first, first + size) for first in range(0, len(ids), size)]
        return [
            MicroBatch(batch=TaskBatch(*(t[own] for t in whole)), ids=ids[own]) for own in groups
        ]
    order = whole.valid.argsort(descending=True, stable=True)
    return [
        MicroBatch(
            batch=task.trimmed(TaskBatch(*(t[own] for t in whole))),
            ids=[ids[place] for place in own.tolist()],
        )
        for own in order.split(size)
    ]
