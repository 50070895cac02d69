"""`mtl-dist prepare --verify`: every shard read back, all sound decoded, every count compared."""

import hashlib
import io
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from tqdm import tqdm

from mtl_dist.corpora.base import SOUND
from mtl_dist.preparing.encoding import Workers, sound
from mtl_dist.preparing.pieces import RATE
from mtl_dist.preparing.shards import SCHEMA, fingerprint
from mtl_dist.preparing.work import describe, read_manifest

FLAC_MD5 = slice(26, 42)
"""Where a FLAC file says the md5 of its samples (its stream info comes first: RFC 9639, section 8.2)."""


def verify(out: Path, count: int) -> bool:
    """Read every shard of a prepared corpus back, decode all of it, print what is wrong; return whether nothing is."""
    manifest = read_manifest(out)
    parts = manifest["splits"].items()
    tasks = [(out / s["file"], split, s) for split, part in parts for s in part["shards"]]
    found: dict[str, list[tuple[int, float]]] = {split: [] for split in manifest["splits"]}
    wrong, first = [], {}
    with Workers(count) as workers, tqdm(total=len(tasks), unit="shard", disable=None) as bar:
        results = workers.in_order(_check_task, tasks)
        for (path, split, _), (problems, ids, seconds) in zip(tasks, results, strict=True):
            wrong += problems
            for row, clip in enumerate(ids):
                if clip in first:
                    wrong.append(f"{path.name}, row {row} ({clip}): stands in {first[clip]} too")
                first[clip] = f"{path.name}, row {row}"
            found[split].append((len(ids), seconds))
            bar.update()
    for split, part in parts:
        clips, hours = (sum(x) for x in zip(*found[split], strict=True))
        if clips != part["clips"] or abs(hours / 3600 - part["hours"]) > 1e-6:
            wrong.append(
                f"{split}: {clips} clips, {hours / 3600:.4f} h, the manifest says {part['clips']}, {part['hours']:.4f} h"
            )
    listed = {path.name for path, _, _ in tasks}
    for path in sorted(out.glob("*.parquet")):
        if path.name not in listed:
            wrong.append(f"{path.name}: the manifest does not know it; remove it")
    print(
        "\n".join(wrong) if wrong else f"{describe(manifest, out)}\n  everything reads back whole"
    )
    return not wrong


def _check_task(task: tuple[Path, str, dict]) -> tuple[list[str], list[str], float]:
    return check_shard(*task)


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
            for row in (
                r
                for g in range(groups)
                for r in file.read_row_group(g, use_threads=False).to_pylist()
            ):
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
        return [*wrong, f"its sound cannot be decoded ({error})"]
    if form not in {(encoding, "PCM_16", RATE, 1) for encoding in ("FLAC", "WAV")}:
        return [*wrong, f"is {form}, not 16-bit mono FLAC or WAV of {RATE} Hz"]
    if form[0] == "FLAC" and hashlib.md5(samples.tobytes()).digest() != data[FLAC_MD5]:
        wrong.append("its samples are not those that were encoded (md5)")
    if len(samples) != round((row["seconds"] or 0) * RATE):
        wrong.append(f"lasts {len(samples) / RATE} s, its column seconds says {row['seconds']}")
    elif (heard := sound(row["audio"])) != {column: row[column] for column in SOUND}:
        wrong.append(f"sounds as {heard}, its columns say otherwise")
    return wrong
