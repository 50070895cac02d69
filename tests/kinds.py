"""The same clips in every kind of source, for tests of sources."""

import functools
import io
import json
import tarfile
from collections.abc import Sequence
from pathlib import Path

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
import tiny

RATE = 16_000
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TEXT = pa.string()
SCHEMA = pa.schema(
    [("id", TEXT), ("audio", AUDIO), ("label", TEXT), ("speaker", TEXT), ("seconds", pa.float64())]
)


@functools.cache
def flac(number: int) -> bytes:
    """A clip of 0.1 to 0.3 s, another for each number."""
    rng, file = np.random.default_rng(number), io.BytesIO()
    wave = tiny.tone(rng.uniform(0.1, 0.3), RATE, rng, 300.0 + number)
    soundfile.write(file, wave, RATE, "PCM_16", format="FLAC")
    return file.getvalue()


def clips(count: int, first: int = 0, labels: Sequence[str] = ("cat", "dog")) -> list[dict]:
    """Rows with real audio; an id is LABEL/NUMBER.flac."""
    rows = []
    for n in range(first, first + count):
        label = labels[n % len(labels)]
        name = f"{label}/{n:04d}.flac"
        seconds = soundfile.info(io.BytesIO(flac(n))).duration
        row = {"id": name, "audio": {"bytes": flac(n), "path": name}, "label": label}
        rows.append(row | {"speaker": f"speaker {n % 4}", "seconds": seconds})
    return rows


def by_id(rows: list[dict]) -> dict[str, tuple]:
    return {row["id"]: (row["audio"]["bytes"], row["label"], row["speaker"]) for row in rows}


def cut(rows: list[dict], size: int) -> list[list[dict]]:
    return [rows[first : first + size] for first in range(0, len(rows), size)]


def parquet(
    path: Path, rows: list[dict], group: int = 3, schema: pa.Schema | None = SCHEMA
) -> Path:
    """Write a file with row groups of `group` rows; without a schema the types are those of the rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema), path, row_group_size=group)
    return path


def shards(folder: Path, rows: list[dict], size: int = 8, name: str = "train") -> Path:
    """Write Parquet files of `size` rows, as `mtl-dist prepare` calls them."""
    parts = cut(rows, size)
    for n, own in enumerate(parts):
        parquet(folder / f"{name}-{n:05d}-of-{len(parts):05d}.parquet", own)
    return folder


def card(folder: Path, **data_files: str) -> Path:
    """Write a dataset card that says the files of each split."""
    files = [f"  - {{split: {split}, path: '{path}'}}" for split, path in data_files.items()]
    head = ["---", "configs:", "- config_name: default", "  data_files:", *files, "---", "# Clips"]
    (folder / "README.md").write_text("\n".join(head))
    return folder


def audio_files(folder: Path, rows: list[dict]) -> Path:
    """Write FOLDER/ID for each."""
    for row in rows:
        path = folder / row["id"]
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(row["audio"]["bytes"])
    return folder


def tar(path: Path, files: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as out:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            out.addfile(info, io.BytesIO(data))
    return path


def tars(folder: Path, rows: list[dict], size: int = 8) -> Path:
    """Write tars of `size` samples: a flac, and a JSON member that says the rest."""
    for n, own in enumerate(cut(rows, size)):
        files = []
        for row in own:
            key = row["id"].removesuffix(".flac")
            about = {name: row[name] for name in ("id", "label", "speaker", "seconds")}
            files += [
                (f"{key}.flac", row["audio"]["bytes"]),
                (f"{key}.json", json.dumps(about).encode()),
            ]
        tar(folder / f"train-{n:05d}.tar", files)
    return folder


def to_memory(folder: Path, name: str) -> str:
    """Copy a folder into fsspec's memory; return its URL."""
    system = fsspec.filesystem("memory")
    for path in folder.rglob("*"):
        if path.is_file():
            system.pipe_file(f"/{name}/{path.relative_to(folder)}", path.read_bytes())
    return f"memory://{name}"
