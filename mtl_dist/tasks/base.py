"""The contract of a task, and the registry. The loop, the model, the optimizer and TensorBoard know tasks only so.

Shapes: B clips, T samples. A new task is a subclass of Task in a file of its own with @register_task("its_name"); the
README shows one. Tested by tests/test_tasks.py.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import get_worker_info

from mtl_dist.audio.augment import Augmentation, AugmentConfig
from mtl_dist.audio.clips import Clip, ClipReader, Row

Keyed = Callable[..., np.random.Generator]
"""keyed(clip id, purpose) -> a fresh generator that depends on nothing but the run's seed, the task, the epoch and these."""

SumCount = tuple[Tensor, Tensor]


class TaskBatch(NamedTuple):
    """What a task's head is trained on: inputs (B, T) float32; targets (B, T) float32 or (B,) int64; valid (B,) int64.

    `valid` is the number of real samples of each clip, the rest is zero padding; 0 marks an absent clip.
    """

    inputs: Tensor
    targets: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> "TaskBatch":
        """Return the batch on a device."""
        return TaskBatch(*(tensor.to(device, non_blocking=True) for tensor in self))

    def with_samples(self, samples: int) -> "TaskBatch":
        """Return the batch with T = `samples`: what has a time axis, its last one, is cut or zero-padded at the end."""
        now = self.inputs.shape[-1]
        if now == samples:
            return self
        inputs, targets = (
            nn.functional.pad(t, (0, samples - now)) if t.ndim > 1 and t.shape[-1] == now else t
            for t in (self.inputs, self.targets)
        )
        return TaskBatch(inputs, targets, self.valid)


@dataclasses.dataclass(kw_only=True)
class TaskConfig:
    """What every task can be told; tasks add fields of their own."""

    sources: list[str] = dataclasses.field(default_factory=list)
    """Names of the corpora (section `corpora`) whose clips the task hears; it is evaluated on the first."""
    weight: float = 1.0
    """Weight alpha of the task's loss in the total loss (paper section 4.2), 0 or more."""
    learning_rate: float = 5e-3
    """Adam's learning rate for the task's head."""
    decay_factor: float = 0.95
    """The head's learning rate is multiplied by this ... (paper section 4.2)"""
    decay_epochs: int = 5
    """... every so many epochs; an epoch is one pass over the main task's training clips."""
    crop_seconds: float | Literal["data"] | None = "data"
    """Length of this task's crops; data: that of `data.crop_seconds`; null: whole clips, of any length."""
    longest_seconds: float = 30.0
    """Where clips are whole: a longer one is cropped to this, so that memory is bounded."""
    augment: AugmentConfig = dataclasses.field(default_factory=AugmentConfig)
    """What is done to the training crops before the task makes its inputs and targets of them."""

    def __post_init__(self):
        for name, low in (("weight", 0.0), ("learning_rate", 0.0), ("decay_factor", 0.0)):
            if not getattr(self, name) >= low:
                raise ValueError(f"{name}: {getattr(self, name)} is not allowed; use {low} or more")
        if self.decay_epochs < 1:
            raise ValueError(f"decay_epochs: {self.decay_epochs} is not allowed; use 1 or more")
        if isinstance(self.crop_seconds, (int, float)) and not 0 < self.crop_seconds < math.inf:
            raise ValueError(
                f"crop_seconds: {self.crop_seconds} is not allowed; use more than 0, data, or null for whole clips"
            )
        if not 0 < self.longest_seconds < math.inf:
            raise ValueError(
                f"longest_seconds: {self.longest_seconds} is not allowed; use more than 0"
            )

    def corpora(self) -> list[tuple[str, str]]:
        """Return (field, corpus) of all that the task hears: its sources, its own `noise`, and that of `augment`."""
        heard = [("sources", corpus) for corpus in self.sources]
        heard += [("noise", self.noise)] if hasattr(self, "noise") else []
        heard += [("augment.noise", self.augment.noise)] if self.augment.noise is not None else []
        return heard

    def backgrounds(self, split: str) -> list[str]:
        """Return the corpora of which a recording lies beside every clip: Clip.backgrounds; only training is augmented."""
        fields = ("noise", "augment.noise") if split == "train" else ("noise",)
        return list(dict.fromkeys(corpus for field, corpus in self.corpora() if field in fields))


