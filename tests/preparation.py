"""`mtl-dist prepare` in tests: started in this process, and what it wrote."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile

from mtl_dist import cli

FOLDERS = {"fsdkaggle2018": "FSDKaggle2018", "librispeech": "LibriSpeech", "chime3": "CHiME3"}
SMALL = ("--shard_mb", "0.006", "--rows_per_group", "2")


def prepare(kind: str, source: Path, out: Path, *words: str) -> dict:
    """Prepare in this process, with two workers; return the manifest."""
    cli.main(["prepare", kind, str(source), str(out), "--workers", "2", *words])
    return json.loads((out / "manifest.json").read_text())


def refused(*words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", *map(str, words)])
    return str(stop.value)


def rows_of(out: Path, split: str = "*") -> list[dict]:
    files = sorted(out.glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def decoded(row: dict) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
    assert rate == 16_000
    assert row["seconds"] == len(samples) / 16_000
    return samples


def files_of(out: Path) -> dict[str, bytes]:
    """Everything that is in OUT, but for unpacked archives."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "unpacked"}


def write_clips(folder: Path) -> Path:
    """Write 12 clips of 0.1 s with labels by folder."""
    rng = np.random.default_rng(0)
    for n in range(12):
        path = folder / ("cat" if n % 2 else "dog") / f"{n:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, 1600), 16_000, "PCM_16")
    return folder
