"""Audio files on the stand-in for the Hub and in fsspec's memory, with the folder that holds the same, for tests."""

import itertools
from pathlib import Path

import fsspec
import numpy as np
import soundfile
import tiny

from mtl_dist.corpora.base import Corpus
from mtl_dist.corpora.noise import NoiseBank
from mtl_dist.streams.keys import generator

CHIME = "chimechallenge/chime3-background-noise"
CARD = "---\nlicense: cc-by-4.0\n---\n# A stand-in for the backgrounds of CHiME-3\n"
KINDS = {
    "BGD_900101_010_BUS.CH1.wav": "PCM_16",
    "BGD_900101_010_CAF.CH1.wav": "PCM_16",
    "BGD_900101_010_PED.CH1.wav": "PCM_24",
    "BGD_900101_010_STR.CH1.flac": "PCM_16",
}
RATE, SECONDS, SAMPLES = 16_000, 30, 32_000


def write_recordings(root: Path, seed: int = 5) -> Path:
    """Write recordings of half a minute as CHiME-3 lays them out; one is FLAC, one has 24 bits."""
    folder = root / "data/audio/16kHz/backgrounds"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(seed)
    for name, subtype in KINDS.items():
        noise = 0.2 * rng.normal(size=RATE * SECONDS).clip(-3, 3)
        soundfile.write(folder / name, noise, RATE, subtype)
    (root / "README.md").write_text(CARD)
    return root


def write_clips(root: Path) -> Path:
    """Write LABEL/**/NAME of short clips; the folders sort otherwise than their paths as text do."""
    rng = np.random.default_rng(6)
    for label, number in itertools.product(("dog", "dog-toy"), range(12)):
        path = root / label / "deep" / f"{number:02d}.{'flac' if number % 3 else 'wav'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, tiny.tone(rng.uniform(0.2, 0.5), RATE, rng, 440.0), RATE, "PCM_16")
    return root


def to_memory(folder: Path, name: str) -> str:
    """Copy a folder into fsspec's memory; return its URL."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"


def draws(corpus: Corpus, count: int, samples: int = SAMPLES) -> list[np.ndarray]:
    """Return noise that splits draw in turn."""
    bank, splits = NoiseBank(corpus, RATE), ("train", "validation", "test")
    return [bank.draw(samples, splits[n % 3], generator(n)) for n in range(count)]


def rows_of(corpus: Corpus) -> dict[str, list[tuple]]:
    """Return what is listed of each split, in order, but for where it lies."""
    return {
        split: list(zip(rows["id"][:], rows["label"][:], strict=True))
        for split, rows in corpus.splits.items()
    }
