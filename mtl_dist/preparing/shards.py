"""Parquet files of rows with sound in them: written whole or not at all."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": pa.struct({"bytes": pa.binary(), "path": pa.string()}),
        "label": pa.string(),
        "speaker": pa.string(),
        "split": pa.string(),
        "seconds": pa.float64(),
        "silence_db": pa.float64(),
        "sound_start": pa.int64(),
        "sound_stop": pa.int64(),
    }
)
GROUP_BYTES = 256_000_000
"""A row group ends early at so much sound: a reader holds one of them, and Arrow's arrays end at 2 GB."""


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
            ) as writer:  # FLAC is as small as it gets, and WAV is for those in a hurry
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
