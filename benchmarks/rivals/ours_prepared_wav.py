"""Ours from the shards that `mtl-dist prepare --encoding wav` writes."""

from collections.abc import Iterator
from pathlib import Path

from rivals import common, ours_prepared

NAME = "ours from prepared shards, WAV"


def write(work: Path) -> None:
    """Prepare both corpora."""
    ours_prepared.write(work, "wav")


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches."""
    return ours_prepared.batches(work, workers, "wav")
