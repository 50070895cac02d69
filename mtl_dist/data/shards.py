"""What goes into which shard of a prepared corpus, and how a process writes one: the lower half of prepare.py.

A clip is one piece, from its first frame to its last; CHiME-3's recordings are cut. Tested by tests/test_prepare.py.
"""

import argparse
import contextlib
import io
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import datasets
import numpy as np
import soundfile

from mtl_dist.audio.reading import BadClipError, open_clip, read_stretch, stored_bytes
from mtl_dist.data.archives import LAYOUTS
from mtl_dist.data.columns import FEATURES
from mtl_dist.data.corpora.chime3 import Chime3
from mtl_dist.data.corpora.corpus import SPLIT_SPANS
from mtl_dist.data.corpora.folder import Folder
from mtl_dist.data.corpora.fsdkaggle2018 import FSDKaggle2018
from mtl_dist.data.corpora.librispeech import LibriSpeech, hold_out
from mtl_dist.data.corpora.listing import Listing, read_manifest, require_labels, shuffled
from mtl_dist.data.verify import RATE, fingerprint, sound

STRETCH_SECONDS, NOISE_SECONDS, FULL_SCALE = 60, 10, 32_768
SHARD_BYTES = 500_000_000
"""A shard ends early at so many bytes of files: a process has one in memory."""


def list_clips(folder: Path, options: argparse.Namespace) -> Listing:
    """List a published folder by the code that training lists it with; every row has a split. Raises ValueError."""
    root, kind, field = str(folder), options.kind, "FROM"
    if kind == "librispeech":
        there = sorted({path.parts[-4] for path in folder.glob(LAYOUTS[kind][0])})
        splits = options.splits or there
        found = LibriSpeech(root=root, splits=splits).published(kind, root, field)
        _hold_out_speakers(found.rows, options)
    elif options.manifest is not None:
        found = read_manifest(options.manifest, folder, "--manifest")
    else:
        kinds = {"fsdkaggle2018": FSDKaggle2018, "chime3": Chime3, "folder": Folder}
        settings = {"labelled": options.labelled} if kind == "folder" else {}
        found = kinds[kind](root=root, **settings).published(kind, root, field)
    if kind == "fsdkaggle2018":
        corpus = FSDKaggle2018(root=root, validation_share=options.heldout_share)
        found.rows = corpus.divide(found.rows, kind, options.seed)
    seen: set[str] = set()
    for row in found.rows:
        row["split"] = row["split"] or "train"
        if row["id"] in seen:
            raise ValueError(f"{row['path']}: another clip has the id {row['id']!r} too")
        seen.add(row["id"])
    found.classes = require_labels(found.rows, found.classes, kind)
    return found


def _hold_out_speakers(rows: list[dict], options: argparse.Namespace) -> None:
    """Make dev-* and test-* of LibriSpeech validation and test; where there are none, hold out speakers instead."""
    ours = {"dev": "validation", "test": "test"}
    for row in rows:
        row["split"] = ours.get(row["split"].split("-")[0], row["split"])
    absent = set(ours.values()) - {row["split"] for row in rows}
    train = {row["id"]: row for row in rows if row["split"] not in ours.values()}
    if train and absent:
        held = hold_out(train, options.heldout_share, options.seed, options.kind)
        for clip in (clip for clip in held if held[clip] in absent):
            train[clip]["split"] = held[clip]


def cut(listing: Listing, folder: Path, kind: str) -> tuple[dict[str, list[dict]], list[dict]]:
    """Return ({split: pieces of files}, {"file", "reason"} of what is not there or cannot be cut)."""
    absent = (os.path.relpath(path, folder) for paths in listing.missing.values() for path in paths)
    missing = [{"file": name, "reason": "is not there"} for name in sorted(absent)]
    parts: dict[str, list[dict]] = {}
    for row in listing.rows:
        audio = {"path": str(row["path"]), "bytes": None}
        piece = {field: row[field] for field in ("id", "label", "speaker")}
        piece |= {"file": os.path.relpath(row["path"], folder), "bytes": stored_bytes(audio)}
        piece |= {"start": 0, "frames": 0}  # 0 frames: all of them
        try:
            for split, part in (
                _cut_noise(piece, audio) if kind == "chime3" else [(row["split"], piece)]
            ):
                parts.setdefault(split, []).append(part)
        except BadClipError as error:
            missing.append({"file": piece["file"], "reason": error.reason})
    return parts, missing


