"""Tiny corpora in the published layouts, made with numpy and soundfile, and a tiny configuration that hears them."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile

REPOSITORY = Path(__file__).parent.parent
CLASSES = ("Bark", "Chime", "Squeak")
FSD_RATE, SPEECH_RATE = 44_100, 16_000
TRAIN_CLIPS, TEST_CLIPS, SPEAKERS, UTTERANCES = 24, 79, 5, 3


def tone(seconds: float, rate: int, rng: np.random.Generator, pitch: float) -> np.ndarray:
    """A sine with noise: (T,) in [-1, 1]."""
    time = np.arange(int(seconds * rate)) / rate
    wave = np.sin(2 * np.pi * pitch * time) + 0.2 * rng.normal(size=len(time))
    return 0.7 * wave / np.abs(wave).max()


def write_fsdkaggle2018(root: Path, train: int = TRAIN_CLIPS, test: int = TEST_CLIPS) -> Path:
    """Write FSDKaggle2018.audio_*/ and .meta/ below `root`: clips of 0.04 to 0.3 s at 44.1 kHz."""
    (root / "FSDKaggle2018.meta").mkdir(parents=True)
    tables = {
        "train": ("train_post_competition.csv", "manually_verified", train),
        "test": ("test_post_competition_scoring_clips.csv", "usage", test),
    }
    for part, (table, extra, clips) in tables.items():
        rng = np.random.default_rng([1, clips])
        folder = root / f"FSDKaggle2018.audio_{part}"
        folder.mkdir()
        with open(root / "FSDKaggle2018.meta" / table, "w", newline="") as lines:
            writer = csv.writer(lines)
            writer.writerow(["fname", "label", extra, "freesound_id", "license"])
            for number in range(clips):
                place = number % len(CLASSES)
                name = f"{part}{number:03d}.wav"
                wave = tone(rng.uniform(0.04, 0.3), FSD_RATE, rng, 300.0 * (1 + place))
                soundfile.write(folder / name, wave, FSD_RATE, "PCM_16")
                used = 1 if part == "train" else "Public"
                writer.writerow([name, CLASSES[place], used, number, "CC0"])
    return root


def write_librispeech(root: Path, split: str = "train-clean-100") -> Path:
    """Write SPLIT/SPEAKER/CHAPTER/S-C-U.flac below `root`: utterances of 0.1 to 0.5 s at 16 kHz."""
    rng = np.random.default_rng(2)
    for speaker in range(101, 101 + SPEAKERS):
        folder = root / split / str(speaker) / "7"
        folder.mkdir(parents=True)
        for utterance in range(UTTERANCES):
            wave = tone(rng.uniform(0.1, 0.5), SPEECH_RATE, rng, float(speaker))
            path = folder / f"{speaker}-7-{utterance:04d}.flac"
            soundfile.write(path, wave, SPEECH_RATE, "PCM_16")
    return root


def write_chime3(root: Path) -> Path:
    """Write one BGD_*.wav of 1 s for each environment below `root`."""
    folder = root / "data" / "audio" / "16kHz" / "backgrounds"
    folder.mkdir(parents=True)
    rng = np.random.default_rng(3)
    for environment in ("BUS", "CAF", "PED", "STR"):
        noise = 0.3 * rng.normal(size=SPEECH_RATE).clip(-3, 3)
        path = folder / f"BGD_900101_010_{environment}.CH1.wav"
        soundfile.write(path, noise, SPEECH_RATE, "PCM_16")
    return root


def write_corpora(root: Path) -> Path:
    """Write all three corpora below `root`."""
    write_fsdkaggle2018(root / "FSDKaggle2018")
    write_librispeech(root / "LibriSpeech")
    write_chime3(root / "CHiME3")
    return root


def tiny_words(corpora: Path, *more: str) -> list[str]:
    """Command-line words of a tiny run of all four tasks on the corpora that write_corpora made; later words win."""
    return [
        *("--config", str(REPOSITORY / "tests" / "tiny.yaml")),
        *("--corpora.fsdkaggle2018.root", str(corpora / "FSDKaggle2018")),
        *("--corpora.librispeech.root", str(corpora / "LibriSpeech")),
        *("--corpora.chime3.root", str(corpora / "CHiME3")),
        *more,
    ]


def run_process(words: list[str], timeout: float = 240.0, **environment: str):
    """Run `python words` in the repository with a time limit; return the finished process with its text."""
    return subprocess.run(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def listen(experiment, replace=setattr) -> dict[str, list[str]]:
    """Return {task: []}; the id of every row that a task is evaluated on is added to it from now on."""
    heard: dict[str, list[str]] = {name: [] for name in experiment.tasks}
    for name, task in experiment.tasks.items():

        def note(row, *arguments, ids=heard[name], asked=task.evaluation_clips):
            ids.append(row.id)
            return asked(row, *arguments)

        replace(task, "evaluation_clips", note)
    return heard


def full_disk(*_, **__):
    """Be put in the place of what writes."""
    raise OSError(28, "No space left on device")
