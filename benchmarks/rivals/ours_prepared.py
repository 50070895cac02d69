"""Ours from the shards that `mtl-dist prepare` writes, in FLAC."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from rivals import common, ours

NAME = "ours from prepared shards, FLAC"


def write(work: Path, encoding: str = "flac") -> None:
    """Prepare both corpora, the utterances in this encoding, the backgrounds in their own."""
    out = work / f"prepared_{encoding}"
    for kind, *words in (("librispeech", "--encoding", encoding), ("chime3",)):
        source = work / ("LibriSpeech" if kind == "librispeech" else "CHiME3")
        words = [kind, str(source), str(out / kind), *words]
        subprocess.run([sys.executable, "-m", "mtl_dist.cli", "prepare", *words], check=True)


def batches(work: Path, workers: int, encoding: str = "flac") -> Iterator[common.Batch]:
    """Yield batches."""
    out = work / f"prepared_{encoding}"
    return ours.batches_from(out / "librispeech", out / "chime3", workers)
