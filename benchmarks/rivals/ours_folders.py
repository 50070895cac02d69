"""Ours from the folders as published."""

from collections.abc import Iterator
from pathlib import Path

from rivals import common, ours

NAME = "ours from published folders"


def write(work: Path) -> None:
    """Nothing: it reads the published folders."""


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches."""
    return ours.batches_from(work / "LibriSpeech", work / "CHiME3", workers)
