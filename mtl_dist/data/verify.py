"""A prepared corpus read back: its columns and manifest, and `mtl-dist prepare --verify OUT`.

Every shard is read, all sound decoded, every count compared. Tested by tests/test_prepare_faults.py.
"""

import ctypes
import hashlib
import io
import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import soundfile
from datasets import Dataset, Features, List, Value

from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import open_clip, sounding_span
from mtl_dist.data.columns import SCHEMA

RATE, FORMAT, MANIFEST = 16_000, 2, "manifest.json"
TEXTS = List(Value("string"))
FOUND = Features({"wrong": TEXTS, "ids": TEXTS, "seconds": Value("float64")})
FLAC_MD5 = slice(26, 42)
"""Where a FLAC file says the md5 of its samples (its stream info comes first: RFC 9639, section 8.2)."""

_here = threading.local()
"""What is true of the thread that maps, and so of the processes that it forks, but not of those by other threads."""


def in_processes(function: Callable, rows: list[dict], workers: int, **more) -> Dataset:
    """Map a function over rows (Dataset.map with `more`), in processes that end with this one, however it ends.

    Raises ValueError if one was killed, KeyboardInterrupt after Ctrl-C, and what the function raises.
    """
    columns, count, _here.mapping = list(rows[0]), min(workers, len(rows)), True
    try:
        return Dataset.from_list(rows).map(
            function, num_proc=count, remove_columns=columns, new_fingerprint="prepare", **more
        )
    except RuntimeError as error:
        raise ValueError(
            f"a worker was killed, or ran out of memory ({error}); what is whole is kept: start the same command again, "
            "with fewer --workers if memory is short"
        ) from error
    except Exception as error:
        while error is not None:  # `datasets` may put a time-out in the place of Ctrl-C
            if isinstance(error, KeyboardInterrupt):
                raise error from None
            error = error.__context__
        raise
    finally:
        _here.mapping = False


def _after_fork() -> None:
    """Of a process of in_processes: leave Ctrl-C to the parent, and do not outlive it (where there is Linux)."""
    if getattr(_here, "mapping", False):
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if sys.platform == "linux":
            ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG


os.register_at_fork(after_in_child=_after_fork)


def fingerprint(path: Path) -> dict:
    """Return {"bytes", "blake2b"} of a file."""
    with open(path, "rb") as file:
        digest = hashlib.file_digest(file, "blake2b").hexdigest()
    return {"bytes": path.stat().st_size, "blake2b": digest}


def sound(audio: dict) -> dict:
    """Return the columns that say where the sound begins and ends, in samples, as training would hear it."""
    with open_clip(audio) as file:
        start, stop = sounding_span(file, ClipReader.silence_db)
    return {"silence_db": ClipReader.silence_db, "sound_start": start, "sound_stop": stop}


def read_manifest(out: Path) -> dict:
    """Return OUT/manifest.json. Raises ValueError naming what is wrong with it."""
    path = out / MANIFEST
    if not path.is_file():
        what = "was not prepared to its end" if (out / ".preparing").exists() else "is not prepared"
        raise ValueError(f"{out} {what}: there is no {path}")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["format"] != FORMAT:
            raise ValueError(f"its format is {manifest['format']!r}; {FORMAT} is known")
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path}: not as prepare writes it now ({error})") from error
    return manifest


def describe(manifest: dict, out: Path) -> str:
    """Return the counts of a manifest as text."""
    lines = [f"{out}: {manifest['kind']}"]
    for split, part in manifest["splits"].items():
        groups = sum(file["row_groups"] for file in part["files"])
        clips = f"{part['clips']} clips, {part['hours']:.2f} h"
        lines.append(f"  {split}: {clips}, {len(part['files'])} shards of {groups} row groups")
    megabytes = [f"{manifest[f'bytes_{way}'] / 1e6:.1f} MB" for way in ("in", "out")]
    counts = f"{len(manifest['skipped'])} skipped; {manifest['clipped_samples']} samples clipped"
    return "\n".join([*lines, f"  in {megabytes[0]}, out {megabytes[1]}; {counts}"])


