"""Audio tagging: one label per clip, cross entropy on the mean over time (paper section 3.2.4).

A second labelled task is a subclass with a name of its own and its corpus in `sources`. Evaluated on all windows of a clip
(class probabilities averaged), or on the whole clip at once where it trains on those, and on a single random crop, which is
nearest to the paper. K is the number of classes.
"""

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, nn

from mtl_dist.audio.clips import Clip, ClipReader, Row
from mtl_dist.metrics import average_precision_at_3
from mtl_dist.models.heads import PooledClassifier, wide
from mtl_dist.tasks.base import (
    Keyed,
    SumCount,
    Task,
    TaskBatch,
    TaskConfig,
    TaskContext,
    check_hidden,
    register_task,
    valid_lengths,
)


@register_task("audio_tagging")
class AudioTagging(Task):
    """Classify a clip into one of the classes of its corpus."""

    best_metric: ClassVar = ("map@3", True)
    by_crops: ClassVar = False

    @dataclasses.dataclass(kw_only=True)
    class Config(TaskConfig):
        """Audio tagging (paper section 3.2.4)."""

        hidden: list[int] = dataclasses.field(default_factory=lambda: [512])
        """Units of each of the head's hidden layers (Table 3); [] for a linear classifier."""
        learning_rate: float = 5.37e-5
        """Adam's learning rate for the task's head (Table 3)."""

        def __post_init__(self):
            super().__post_init__()
            check_hidden(self.hidden)

    def __init__(self, config: TaskConfig, context: TaskContext):
        super().__init__(config, context)
        self.classes = context.classes[config.sources[0]]
        for corpus in config.sources:
            if context.classes[corpus] != self.classes or not self.classes:
                raise ValueError(
                    f"tasks.{self.name}.sources: corpus {corpus!r} has the classes {context.classes[corpus]}; "
                    f"a labelled task needs corpora with labels, all with the same classes"
                )

    def evaluation_clips(self, row: Row, reader: ClipReader, keyed: Keyed) -> list[Clip]:
        """Return all windows of the row's audio, of whole clips the clip, then one random crop."""
        samples = self.context.crop_samples if self.whole else self.crop_samples
        return [
            *reader.windows(row, self.crop_samples),
            reader.crop(row, samples, keyed(row.id, "crop")),
        ]

    def prepare(self, clips: list[Clip], generator: Keyed) -> TaskBatch:
        """Inputs are the clips, targets their class indices (0 for an absent clip, which counts for nothing)."""
        labels = torch.tensor([max(0, clip.label) for clip in clips], dtype=torch.int64)
        waves = self.stacked([clip.wave for clip in clips])
        return TaskBatch(waves, labels, valid_lengths(clips))

    def build_head(self, channels: int) -> nn.Module:
        """Return mean over time, hidden ReLU layers, K logits."""
        return PooledClassifier(channels, self.config.hidden, len(self.classes))

    def count(self, batch: TaskBatch) -> Tensor:
        """Number of clips that are there."""
        return (batch.valid > 0).sum().double()

    def loss(self, outputs: Tensor, batch: TaskBatch) -> SumCount:
        """Sum of the cross entropies of the clips that are there, and their number."""
        terms = nn.functional.cross_entropy(wide(outputs), batch.targets, reduction="none")
        return terms.masked_fill(batch.valid == 0, 0.0).sum(), self.count(batch)

    def predict(self, outputs: Tensor, batch: TaskBatch) -> dict[str, object]:
        """Return the label and the class probabilities (K,) of one row: the mean over its windows, all outputs but the last,
        and those of its single crop, which is the last."""
        probabilities = outputs.float().softmax(dim=1)
        return {
            "label": self.classes[int(batch.targets[0])],
            "probabilities": probabilities[:-1].mean(dim=0).tolist(),
            "probabilities_single_crop": probabilities[-1].tolist(),
        }

    def metrics(self, outputs: Tensor, batch: TaskBatch) -> dict[str, SumCount]:
        """Score one row by what `predict` says of it."""
        row = self.predict(outputs, batch)
        label = torch.tensor([self.classes.index(row["label"])])
        by_windows = torch.tensor([row["probabilities"]])
        single = torch.tensor([row["probabilities_single_crop"]])
        one = torch.ones(())
        precision = average_precision_at_3(by_windows, label).sum()
        truth = nn.functional.one_hot(label[0], len(self.classes)).float()
        guess = nn.functional.one_hot(by_windows.argmax(), len(self.classes)).float()
        return {
            "loss": (-by_windows[0, label[0]].clamp(min=1e-12).log(), one),
            "map@3": (precision, one),
            "accuracy": ((by_windows.argmax() == label[0]).float(), one),
            "map@3_single_crop": (average_precision_at_3(single, label).sum(), one),
            "accuracy_single_crop": ((single.argmax() == label[0]).float(), one),
            "map@3_per_class": (precision * truth, truth),
            "confusion": (torch.outer(truth, guess), one),
        }

    def class_names(self) -> list[str]:
        """Return the classes in the order of the logits."""
        return list(self.classes)
