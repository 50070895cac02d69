"""Parquet files of rows with FLAC in them: written whole or not at all, read back to the last sample."""

import hashlib
import io
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from mtl_dist.preparing.pieces import RATE

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.string(),
        "speaker": pa.string(),
        "split": pa.string(),
        "seconds": pa.float64(),
    }
)
GROUP_BYTES = 256_000_000
"""A row group ends early at so much sound: a reader holds one of them, and Arrow's arrays end at 2 GB."""

FLAC_MD5 = slice(26, 42)
"""Where a FLAC file says the md5 of its samples (its stream info comes first: RFC 9639, section 8.2)."""


def write_shard(path: Path, rows: Iterable[dict], rows_per_group: int) -> dict:
    """Write a shard under a temporary name, flush and rename it; return what the manifest says of it.

    Raises:
        OSError: it could not be written; nothing of it is left, and earlier shards are whole.
    """
    partial = path.with_name(f".{path.name}.partial")
    count = groups = 0
    try:
        with open(partial, "wb") as file:
            with pq.ParquetWriter(
                file, SCHEMA, compression="NONE", use_dictionary=False, write_statistics=False
            ) as writer:  # FLAC is as small as it gets
                for group in _groups(rows, rows_per_group):
                    table = pa.Table.from_pylist(group, SCHEMA)
                    writer.write_table(table, row_group_size=len(group))
                    count, groups = count + len(group), groups + 1
            file.flush()
            os.fsync(file.fileno())
        facts = {"rows": count, "row_groups": groups, **fingerprint(partial)}
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"{path} could not be written: {error.strerror}; the shards before it are whole and kept: make room and "
            "start the same command again",
        ) from error
    return {"file": path.name} | facts


def _groups(rows: Iterable[dict], rows_per_group: int) -> Iterator[list[dict]]:
    group, size = [], 0
    for row in rows:
        group.append(row)
        size += len(row["audio"]["bytes"])
        if len(group) == rows_per_group or size >= GROUP_BYTES:
            yield group
            group, size = [], 0
    if group:
        yield group


def fingerprint(path: Path) -> dict:
    """Return {"bytes", "blake2b"} of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def check_shard(path: Path, split: str, facts: dict) -> tuple[list[str], list[str], float]:
    """Read a shard back: (what is wrong with it, the ids in it, seconds of sound). `facts` are the manifest's."""
    if not path.is_file():
        return [f"{path.name}: is not there"], [], 0.0
    wrong = [
        f"{path.name}: {field} is {found}, the manifest says {facts[field]}"
        for field, found in fingerprint(path).items()
        if found != facts[field]
    ]
    ids: list[str] = []
    seconds = 0.0
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow != SCHEMA:
                return [*wrong, f"{path.name}: other columns than a prepared corpus has"], [], 0.0
            groups = file.metadata.num_row_groups
            for row in (r for g in range(groups) for r in file.read_row_group(g).to_pylist()):
                wrong += [
                    f"{path.name}, row {len(ids)} ({row['id']}): {problem}"
                    for problem in _problems(row, split)
                ]
                ids.append(row["id"])
                seconds += row["seconds"] or 0.0
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        where = f"{path.name}, after row {len(ids) - 1}" if ids else path.name
        return [*wrong, f"{where}: cannot be read as Parquet ({error})"], ids, seconds
    counts = {"rows": len(ids), "row_groups": groups}
    wrong += [
        f"{path.name}: {field} is {found}, the manifest says {facts[field]}"
        for field, found in counts.items()
        if found != facts[field]
    ]
    return wrong, ids, seconds


def _problems(row: dict, split: str) -> list[str]:
    """Say what is wrong with a row, decoding all of its sound."""
    data = (row["audio"] or {}).get("bytes")
    if not data:
        return ["has no audio bytes"]
    wrong = [] if row["split"] == split else [f"its split is {row['split']!r}"]
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            form = (file.format, file.subtype, file.samplerate, file.channels)
            samples = file.read(dtype="int16")
    except soundfile.LibsndfileError as error:
        return [*wrong, f"its FLAC cannot be decoded ({error})"]
    if form != ("FLAC", "PCM_16", RATE, 1):
        return [*wrong, f"is {form}, not 16-bit mono FLAC of {RATE} Hz"]
    if hashlib.md5(samples.tobytes()).digest() != data[FLAC_MD5]:
        wrong.append("its samples are not those that were encoded (md5)")
    if len(samples) != round((row["seconds"] or 0) * RATE):
        wrong.append(f"lasts {len(samples) / RATE} s, its column seconds says {row['seconds']}")
    return wrong
