"""Small stand-ins for the three corpora, synthesised with numpy in the published layouts and read by the real readers.

They make the first run possible with nothing downloaded. Eight instruments differ in how they sound (spectrum, envelope,
noise), with random pitch, loudness, length and silence around them; "speech" is a pulse train through moving formants;
backgrounds are shaped, modulated noise. Figures measured on them say that the machinery works, and nothing else.
"""

import csv
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import soundfile

from mtl_dist.data.keys import generator

SYNTHETIC = "synthetic"
VERSION = "v1"
TRAIN_PER_CLASS, TEST_PER_CLASS = 24, 8
SPEAKERS, UTTERANCES = 24, 4
BACKGROUND_SECONDS = 15.0
FSD_RATE, SPEECH_RATE = 44_100, 16_000


def cache_folder() -> Path:
    """Return where made-up corpora are kept: $MTL_DIST_CACHE, or ~/.cache/mtl_dist."""
    return Path(os.environ.get("MTL_DIST_CACHE", "~/.cache/mtl_dist")).expanduser()


def resolve_root(root: str | None, name: str, folder: str) -> Path:
    """Return the corpus' folder; the root `synthetic` is made on the spot. Raises ValueError for an unset root."""
    if root is None:
        raise ValueError(
            f"corpora.{name}.root: not set, but a task hears this corpus; set it to the folder of the unpacked corpus, "
            f"or to {SYNTHETIC!r} for a small made-up stand-in"
        )
    return synthesise() / folder if root == SYNTHETIC else Path(root).expanduser()


def synthesise() -> Path:
    """Make the three corpora unless they are there, and return the folder that holds them.

    Written beside and renamed when whole, so that several processes may call it at once and a killed one leaves nothing.
    """
    target = cache_folder() / f"synthetic-{VERSION}"
    if target.is_dir():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="synthetic-", dir=target.parent))
    _write_fsdkaggle2018(partial / "FSDKaggle2018")
    _write_librispeech(partial / "LibriSpeech" / "train-clean-100")
    _write_backgrounds(partial / "CHiME3" / "data" / "audio" / "16kHz" / "backgrounds")
    try:
        partial.rename(target)
    except OSError:
        if not target.is_dir():
            raise
        shutil.rmtree(partial)
    return target


def _shape(noise: np.ndarray, rate: int, low: float, high: float) -> np.ndarray:
    """Keep the band from `low` to `high` Hz of a wave (T,), with soft edges."""
    spectrum = np.fft.rfft(noise)
    hertz = np.maximum(np.fft.rfftfreq(len(noise), 1 / rate), 1e-3)
    gain = 1 / np.sqrt((1 + (low / hertz) ** 6) * (1 + (hertz / high) ** 6))
    return np.fft.irfft(spectrum * gain, len(noise))


def _harmonics(
    time: np.ndarray, pitch: float, weights: Callable[[np.ndarray], np.ndarray], top: float
) -> np.ndarray:
    """Sum over n of weights(n) sin(n phase), at multiples of `pitch` Hz below `top` Hz.

    As a polynomial of e^(i phase), which takes a multiplication for every n instead of a sine.
    """
    turning = np.exp(1j * (2 * np.pi * pitch * time + 1))
    total = np.zeros_like(turning)
    for weight in weights(np.arange(1, max(2, int(top / pitch))))[::-1]:
        total += weight
        total *= turning
    return total.imag


def _decay(time: np.ndarray, seconds: float) -> np.ndarray:
    return np.exp(-time / seconds)


def _flute(t, r):
    breath = _shape(r.normal(size=len(t)), FSD_RATE, 500, 3000)
    return np.sin(2 * np.pi * r.uniform(500, 900) * t) + 0.05 * breath


def _clarinet(t, r):
    return _harmonics(t, r.uniform(150, 300), lambda n: (n % 2) / n, 5000)


def _violin(t, r):
    pitch = r.uniform(250, 500) * t + 0.3 * np.sin(2 * np.pi * r.uniform(4, 7) * t)
    return 2 * (pitch % 1) - 1


def _bass_drum(t, r):
    sweep = r.uniform(50, 70) * t + r.uniform(1, 3) * (1 - _decay(t, 0.03))
    return np.sin(2 * np.pi * sweep) * _decay(t, r.uniform(0.1, 0.3))


def _snare_drum(t, r):
    hit = _shape(r.normal(size=len(t)), FSD_RATE, 800, 6000)
    return (hit + np.sin(2 * np.pi * r.uniform(160, 240) * t)) * _decay(t, r.uniform(0.08, 0.2))


def _hi_hat(t, r):
    return _shape(r.normal(size=len(t)), FSD_RATE, 6000, 16_000) * _decay(t, r.uniform(0.05, 0.3))


def _bell(t, r):
    pitch = r.uniform(300, 600)
    index = r.uniform(3, 6) * _decay(t, 0.5)
    return np.sin(2 * np.pi * pitch * t + index * np.sin(2 * np.pi * 1.41 * pitch * t)) * _decay(
        t, 0.8
    )


def _guitar(t, r):
    pitch = r.uniform(100, 200)
    return sum(
        np.sin(2 * np.pi * n * pitch * t) * _decay(t, 1.0 / n) / n for n in range(1, 20)
    ) + 0.2 * r.normal(size=len(t)) * _decay(t, 0.01)


