"""Upsampling: from a wave held at 4 kHz predict the 16 kHz original, smooth L1 (paper section 3.2.3)."""

import dataclasses

from torch import Tensor

from mtl_dist.audio.transforms import hold_samples
from mtl_dist.metrics import log_spectral_distance
from mtl_dist.tasks.base import (
    Keyed,
    SumCount,
    TaskBatch,
    TaskContext,
    register_task,
    valid_lengths,
)
from mtl_dist.tasks.regression import RegressionConfig, RegressionTask


@register_task("upsampling")
class Upsampling(RegressionTask):
    """Infer the high frequencies that were lost at a low sample rate."""

    @dataclasses.dataclass(kw_only=True)
    class Config(RegressionConfig):
        """Upsampling (paper section 3.2.3)."""

        low_rate: int = 4_000
        """Sample rate of the input in Hz, a divisor of data.sample_rate; every sample is repeated to fill the gap."""

    def __init__(self, config: RegressionConfig, context: TaskContext):
        super().__init__(config, context)
        if config.low_rate < 1 or context.rate % config.low_rate:
            raise ValueError(
                f"tasks.{self.name}.low_rate: {config.low_rate} Hz does not divide data.sample_rate "
                f"{context.rate} Hz; samples are repeated a whole number of times"
            )

    def prepare(self, clips: list, generator: Keyed) -> TaskBatch:
        """Inputs are the clips at the low rate, each sample repeated; targets the clips themselves."""
        held = [
            hold_samples(c.wave, self.context.rate, self.config.low_rate) if len(c.wave) else c.wave
            for c in clips
        ]
        targets = self.stacked([clip.wave for clip in clips])
        return TaskBatch(self.stacked(held), targets, valid_lengths(clips))

    def metrics(self, outputs: Tensor, batch: TaskBatch) -> dict[str, SumCount]:
        """Add the log-spectral distance in dB to the original, of the input and of the output, per clip."""
        estimate, target, held = self.compared(outputs, batch)
        result = super().metrics(outputs, batch)
        result["lsd_input"] = log_spectral_distance(held, target)
        result["lsd_output"] = log_spectral_distance(estimate, target)
        return result

    def showcase(self, outputs: Tensor, batch: TaskBatch) -> dict[str, Tensor]:
        """Return the held input, the upsampled and the original wave."""
        estimate, target, held = self.compared(outputs, batch)
        low = f"1 {self.config.low_rate / 1000:g} kHz"
        return {low: held, "2 upsampled": estimate, "3 original": target}
