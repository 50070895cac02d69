"""Pure functions from waves to waves. Shapes are (T,), float32. Tested by tests/test_audio.py."""

import math

import numpy as np
import soxr

from mtl_dist.audio.reading import fix_length


def peak_normalise(wave: np.ndarray, floor: float = 1e-3) -> np.ndarray:
    """Scale to [-1, 1] by the largest magnitude (paper section 4.2: "scaled the inputs to lie in [-1, 1]").

    A peak below `floor` (-60 dBFS) is treated as `floor`: silence stays silence instead of a division by zero.
    """
    return wave / np.float32(max(peak(wave), floor))


def peak(wave: np.ndarray) -> float:
    """Return the largest magnitude of (T,); 0 of an empty wave."""
    return max(float(wave.max()), -float(wave.min())) if len(wave) else 0.0


def power(wave: np.ndarray) -> float:
    """Return the mean square of (T,), added up pairwise: to about 1e-6 of it, for any number of threads."""
    return float(np.square(wave).sum()) / len(wave)


def mix_at_snr(
    clean: np.ndarray, noise: np.ndarray, snr_db: float
) -> tuple[np.ndarray, np.ndarray]:
    """Add `noise` so that 10 log10(power(clean) / power(noise)) is `snr_db`; return (noisy, clean).

    Both are divided by the same number where the sum would leave [-1, 1], which keeps the SNR. A silent `clean` or
    `noise` is left without noise: no gain gives it that SNR.
    """
    clean_power, noise_power = power(clean), power(noise)
    if clean_power == 0.0 or noise_power == 0.0:
        return clean, clean
    noisy = noise * np.float32(math.sqrt(clean_power / (noise_power * 10.0 ** (snr_db / 10.0))))
    noisy += clean
    scale = np.float32(1.0 / max(1.0, peak(noisy)))
    return noisy * scale, clean * scale


def hold_samples(wave: np.ndarray, rate: int, low_rate: int) -> np.ndarray:
    """Resample to `low_rate` and repeat every sample until the old rate is reached (paper section 3.2.3).

    The resampler is that of librosa.resample's default (soxr, high quality), called directly: importing librosa for it
    costs seconds in every worker. Length stays (T,). `rate` must be a multiple of `low_rate`.
    """
    low = soxr.resample(wave, rate, low_rate, quality="HQ")
    return fix_length(np.repeat(low, rate // low_rate), len(wave))


def tile_to(wave: np.ndarray, samples: int) -> np.ndarray:
    """Repeat (T,) until it is exactly (samples,) long."""
    return np.resize(wave, samples)
