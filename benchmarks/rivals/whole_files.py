"""The usual PyTorch way: a map-style Dataset that reads the whole file with soundfile and cuts a crop out of it."""

from collections.abc import Iterator
from pathlib import Path

import soundfile
from torch.utils.data import DataLoader, Dataset, RandomSampler

from rivals import common

NAME = "whole files: soundfile, Dataset, DataLoader"


class Clips(Dataset):
    """Index -> (noisy, clean, held) of a random crop of an utterance."""

    def __init__(self, work: Path):
        self.paths, self.noise = common.utterances(work), common.Backgrounds(work)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> common.Crop:
        wave, _ = soundfile.read(self.paths[index], dtype="float32")
        start = common.random_start(len(wave))
        return common.finish(wave[start : start + common.SAMPLES], self.noise)


def write(work: Path) -> None:
    """Nothing: it reads the published folder."""


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches; one sampler without end, so that no epoch's end stops the workers."""
    clips = Clips(work)
    sampler = RandomSampler(clips, replacement=True, num_samples=10**9)
    return iter(
        DataLoader(
            clips,
            common.BATCH,
            sampler=sampler,
            num_workers=workers,
            collate_fn=common.collate,
        )
    )
