"""Waves to augment, for tests."""

import numpy as np

RATE = 16_000
RANGES = {
    "noise": {"noise_snr_db": (0.0, 20.0)},
    "pitch": {"pitch_semitones": (-4.0, 4.0)},
    "gain": {"gain_db": (-20.0, -3.0)},
    "shift": {"shift_seconds": (-0.02, 0.02)},
}
"""The four kinds, and a range of each that leaves nothing as it is."""


def noise_like(samples: int, seed: int = 0, level: float = 0.1) -> np.ndarray:
    return (level * np.random.default_rng(seed).standard_normal(samples)).astype(np.float32)


def sine(hertz: float, samples: int, level: float = 0.5) -> np.ndarray:
    return (level * np.sin(2 * np.pi * hertz * np.arange(samples) / RATE)).astype(np.float32)
