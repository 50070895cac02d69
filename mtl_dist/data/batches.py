"""Batches, and the rounds they make up: crops of rows, read, augmented and prepared; every draw by key, never by process.

Tested by tests/test_draws.py and tests/test_lanes.py.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch

from mtl_dist.audio.clips import Clip, ClipReader, Row
from mtl_dist.audio.reading import BadClipError
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Position
from mtl_dist.tasks.base import Keyed, Task, TaskBatch

Positions = dict[str, dict[int, Position]]
"""{stream: {lane: where its next clip is}}; noise beside a stream has the name STREAM/CORPUS."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """One task's clips of one micro-step: the batch and, for messages, the clips' ids."""

    batch: TaskBatch
    ids: list[str]


class Read(NamedTuple):
    """How many clips were read, and how many bytes they have as they are stored."""

    clips: int = 0
    stored_bytes: int = 0

    def __add__(self, other: "Read") -> "Read":
        """Add up both."""
        return Read(self.clips + other.clips, self.stored_bytes + other.stored_bytes)


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


def keyed_generators(seed: int, task: str, epoch: int | str) -> Keyed:
    """Return keyed(clip id, purpose) -> generator for the draws of a task in an epoch."""
    return partial(generator, seed, task, epoch)


def read_crops(
    row: Row, epoch: int, tasks: Sequence[Task], reader: ClipReader, seed: int, bad: list[str]
) -> dict[str, Clip]:
    """Open a row once and cut every task's crop, each by its own key: {task: clip}, an empty one where that fails.

    `bad` gets "file: reason" of each that could not be used.
    """
    clips: dict[str, Clip] = {}
    try:
        with reader.open(row) as opened:
            for task in tasks:
                keyed = keyed_generators(seed, task.name, epoch)
                try:
                    clips[task.name] = opened.crop(task.crop_samples, keyed(row.id, "crop"))
                except ValueError as error:  # BadFramesError: others may cut another stretch
                    bad.append(f"{row.audio.get('path')}: {error}")
                    clips[task.name] = reader.absent(row)
    except BadClipError as error:
        bad += [str(error)] * (len(tasks) - len(clips))
    return {task.name: clips.get(task.name) or reader.absent(row) for task in tasks}


def prepare(task: Task, clips: list[tuple[int, Clip]], seed: int, bad: list[str]) -> MicroBatch:
    """Augment and prepare a task's (epoch, clip) pairs, in order; `bad` gets what noise could not be read."""
    augmented = []
    for epoch, clip in clips:
        try:
            augmented.append((epoch, task.augment(clip, keyed_generators(seed, task.name, epoch))))
        except BadClipError as error:
            bad.append(str(error))
            augmented.append((epoch, _absent(clip)))
    parts = []
    for epoch, group in itertools.groupby(augmented, key=lambda pair: pair[0]):
        keyed = keyed_generators(seed, task.name, epoch)
        parts += _batches([clip for _, clip in group], task, keyed, bad)
    return MicroBatch(batch=joined(parts), ids=[clip.id for _, clip in clips])


def _batches(clips: list[Clip], task: Task, keyed: Keyed, bad: list[str]) -> list[TaskBatch]:
    """Return the batch of some clips; or, where the noise of one cannot be read, batches of one, noting it in `bad`."""
    try:
        return [task.prepare(clips, keyed)]
    except BadClipError as error:
        if len(clips) > 1:
            return [batch for clip in clips for batch in _batches([clip], task, keyed, bad)]
        bad.append(str(error))
        return [task.prepare([_absent(clips[0])], keyed)]


def _absent(clip: Clip) -> Clip:
    return dataclasses.replace(clip, wave=clip.wave[:0], label=-1)


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
