"""Metrics as sums and counts, added over clips and ranks and divided once. Tested by tests/test_metrics.py.

Shapes: B clips, K classes, T samples. A metric of one clip is (value, 1), or (0, 0) where it is not defined.
"""

import torch
from torch import Tensor

STFT_SIZE, STFT_HOP = 2048, 512
"""Window and hop of the log-spectral distance in samples, as in Kuleshov et al. 2017 (audio super-resolution)."""

DYNAMIC_RANGE_DB = 60.0
"""Log-spectral distance: powers further than this below the target's loudest point count as that. Without a floor the
silence between words and above the voice decides: on LibriSpeech even the perfect band-limited signal then scores worse
than samples held at 4 kHz (28 against 15 dB), whose images merely happen to be as loud as the recording's noise."""


def average_precision_at_3(scores: Tensor, labels: Tensor) -> Tensor:
    """1 / rank of the label if it is among the three highest scores, else 0: (B, K), (B,) -> (B,).

    With one label a clip the mean of it is MAP@3 (Kaggle's definition for FSDKaggle2018). Of equal scores the one with
    the lower index ranks first, as torch.argsort(stable) and scikit-learn's label order have it.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)[:, :3]
    hits = (order == labels[:, None]).float()
    return (hits / torch.arange(1, order.shape[1] + 1, device=scores.device)).sum(dim=1)


def decibels(numerator: Tensor, denominator: Tensor) -> Tensor:
    """10 log10(numerator / denominator), kept finite."""
    tiny = torch.finfo(torch.float32).tiny
    return 10.0 * torch.log10(numerator.clamp(min=tiny) / denominator.clamp(min=tiny))


def si_sdr(estimate: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Scale-invariant signal-to-distortion ratio in dB of (T,) waves as (value, 1); (0, 0) for a silent target.

    Le Roux et al. 2019, "SDR - half-baked or well done?", without removing the mean. Own code because torchmetrics, which
    the tests compare it with, takes 5 s to import, on every rank and at every restart.
    """
    if target.numel() == 0 or not target.square().sum() > 0:
        return target.new_zeros(()), target.new_zeros(())
    eps = torch.finfo(target.dtype).eps  # an exact copy scores high, not infinity
    scaled = (estimate @ target + eps) / (target @ target + eps) * target
    error = scaled - estimate
    return decibels(scaled @ scaled + eps, error @ error + eps), target.new_ones(())


def power_spectrum(wave: Tensor) -> Tensor:
    """Short-time power spectrum, Hann window: (T,) -> (frequencies, frames)."""
    window = torch.hann_window(STFT_SIZE, device=wave.device)
    wave = torch.nn.functional.pad(wave, (0, max(0, STFT_SIZE - wave.numel())))
    options = {"window": window, "center": False, "return_complex": True}
    return torch.stft(wave, STFT_SIZE, STFT_HOP, **options).abs().square()


def log_spectral_distance(estimate: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Log-spectral distance in dB of (T,) waves as (value, 1): root mean square over frequency, mean over frames.

    Gray and Markel 1976, with both spectra floored DYNAMIC_RANGE_DB below the target's loudest point. (0, 0) for a
    silent or empty target.
    """
    truth = power_spectrum(target)
    floor = truth.max() * 10.0 ** (-DYNAMIC_RANGE_DB / 10.0)
    if not floor > 0:  # also a sound so short that it lies on the window's zero edge
        return target.new_zeros(()), target.new_zeros(())
    ratio = power_spectrum(estimate).clamp(min=floor) / truth.clamp(min=floor)
    return (10.0 * ratio.log10()).square().mean(dim=0).sqrt().mean(), target.new_ones(())


class Sums:
    """Adds {name: (sum, count)} in float64, tensors of any shape, over clips and over the Sums of other ranks."""

    def __init__(self):
        self.sums: dict[str, tuple[Tensor, Tensor]] = {}

    def add(self, metrics: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Add one clip's metrics, or the `sums` of another rank."""
        for name, (total, count) in metrics.items():
            pair = (total.detach().double().cpu(), count.detach().double().cpu())
            old = self.sums.get(name)
            self.sums[name] = pair if old is None else (old[0] + pair[0], old[1] + pair[1])

    def means(self) -> dict[str, Tensor]:
        """Return {name: sum / count} of everything that was counted at least once; elements without a count are 0."""
        return {n: s / c.clamp(min=1e-12) for n, (s, c) in self.sums.items() if c.sum() > 0}
