"""Ours from the shards that `mtl-dist prepare` writes."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rivals import common, ours

NAME = "ours from prepared shards"


def write(work: Path) -> None:
    """Prepare both corpora."""
    for kind, folder in (("librispeech", "LibriSpeech"), ("chime3", "CHiME3")):
        words = [kind, str(work / folder), str(work / f"prepared_{folder}"), "--shard_mb", "64"]
        subprocess.run([sys.executable, "-m", "mtl_dist.cli", "prepare", *words], check=True)


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches."""
    return ours.batches_from(work / "prepared_LibriSpeech", work / "prepared_CHiME3", workers)
