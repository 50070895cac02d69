"""Noise reduction: from a noisy wave predict the clean one, smooth L1 (paper sections 3.2.2 and 4.2)."""

import dataclasses
import math

import numpy as np
from torch import Tensor

from mtl_dist.audio.clips import Clip
from mtl_dist.audio.transforms import mix_at_snr
from mtl_dist.metrics import si_sdr
from mtl_dist.tasks.base import (
    Keyed,
    SumCount,
    TaskBatch,
    register_task,
    valid_lengths,
)
from mtl_dist.tasks.regression import RegressionConfig, RegressionTask


@register_task("noise_reduction")
class NoiseReduction(RegressionTask):
    """Remove background noise that was added at a known signal-to-noise ratio."""

    @dataclasses.dataclass(kw_only=True)
    class Config(RegressionConfig):
        """Noise reduction (paper section 3.2.2)."""

        noise: str = "chime3"
        """Name of the corpus (section `corpora`) of background recordings."""
        snr_db: tuple[float, float] = (10.0, 15.0)
        """Lowest and highest signal-to-noise ratio in dB; drawn evenly in between (paper section 4.2)."""

        def __post_init__(self):
            super().__post_init__()
            if not -math.inf < self.snr_db[0] <= self.snr_db[1] < math.inf:
                raise ValueError(
                    f"snr_db: {list(self.snr_db)} is not allowed; the lower one comes first"
                )

    def noisy(self, clip: Clip, generator: Keyed) -> tuple[np.ndarray, np.ndarray]:
        """Return (noisy, clean): a random stretch of the background beside the clip, at a random SNR."""
        if not len(clip.wave):
            return clip.wave, clip.wave
        draw = generator(clip.id, "noise")
        noise = clip.backgrounds[self.config.noise].cut(len(clip.wave), draw)
        return mix_at_snr(clip.wave, noise, draw.uniform(*self.config.snr_db))

    def prepare(self, clips: list[Clip], generator: Keyed) -> TaskBatch:
        """Inputs are noisy, targets clean."""
        pairs = [self.noisy(clip, generator) for clip in clips]
        inputs, targets = (self.stacked(list(waves)) for waves in zip(*pairs, strict=True))
        return TaskBatch(inputs, targets, valid_lengths(clips))

    def metrics(self, outputs: Tensor, batch: TaskBatch) -> dict[str, SumCount]:
        """Add SI-SDR in dB of the noisy input and of the output, and the improvement, per clip with noise."""
        estimate, target, noisy = self.compared(outputs, batch)
        before, heard = si_sdr(noisy, target)
        heard = (
            heard * (noisy != target).any()
        )  # a silent stretch of background adds nothing to remove
        before, after = before * heard, si_sdr(estimate, target)[0] * heard
        result = super().metrics(outputs, batch)
        result["si_sdr_noisy"] = (before, heard)
        result["si_sdr_denoised"] = (after, heard)
        result["si_sdr_improvement"] = (after - before, heard)
        return result

    def showcase(self, outputs: Tensor, batch: TaskBatch) -> dict[str, Tensor]:
        """Return the noisy, the denoised and the clean wave."""
        estimate, target, noisy = self.compared(outputs, batch)
        return {"1 noisy": noisy, "2 denoised": estimate, "3 clean": target}
