"""Small Parquet files of clips, for tests of shards."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from mtl_dist.streams.retry import Remote
from mtl_dist.streams.shards import Shards

GROUPS = [[16, 16, 5], [3], [1, 16]]
"""Rows of each row group of each file."""
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FAST = Remote(timeout_seconds=5, patience_seconds=20, first_wait_seconds=0.05)


def clips(first: int, count: int) -> list[dict]:
    """Rows as `mtl-dist prepare` writes them, with 5 to 8 kB of audio each."""
    rows = []
    for number in range(first, first + count):
        draw = np.random.default_rng(number)
        audio = {"bytes": draw.bytes(int(draw.integers(5000, 8000))), "path": f"{number}.flac"}
        label = None if number % 5 == 0 else f"class {number % 3}"
        rows.append(
            {
                "id": f"clip-{number:04d}",
                "audio": audio,
                "label": label,
                "speaker": f"{number % 4}",
                "split": "train",
                "seconds": number / 8,
            }
        )
    return rows


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": AUDIO,
        "label": pa.string(),
        "speaker": pa.string(),
        "split": pa.string(),
        "seconds": pa.float64(),
    }
)


def write(folder: Path, groups: list[list[int]] = GROUPS, **options) -> list[dict]:
    """Write one file for each list of row groups; return all rows in order."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[dict] = []
    for number, counts in enumerate(groups):
        path = folder / f"train-{number:05d}-of-{len(groups):05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, **options) as writer:
            for count in counts:
                rows = clips(len(written), count)
                written += rows
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return written


def write_table(path: Path, columns: dict, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def audio_of(rows: list[dict]) -> list[bytes]:
    return [row["audio"]["bytes"] for row in rows]


def all_audio(shards: Shards) -> list[bytes | memoryview | None]:
    return [audio for block in range(len(shards)) for audio in shards.read(block)]
