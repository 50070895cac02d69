"""What all contenders share: where the files lie, and what is done to a crop once a contender has read it."""

import random
from pathlib import Path

import librosa
import numpy as np
import soundfile
import torch

RATE, LOW_RATE, SAMPLES, BATCH = 16_000, 4_000, 32_000, 48
SNR_DB = (10.0, 15.0)
SHUFFLE_BUFFER = 1_000
"""Rows that the streams without random access mix; the published recipes of speech use 1,000 to 10,000."""
SHARDS = 8

Crop = tuple[np.ndarray, np.ndarray, np.ndarray]
Batch = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def utterances(work: Path) -> list[Path]:
    """Return the FLAC files of the published folder."""
    return sorted((work / "LibriSpeech").rglob("*.flac"))


def shards_of(items: list) -> list[list]:
    """Deal items out to SHARDS shards in turns."""
    return [items[n::SHARDS] for n in range(SHARDS)]


class Backgrounds:
    """Random stretches of random background recordings, WAV files of which only the stretch is read."""

    def __init__(self, work: Path):
        self.files = [(path, soundfile.info(path).frames) for path in backgrounds(work)]

    def draw(self, samples: int) -> np.ndarray:
        """Return (samples,) float32."""
        path, frames = random.choice(self.files)
        start = random.randrange(frames - samples + 1)
        return soundfile.read(path, samples, start, dtype="float32")[0]


def backgrounds(work: Path) -> list[Path]:
    """Return the WAV files of background noise."""
    return sorted((work / "CHiME3").rglob("*.wav"))


def random_start(frames: int) -> int:
    """Return where a crop begins in a file of so many frames."""
    return random.randrange(max(1, frames - SAMPLES + 1))


def finish(wave: np.ndarray, noise: Backgrounds) -> Crop:
    """Normalise a crop (T,), mix a background into it, hold it at 4 kHz: (noisy, held, clean), each (SAMPLES,)."""
    clean = normalise(pad(wave))
    stretch = noise.draw(SAMPLES)
    snr = 10.0 ** (random.uniform(*SNR_DB) / 10.0)
    gain = np.sqrt(np.dot(clean, clean) / (max(np.dot(stretch, stretch), 1e-12) * snr))
    return *within_one(clean + np.float32(gain) * stretch, clean), hold(clean)


def normalise(wave: np.ndarray) -> np.ndarray:
    """Scale to [-1, 1] by the largest magnitude."""
    return wave / max(float(np.abs(wave).max()), 1e-3)


def within_one(noisy: np.ndarray, clean: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divide both by the same number where the sum left [-1, 1]."""
    scale = max(1.0, float(np.abs(noisy).max()))
    return noisy / scale, clean / scale


def pad(wave: np.ndarray) -> np.ndarray:
    """Zero-pad (T,) to SAMPLES, or cut what a decoder gave too much."""
    assert wave.ndim == 1, wave.shape
    wave = wave[:SAMPLES]
    return wave if len(wave) == SAMPLES else np.pad(wave, (0, SAMPLES - len(wave)))


def hold(wave: np.ndarray) -> np.ndarray:
    """Resample to 4 kHz with librosa and repeat every sample."""
    low = librosa.resample(wave, orig_sr=RATE, target_sr=LOW_RATE)
    return pad(np.repeat(low, RATE // LOW_RATE))


def collate(crops: list[Crop]) -> Batch:
    """Stack crops: (noisy, clean, held) become tensors (B, SAMPLES), in the order (noisy, held, clean)."""
    noisy, clean, held = (torch.from_numpy(np.stack(w)) for w in zip(*crops, strict=True))
    return noisy, held, clean


def check(batch: Batch) -> None:
    """Make sure that a batch holds the work that is measured: shapes, scale, SNRs and held samples."""
    noisy, held, clean = batch
    for wave in batch:
        assert wave.shape == (BATCH, SAMPLES), wave.shape
        assert wave.dtype == torch.float32, wave.dtype
    peaks = torch.maximum(noisy.abs().amax(1), clean.abs().amax(1))
    assert torch.all(peaks < 1 + 1e-5), peaks
    assert peaks.median() > 0.99, peaks  # of all clips but the nearly silent ones
    speech, noise = clean.double().square().sum(1), (noisy - clean).double().square().sum(1)
    snr = 10 * torch.log10(speech / noise)
    assert torch.all((snr > SNR_DB[0] - 0.3) & (snr < SNR_DB[1] + 0.3)), snr  # lhotse: 50 ms less
    groups = held.reshape(BATCH, -1, RATE // LOW_RATE)
    assert torch.equal(groups, groups[..., :1].expand_as(groups)), "not held"
    assert len({tuple(row[:4000:7].tolist()) for row in clean}) > BATCH // 2, "the same clip again"