def check_hidden(units: list[int]) -> None:
    """Raise ValueError unless every hidden layer of a head has a unit."""
    if any(count < 1 for count in units):
        raise ValueError(f"hidden: {units} is not allowed; use 1 or more for each layer")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TaskContext:
    """What a task may need to know of the rest. `receptive_field` is the trunk's, in samples; `rate` in Hz; `classes` are
    those of each corpus, by name, none where it is not labelled."""

    classes: Mapping[str, list[str]]
    rate: int
    crop_samples: int
    receptive_field: int


class Task:
    """A task. Subclasses set Config and implement prepare, build_head, count, loss and metrics."""

    Config: ClassVar[type[TaskConfig]] = TaskConfig
    name: ClassVar[str]
    best_metric: ClassVar[tuple[str, bool]] = ("loss", False)
    """What chooses the best checkpoint where this is the main task: (validation metric, whether higher is better)."""

    by_crops: ClassVar[bool] = True
    """Whether a clip is scored by evaluation.crops crops, one at a time, or by what `evaluation_clips` returns together."""

    def __init__(self, config: TaskConfig, context: TaskContext):
        self.config, self.context = config, context
        self.whole = config.crop_seconds is None
        seconds = config.longest_seconds if self.whole else config.crop_seconds
        self.crop_samples = (  # of whole clips the most
            context.crop_samples if seconds == "data" else round(seconds * context.rate)
        )
        if self.crop_samples < 1:
            field = "longest_seconds" if self.whole else "crop_seconds"
            raise ValueError(
                f"tasks.{self.name}.{field}: {seconds} is less than a sample of {context.rate} Hz"
            )
        self.augment = Augmentation(config.augment, context.rate)

    def describe(self) -> str:
        """Return the task's name and, where it is not crops of one length, what it is trained on."""
        whole = f" (whole clips of up to {self.config.longest_seconds:g} s)"
        return self.name + whole * self.whole

    @property
    def tail_samples(self) -> int:
        """How far after its end a clip's loss still looks: so many zeros follow every whole clip.

        Without them its loss would depend on the padding, and so on the clips beside it.
        """
        return 0

    def stacked(self, waves: list[np.ndarray]) -> Tensor:
        """Stack waves into float32 (B, T), zero-padded at the end. T is crop_samples; of whole clips the longest's, and
        tail_samples."""
        if not self.whole:
            return pad_waves(waves, self.crop_samples)
        return pad_waves(waves, self._samples(max(map(len, waves), default=0)))

    def trimmed(self, batch: TaskBatch) -> TaskBatch:
        """Return a batch of whole clips without the padding that none of them needs; any other as it is."""
        samples = self._samples(int(batch.valid.max())) if self.whole else batch.inputs.shape[-1]
        return batch.with_samples(min(samples, batch.inputs.shape[-1]))

    def _samples(self, longest: int) -> int:
        return max(1, longest) + self.tail_samples

    def evaluation_clips(self, row: Row, reader: ClipReader, keyed: Keyed) -> list[Clip]:
        """Return the clips of one row that are evaluated together: by default one crop, always the same.

        It is data.crop_seconds long where the task trains on whole clips, so that results can be compared, and even where
        it trains on shorter crops: a fraction of a second says little.
        """
        samples = self.context.crop_samples
        samples = samples if self.whole else max(self.crop_samples, samples)
        return [reader.crop(row, samples, keyed(row.id, "crop"))]

    def prepare(self, clips: list[Clip], generator: Keyed) -> TaskBatch:
        """Turn B clips into a batch; every draw comes from generator(clip.id, purpose)."""
        raise NotImplementedError

    def build_head(self, channels: int) -> nn.Module:
        """Return a new head: forward(hidden (B, C, T), valid (B,)) -> outputs."""
        raise NotImplementedError

    def count(self, batch: TaskBatch) -> Tensor:
        """Return the number of terms in the batch's loss, from the batch alone: float64 scalar."""
        raise NotImplementedError

    def loss(self, outputs: Tensor, batch: TaskBatch) -> SumCount:
        """Return (sum of the loss over all terms, number of terms)."""
        raise NotImplementedError

    def metrics(self, outputs: Tensor, batch: TaskBatch) -> dict[str, SumCount]:
        """Return {metric: (sum, count)} for the clips of one row; tensors of any shape, added up over rows."""
        total, count = self.loss(outputs, batch)
        return {"loss": (total, count)}

    def predict(self, outputs: Tensor, batch: TaskBatch) -> dict[str, object]:
        """Return what predictions/SPLIT.parquet keeps of a row: {"label", "probabilities", "probabilities_single_crop"}, of
        a task with classes."""
        return {}

    def showcase(self, outputs: Tensor, batch: TaskBatch) -> dict[str, Tensor]:
        """Return {what it is: wave (T,)} to listen to and look at, of a batch of one clip."""
        return {}

    def class_names(self) -> list[str]:
        """Return the classes of a labelled task, in the order of its logits."""
        return []