INSTRUMENTS: dict[str, Callable] = {
    "Acoustic_guitar": _guitar,
    "Bass_drum": _bass_drum,
    "Bell": _bell,
    "Clarinet": _clarinet,
    "Flute": _flute,
    "Hi-hat": _hi_hat,
    "Snare_drum": _snare_drum,
    "Violin_or_fiddle": _violin,
}


def _instrument_clip(label: str, r: np.random.Generator) -> np.ndarray:
    """One clip of 0.3 to 3 s with silence around it, random loudness and a noise floor: (T,) in [-1, 1]."""
    time = np.arange(int(r.uniform(0.3, 2.5) * FSD_RATE)) / FSD_RATE
    sound = INSTRUMENTS[label](time, r)
    sound = sound / np.abs(sound).max() + 10 ** r.uniform(-3, -1.5) * r.normal(size=len(time))
    silence = [np.zeros(int(r.uniform(0, 0.4) * FSD_RATE)) for _ in range(2)]
    return np.concatenate(
        [silence[0], r.uniform(0.2, 0.9) * sound / np.abs(sound).max(), silence[1]]
    )


def _write_fsdkaggle2018(root: Path) -> None:
    tables = {
        "train": ("train_post_competition.csv", "manually_verified", TRAIN_PER_CLASS),
        "test": ("test_post_competition_scoring_clips.csv", "usage", TEST_PER_CLASS),
    }
    (root / "FSDKaggle2018.meta").mkdir(parents=True)
    for part, (table, extra, per_class) in tables.items():
        folder = root / f"FSDKaggle2018.audio_{part}"
        folder.mkdir()
        with open(root / "FSDKaggle2018.meta" / table, "w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["fname", "label", extra, "freesound_id", "license"])
            for number in range(per_class * len(INSTRUMENTS)):
                label = sorted(INSTRUMENTS)[number % len(INSTRUMENTS)]
                r = generator(VERSION, part, number)
                fname = f"{r.integers(2**32):08x}.wav"
                soundfile.write(folder / fname, _instrument_clip(label, r), FSD_RATE, "PCM_16")
                writer.writerow([fname, label, 1 if part == "train" else "Public", number, "CC0"])


def _speech(seconds: float, pitch: float, r: np.random.Generator) -> np.ndarray:
    """Vowels of random formants, fricatives and pauses of 60 to 300 ms each: (T,) in [-1, 1]."""
    pieces, length = [], 0
    while length < seconds * SPEECH_RATE:
        time = np.arange(int(r.uniform(0.06, 0.3) * SPEECH_RATE)) / SPEECH_RATE
        envelope = np.sin(np.pi * np.linspace(0, 1, len(time))) ** 0.5
        kind = r.choice(["vowel", "fricative", "pause"], p=[0.65, 0.2, 0.15])
        if kind == "vowel":
            formants = np.array([r.uniform(250, 850), r.uniform(900, 2400), r.uniform(2400, 3200)])
            sweep = pitch * r.uniform(0.8, 1.2)

            def weights(orders: np.ndarray, sweep=sweep, formants=formants) -> np.ndarray:
                distance = (orders[:, None] * sweep - formants) / 120
                return (1 / (1 + distance**2)).sum(axis=1) + 0.5 / orders**2

            piece = _harmonics(time, sweep, weights, 7000)
        elif kind == "fricative":
            piece = 0.3 * _shape(r.normal(size=len(time)), SPEECH_RATE, r.uniform(1500, 4000), 7800)
        else:
            piece = np.zeros(len(time))
        pieces.append(piece * envelope)
        length += len(piece)
    wave = np.concatenate(pieces)
    return 0.6 * wave / np.abs(wave).max() + 1e-3 * r.normal(size=len(wave))


def _write_librispeech(root: Path) -> None:
    for speaker in range(SPEAKERS):
        pitch = generator(VERSION, "speaker", speaker).uniform(90, 240)
        folder = root / str(1000 + speaker) / "1"
        folder.mkdir(parents=True)
        for utterance in range(UTTERANCES):
            r = generator(VERSION, "speech", speaker, utterance)
            path = folder / f"{1000 + speaker}-1-{utterance:04d}.flac"
            soundfile.write(path, _speech(r.uniform(3, 6), pitch, r), SPEECH_RATE, "PCM_16")


def _write_backgrounds(root: Path) -> None:
    bands = {"BUS": (30, 400), "CAF": (200, 3000), "PED": (100, 6000), "STR": (40, 1500)}
    root.mkdir(parents=True)
    samples = int(BACKGROUND_SECONDS * SPEECH_RATE)
    time = np.arange(samples) / SPEECH_RATE
    for number, (environment, (low, high)) in enumerate(bands.items()):
        r = generator(VERSION, "background", environment)
        swell = 1 + 0.5 * np.sin(2 * np.pi * r.uniform(0.1, 2) * time)
        wave = _shape(r.normal(size=samples), SPEECH_RATE, low, high) * swell
        if environment == "CAF":
            voices = sum(_speech(BACKGROUND_SECONDS, p, r)[:samples] for p in r.uniform(90, 240, 6))
            wave = wave / np.abs(wave).max() + voices
        path = root / f"BGD_90010{number + 1}_010_{environment}.CH1.wav"
        soundfile.write(path, 0.5 * wave / np.abs(wave).max(), SPEECH_RATE, "PCM_16")
