"""Next-step prediction: from x[t - tau + 1 .. t] predict x[t + 1], squared error (paper section 3.2.1)."""

import dataclasses

from torch import Tensor

from mtl_dist.metrics import decibels
from mtl_dist.tasks.base import (
    Keyed,
    SumCount,
    TaskBatch,
    register_task,
    valid_lengths,
)
from mtl_dist.tasks.regression import RegressionConfig, RegressionTask


@register_task("next_step")
class NextStep(RegressionTask):
    """Predict the next sample."""

    @dataclasses.dataclass(kw_only=True)
    class Config(RegressionConfig):
        """Next-step prediction (paper section 3.2.1)."""

        filter_width: int = 1
        """Width of the head's convolutions in samples; more than 1 would look at the answer."""

        def __post_init__(self):
            super().__post_init__()
            if self.filter_width != 1:
                raise ValueError(
                    f"filter_width: {self.filter_width} would show the head the sample it predicts; use 1"
                )

    delay = -1

    def prepare(self, clips: list, generator: Keyed) -> TaskBatch:
        """The clip is input and target; the loss compares output t with sample t + 1."""
        waves = self.stacked([clip.wave for clip in clips])
        return TaskBatch(waves, waves, valid_lengths(clips))

    def elementwise(self, estimate: Tensor, target: Tensor) -> Tensor:
        """Squared error of every frame."""
        return (estimate - target) ** 2

    def metrics(self, outputs: Tensor, batch: TaskBatch) -> dict[str, SumCount]:
        """Add the prediction gain in dB: power of the signal over power of the error, per clip."""
        estimate, target, _ = self.compared(outputs, batch)
        result = super().metrics(outputs, batch)
        power, error = target.square().sum(), (estimate - target).square().sum()
        heard = ((power > 0) & (error > 0)).float()
        result["prediction_gain"] = (decibels(power, error) * heard, heard)
        return result