class LocalTask(Task):
    """A task whose loss is a sum of terms, each of which belongs to one output position in time.

    With a head that has `reach` it is computed in slices of time where memory.slice_seconds asks for it (models/slices.py);
    tasks on a head with `sums` and `classify` are too, whatever their loss; others are computed whole.
    """

    def terms(self, outputs: Tensor, batch: TaskBatch, first: int) -> Tensor:
        """Return all terms of outputs (B, L) at positions first .. first + L - 1 of the batch's T; 0 where there is none."""
        raise NotImplementedError

    def positions(self, batch: TaskBatch) -> tuple[int, Tensor]:
        """Return the first position with a term, and for each clip that after the last: int64 (B,). Others are left out."""
        return 0, torch.full_like(batch.valid, batch.inputs.shape[1])

    def loss(self, outputs: Tensor, batch: TaskBatch) -> SumCount:
        """Return (sum of all terms, their number)."""
        return self.terms(outputs, batch, 0).sum(), self.count(batch)


TASKS: dict[str, type[Task]] = {}


def register_task(name: str) -> Callable[[type[Task]], type[Task]]:
    """Class decorator: make a task known under `name` to configuration, loop, model, optimizer and TensorBoard."""

    def register(task: type[Task]) -> type[Task]:
        if name in TASKS and TASKS[name].__qualname__ != task.__qualname__:
            raise ValueError(f"task {name!r} is registered twice: {TASKS[name]} and {task}")
        if not name.isidentifier():
            raise ValueError(f"task name {name!r}: use letters, digits and underscores")
        task.name = name
        TASKS[name] = task
        return task

    return register


def pad_waves(waves: list[np.ndarray], samples: int) -> Tensor:
    """Stack waves into float32 (B, T), zero-padded at the end; T is `samples`, or the longest wave if that is longer."""
    batch = _zeros(len(waves), max([samples, *map(len, waves)]))
    for row, wave in zip(batch, waves, strict=True):
        row[: len(wave)] = torch.from_numpy(np.ascontiguousarray(wave, dtype=np.float32))
    return batch


def _zeros(clips: int, samples: int) -> Tensor:
    """Return float32 (B, T) of zeros; in a loader's worker in memory that is shared, or else it would be copied there."""
    if get_worker_info() is None:
        return torch.from_numpy(np.zeros((clips, samples), np.float32))
    size = clips * samples
    storage = torch.UntypedStorage._new_shared(size * torch.float32.itemsize)  # as default_collate
    return torch.empty(0).set_(storage, 0, (clips, samples))


def valid_lengths(clips: list[Clip]) -> Tensor:
    """Return the number of samples of each clip: int64 (B,)."""
    return torch.tensor([len(clip.wave) for clip in clips], dtype=torch.int64)
