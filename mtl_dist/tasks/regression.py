"""What the self-supervised tasks share: predict a sample for every time step, local in time.

The output at t + delay is compared with the clean sample x[t]. delay = -1 is next-step prediction; delay = (tau - 1)/2
puts the target in the middle of the trunk's window (paper section 3.2.2). Shapes: B clips, T samples.
"""

import dataclasses

import torch
from torch import Tensor, nn

from mtl_dist.models.heads import ConvHead, wide
from mtl_dist.tasks.base import LocalTask, TaskBatch, TaskConfig, TaskContext, check_hidden


@dataclasses.dataclass(kw_only=True)
class RegressionConfig(TaskConfig):
    """A self-supervised task's settings."""

    hidden: list[int] = dataclasses.field(default_factory=lambda: [128])
    """Units of each of the head's hidden layers (Table 3); [] for none."""
    filter_width: int = 11
    """Width of the head's convolutions in samples, odd (Table 3)."""

    def __post_init__(self):
        super().__post_init__()
        check_hidden(self.hidden)
        if self.filter_width < 1 or self.filter_width % 2 == 0:
            raise ValueError(f"filter_width: {self.filter_width} is not allowed; use an odd number")


class RegressionTask(LocalTask):
    """A task whose head predicts the wave `targets` (B, T), `delay` samples late."""

    Config = RegressionConfig

    def __init__(self, config: RegressionConfig, context: TaskContext):
        super().__init__(config, context)
        if self.crop_samples <= abs(self.delay):
            field = "longest_seconds" if self.whole else "crop_seconds"
            raise ValueError(
                f"tasks.{self.name}.{field}: {self.crop_samples} samples are no more than the task's delay of "
                f"{self.delay}, so that no sample would be compared; use longer crops or a smaller trunk"
            )

    @property
    def delay(self) -> int:
        """How many samples later than the target the output stands: the middle of the trunk's window."""
        return (self.context.receptive_field - 1) // 2

    @property
    def tail_samples(self) -> int:
        """The delay, and what the head's convolutions look ahead of it."""
        layers = len(self.config.hidden) + 1
        return max(0, self.delay + layers * (self.config.filter_width // 2))

    def build_head(self, channels: int) -> nn.Module:
        """Return the convolutional head."""
        return ConvHead(channels, self.config.hidden, self.config.filter_width)

    def elementwise(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Smooth L1 (paper equation 1), its bend at 1; one term per frame."""
        return nn.functional.smooth_l1_loss(estimate, target, reduction="none")

    def align(self, outputs: Tensor, targets: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        """Return (estimate, target), equally long, so that equal columns belong together: that at t + delay and that at t.

        Outputs (B, L) are those at first .. first + L - 1; what has no target is left out.
        """
        start = first - self.delay
        missing = max(0, -start)
        target = targets[..., start + missing : max(0, start + outputs.shape[-1])]
        return outputs[..., missing : missing + target.shape[-1]], target

    def frames(self, batch: TaskBatch) -> Tensor:
        """Number of compared frames of each clip: int64 (B,)."""
        samples = batch.inputs.shape[1]
        if self.delay >= 0:
            return batch.valid.clamp(max=max(0, samples - self.delay))
        return (batch.valid + self.delay).clamp(min=0)

    def count(self, batch: TaskBatch) -> Tensor:
        """Number of compared frames in the batch."""
        return self.frames(batch).sum().double()

    def positions(self, batch: TaskBatch) -> tuple[int, Tensor]:
        """The output of the first target, and of each clip that after its last frame's."""
        first = max(0, self.delay)
        return first, first + self.frames(batch)

    def terms(self, outputs: Tensor, batch: TaskBatch, first: int) -> Tensor:
        """Loss of the outputs that have a target."""
        estimate, target = self.align(outputs, batch.targets, first)
        _, stops = self.positions(batch)
        begin = max(first, self.delay)
        time = begin + torch.arange(target.shape[-1], device=outputs.device)
        mask = time < stops[:, None]
        return self.elementwise(wide(estimate), target).masked_fill(~mask, 0.0)

    def compared(self, outputs: Tensor, batch: TaskBatch) -> tuple[Tensor, Tensor, Tensor]:
        """Return (estimate, target, input) of a batch of one clip, its compared frames only: (T',) each."""
        estimate, target = self.align(outputs, batch.targets)
        frames = int(self.frames(batch)[0])
        return estimate[0, :frames].float(), target[0, :frames], batch.inputs[0, :frames]