def verify(out: Path, workers: int) -> bool:
    """Read every shard of a prepared corpus back, print what is wrong; return whether nothing is."""
    manifest, wrong, places = read_manifest(out), [], {}
    splits = manifest["splits"]
    shards = [file for part in splits.values() for file in part["files"]]
    options = {"desc": "verifying", "features": FOUND, "fn_kwargs": {"out": str(out)}}
    found = iter(in_processes(check_shard, shards, workers, **options))
    for split, part in splits.items():
        clips, hours = 0, 0.0
        for shard in part["files"]:
            here = next(found)
            wrong += here["wrong"]
            clips, hours = clips + len(here["ids"]), hours + here["seconds"] / 3600
            for row, clip in enumerate(here["ids"]):
                place = f"{shard['file']}, row {row}"
                if clip in places:
                    wrong.append(f"{place} ({clip}): stands in {places[clip]} too")
                places[clip] = place
        if clips != part["clips"] or abs(hours - part["hours"]) > 1e-6:
            said = f"{part['clips']} clips, {part['hours']:.4f} h"
            wrong.append(f"{split}: {clips} clips, {hours:.4f} h, the manifest says {said}")
    strange = {path.name for path in out.glob("*.parquet")} - {shard["file"] for shard in shards}
    wrong += [f"{name}: the manifest does not know it; remove it" for name in sorted(strange)]
    print("\n".join(wrong or [describe(manifest, out), "  everything reads back whole"]))
    return not wrong


def check_shard(facts: dict, out: str) -> dict:
    """Read a shard back: {"wrong": what is wrong with it, "ids" in it, "seconds" of sound}. `facts` are the manifest's."""
    name, path, wrong, ids, seconds = facts["file"], Path(out, facts["file"]), [], [], 0.0
    if not path.is_file():
        return {"wrong": [f"{name}: is not there"], "ids": ids, "seconds": seconds}
    there = fingerprint(path)
    try:
        with pq.ParquetFile(path) as file:
            if file.schema_arrow != SCHEMA:
                raise pa.ArrowInvalid("other columns than a prepared corpus has")
            there |= {"rows": file.metadata.num_rows, "row_groups": file.num_row_groups}
            for group in range(file.num_row_groups):
                for row in file.read_row_group(group, use_threads=False).to_pylist():
                    where = f"{name}, row {len(ids)} ({row['id']})"
                    wrong += [f"{where}: {problem}" for problem in _problems(row)]
                    ids.append(row["id"])
                    seconds += row["seconds"] or 0.0
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        where = f"{name}, after row {len(ids) - 1}" if ids else name
        wrong.append(f"{where}: cannot be read as Parquet ({error})")
    differ = [field for field in there if there[field] != facts[field]]
    wrong += [f"{name}: {f} is {there[f]}, the manifest says {facts[f]}" for f in differ]
    return {"wrong": wrong, "ids": ids, "seconds": seconds}


def _problems(row: dict) -> list[str]:
    """Say what is wrong with a row, decoding all of its sound."""
    data, wrong = (row["audio"] or {}).get("bytes") or b"", []
    try:
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            form = (file.format, file.subtype, file.samplerate, file.channels)
            samples = file.read(dtype="int16")
    except soundfile.LibsndfileError as error:
        return [f"its sound cannot be decoded ({error})"]
    if form[0] not in ("FLAC", "WAV") or form[1:] != ("PCM_16", RATE, 1):
        return [f"is {form}, not 16-bit mono FLAC or WAV of {RATE} Hz"]
    if form[0] == "FLAC" and hashlib.md5(samples.tobytes()).digest() != data[FLAC_MD5]:
        wrong.append("its samples are not those that were encoded (md5)")
    if len(samples) != round((row["seconds"] or 0) * RATE):
        wrong.append(f"lasts {len(samples) / RATE} s, its column seconds says {row['seconds']}")
    elif (heard := sound(row["audio"])) != {column: row[column] for column in heard}:
        wrong.append(f"sounds as {heard}, its columns say otherwise")
    return wrong