def _cut_noise(piece: dict, audio: dict) -> Iterator[tuple[str, dict]]:
    """Cut a recording at the borders of what each split may hear, and these stretches into pieces of at most 10 s."""
    with open_clip(audio) as file:
        frames, rate, numbers = file.frames, file.samplerate, itertools.count()
    for split, (low, high) in SPLIT_SPANS.items():
        start, stop = int(low * frames), int(high * frames)
        count = math.ceil((stop - start) / (NOISE_SECONDS * rate))
        borders = [start + (stop - start) * i // count for i in range(count)] + [stop]
        for begin, end in itertools.pairwise(borders):
            own = {
                "id": f"{piece['id']}_{next(numbers):04d}",
                "start": begin,
                "frames": end - begin,
            }
            yield split, piece | own | {"bytes": piece["bytes"] * (end - begin) // frames}


def plan(parts: dict[str, list[dict]], seed: int, rows_per_shard: int) -> list[dict]:
    """Shuffle the pieces of each split by the seed, and deal them out to shards {"split", "file", "pieces"}."""
    shards = []
    for split in sorted(parts):
        by_id, lots, room = {piece["id"]: piece for piece in parts[split]}, [], 0
        for piece in map(by_id.get, shuffled(by_id, seed, "prepare", split)):
            if not lots or len(lots[-1]) == rows_per_shard or room < piece["bytes"]:
                lots.append([])
                room = SHARD_BYTES
            lots[-1].append(piece)
            room -= piece["bytes"]
        for number, pieces in enumerate(lots):
            name = f"{split}-{number:05d}-of-{len(lots):05d}.parquet"
            shards.append({"split": split, "file": name, "pieces": pieces})
    return shards


def write_whole(path: Path, write: Callable) -> None:
    """Let `write(file)` write a file under a temporary name, flush and rename it. Raises OSError naming it."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with open(partial, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        why = f"could not be written: {error.strerror or error}"
        more = "shards that are whole are kept: make room and start the same command again"
        raise OSError(error.errno, f"{path} {why}; {more}") from error


def encode(audio: dict, start: int, frames: int, encoding: str) -> tuple[bytes, int, int]:
    """Return (a file of 16 kHz, mono, 16 bit; its samples; how many were clipped) of some frames, 0 for all of them.

    Raises:
        BadClipError: missing, truncated, NaN or Inf, or otherwise not to be read.
    """
    samples, clipped, buffer = 0, 0, io.BytesIO()
    with (
        open_clip(audio) as file,
        soundfile.SoundFile(buffer, "w", RATE, 1, "PCM_16", format=encoding) as out,
    ):
        stop, step = start + (frames or file.frames), STRETCH_SECONDS * file.samplerate
        count = max(1, int((stop - start) / step + 0.5))
        borders = [*range(start, start + count * step, step), stop]
        for begin, end in itertools.pairwise(borders):  # of whole seconds: on samples of both rates
            wave = read_stretch(file, begin, end - begin, RATE)
            samples, clipped = samples + len(wave), clipped + int((np.abs(wave) > 1).sum())
            steps = np.rint(wave * FULL_SCALE).clip(-FULL_SCALE, FULL_SCALE - 1)
            out.write(steps.astype(np.int16))
    return buffer.getvalue(), samples, clipped


def require_few(skipped: list[dict], total: int, share: float) -> None:
    """Raise ValueError if more than a share of all files cannot be used."""
    if len(skipped) > share * total:
        raise ValueError(
            f"--max_bad_share: {len(skipped)} of {total} clips cannot be used, such as {skipped[0]['file']} "
            f"({skipped[0]['reason']}); mend them, or allow a larger share"
        )


def whole(work: Path) -> dict[str, dict]:
    """Return {file: what was noted of it} of the shards that are whole."""
    notes = [json.loads(path.read_bytes()) for path in sorted(work.glob("*-of-*.json"))]
    files = {note["file"]: (note, work.parent / note["file"]) for note in notes}
    return {f: n for f, (n, p) in files.items() if p.exists() and p.stat().st_size == n["bytes"]}


def write_shard(shard: dict, folder: str, work: str, encoding: str, rows: int, bad: dict) -> None:
    """Write a shard with row groups of `rows` and note what is in it, in a process of its own.

    Raises ValueError for too many bad files: `bad` says how many are, of those known already.
    """
    datasets.disable_progress_bars()
    work = Path(work)
    if (work / "failed").exists():  # another process has stopped
        return
    try:
        made, facts = _encode_all(shard["pieces"], Path(folder), encoding)
        others = [entry for note in whole(work).values() for entry in note["skipped"]]
        require_few(bad["known"] + others + facts["skipped"], bad["total"], bad["share"])
        path, table = work.parent / shard["file"], datasets.Dataset.from_list(made, FEATURES)
        # Cast, which needs no codec: so the sound is stored as it is, neither compressed again nor in a dictionary.
        table = table.cast_column("audio", datasets.Audio(decode=False))
        small = {
            "write_statistics": False,
            "write_page_index": False,
        }  # its readers read the footer
        write_whole(path, lambda file: table.to_parquet(file, batch_size=rows, **small))
        facts |= {"file": path.name, "rows": len(made), "row_groups": math.ceil(len(made) / rows)}
        note = json.dumps(facts | fingerprint(path)).encode()
        write_whole(work / f"{path.stem}.json", lambda file: file.write(note))
    except Exception:
        with contextlib.suppress(OSError):
            (work / "failed").touch()
        raise


def _encode_all(pieces: list[dict], folder: Path, encoding: str) -> tuple[list[dict], dict]:
    """Return (rows, {"seconds", "clipped_samples", "skipped"}) of the pieces of a shard."""
    rows, facts = [], {"seconds": 0.0, "clipped_samples": 0, "skipped": []}
    for piece in pieces:
        audio = {"path": str(folder / piece["file"]), "bytes": None}
        try:
            data, samples, clipped = encode(audio, piece["start"], piece["frames"], encoding)
        except BadClipError as error:
            facts["skipped"].append({"file": piece["file"], "reason": error.reason})
            continue
        audio, seconds = {"bytes": data, "path": f"{piece['id']}.{encoding}"}, samples / RATE
        row = piece | {"audio": audio, "seconds": seconds} | sound(audio)
        rows.append({column: row[column] for column in FEATURES})
        facts["seconds"] += seconds
        facts["clipped_samples"] += clipped
    return rows, facts
