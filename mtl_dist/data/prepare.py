"""`mtl-dist prepare`: a published corpus becomes Parquet shards of 16 kHz mono FLAC or WAV, shuffled, with a manifest.

    mtl-dist prepare fsdkaggle2018 data/FSDKaggle2018 prepared/fsdkaggle2018
    mtl-dist prepare --verify prepared/fsdkaggle2018

What is in a shard is a function of the list of files, the seed and the shard's number alone, whatever the number of
processes: a run that was killed goes on with the next shard and ends with the same bytes. Until the end OUT/.preparing
holds the lock, the settings, and a note of each shard that is whole. Tested by tests/test_prepare.py.
"""

import argparse
import contextlib
import difflib
import fcntl
import hashlib
import json
import logging
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

from mtl_dist.data import verify
from mtl_dist.data.archives import LAYOUTS, look, unpack_all
from mtl_dist.data.publish import finish, push, write_json
from mtl_dist.data.shards import cut, list_clips, plan, require_few, whole, write_shard
from mtl_dist.data.verify import MANIFEST, describe, in_processes, read_manifest

log = logging.getLogger("mtl_dist")

SETTINGS = ("kind", "seed", "rows_per_shard", "rows_per_group", "encoding", "heldout_share")
HELD_OUT = {"librispeech": 0.02, "fsdkaggle2018": 0.1}
"""What is held out, unless told otherwise, where nothing published says it: as in training from the folder."""
ROWS_PER_GROUP = {"flac": 8, "wav": 4}
"""About 2 MB of speech: what a lane has in memory."""


def add_prepare(commands) -> None:
    """Declare `mtl-dist prepare`."""
    text = "make shards of a published corpus, verify them, upload them"
    more = "Started again after it was killed it goes on where it was."
    command = commands.add_parser("prepare", allow_abbrev=False, help=text, description=more)
    add = command.add_argument
    add("kind", metavar="KIND", nargs="?", help=", ".join(LAYOUTS))
    add("source", metavar="FROM", nargs="?", type=Path, help="as published: folder or archives")
    add("out", metavar="OUT", nargs="?", type=Path, help="folder to write")
    add("--verify", metavar="OUT", type=Path, help="read a prepared corpus back instead")
    add("--push_to_hub", metavar="REPO", help="upload it then, as a data set, private if it is new")
    add("--seed", type=int, default=0, help="of the order (default: 0)")
    add("--rows_per_shard", type=int, default=384, help="rows of a file (default: 384)")
    add("--rows_per_group", type=int, help="rows read at a time (default: 8; WAV: 4)")
    add("--encoding", choices=("flac", "wav"), help="default: flac; chime3: wav")
    add("--workers", type=int, default=len(os.sched_getaffinity(0)), help="default: the cores")
    add("--max_bad_share", type=float, default=0.05, help="of the files (default: 0.05)")
    add("--manifest", type=Path, help="folder: CSV with the column path, and label, split if any")
    add("--labelled", action="store_true", help="folder: labels by the first folder level")
    add("--splits", nargs="+", help="librispeech: what to take (default: all that are there)")
    text = (
        "librispeech: of the speakers (0.02); fsdkaggle2018: of every label, for validation (0.1)"
    )
    add("--heldout_share", type=float, help=text)
    command.set_defaults(act=run_prepare)


def run_prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    """Prepare, verify, upload; exit code 1 where something is wrong. Raises ValueError or OSError saying what."""
    if overrides:
        raise ValueError(f"{overrides[0]}: not known; see mtl-dist prepare --help")
    _check(options)
    try:
        if options.verify is None:
            prepare(options)
        elif not verify.verify(options.verify, options.workers):
            sys.exit(1)
        if options.push_to_hub:
            push(options.verify or options.out, options.push_to_hub)
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _check(options: argparse.Namespace) -> None:
    options.encoding = options.encoding or ("wav" if options.kind == "chime3" else "flac")
    if options.rows_per_group is None:
        options.rows_per_group = ROWS_PER_GROUP[options.encoding]
    for field in ("rows_per_shard", "rows_per_group", "workers"):
        if getattr(options, field) < 1:
            raise ValueError(f"--{field}: {getattr(options, field)} is not allowed; use 1 or more")
    if not 0 <= options.max_bad_share <= 1:
        raise ValueError(f"--max_bad_share: {options.max_bad_share} is not allowed; use 0 to 1")
    if options.verify is not None:
        if options.kind is not None:
            raise ValueError("--verify OUT stands alone, without KIND, FROM and OUT")
        return
    if options.out is None:
        raise ValueError("KIND, FROM and OUT are needed: mtl-dist prepare KIND FROM OUT")
    if options.kind not in LAYOUTS:
        near = difflib.get_close_matches(options.kind, LAYOUTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else f" (allowed: {', '.join(LAYOUTS)})"
        raise ValueError(f"KIND: {options.kind!r} is not known{hint}")
    of_kind = {"manifest": ["folder"], "labelled": ["folder"], "splits": ["librispeech"]}
    for field, kinds in (of_kind | {"heldout_share": [*HELD_OUT]}).items():
        if getattr(options, field) and options.kind not in kinds:
            what = " and ".join(kinds)
            raise ValueError(f"--{field}: is for the kind {what} only, not for {options.kind}")
    if options.heldout_share is None:
        options.heldout_share = HELD_OUT.get(options.kind)


def prepare(options: argparse.Namespace) -> None:
    """Write OUT, or what is missing of it, and print the counts. Raises ValueError or OSError."""
    kind, out, unpacked = options.kind, options.out, options.out / "unpacked"
    folder, archives = look(kind, options.source)
    settings = {field: getattr(options, field) for field in SETTINGS}
    with _locked(out) as work:
        finished = (out / MANIFEST).exists()
        bound = _bound(out, work)
        _require_same(settings, bound, out)
        if finished and folder is None:
            return print(describe(read_manifest(out), out), "(finished before)")
        listing = list_clips(folder := folder or unpack_all(kind, archives, unpacked), options)
        parts, missing = cut(listing, folder, kind)
        settings["FROM"] = _digest(parts, missing)
        _require_same(settings, bound, out)
        if not finished:
            if not bound:
                for path in (*out.glob("*.parquet"), *out.glob(".*.partial")):
                    path.unlink()  # not noted: of other settings maybe
                write_json(work / "settings.json", settings)
            shards = plan(parts, options.seed, options.rows_per_shard)
            notes = _write_shards(shards, missing, folder, work, options)
            size = sum(piece["bytes"] for shard in shards for piece in shard["pieces"])
            about = {"kind": kind, "classes": listing.classes, "seed": options.seed}
            finish(out, notes, missing, about | {"settings": settings, "bytes_in": size})
        print(describe(read_manifest(out), out) + (" (finished before)" if finished else ""))
        if folder.is_relative_to(unpacked):
            print(f"the unpacked archives are no longer needed: rm -r {unpacked}")


@contextlib.contextmanager
def _locked(out: Path) -> Iterator[Path]:
    """Make and lock OUT/.preparing, and remove it once OUT is finished. Raises ValueError if OUT is not ours to write."""
    work = out / ".preparing"
    if out.exists() and not out.is_dir():
        raise ValueError(f"OUT: {out} is not a folder")
    if out.exists() and any(out.iterdir()) and not ((out / MANIFEST).exists() or work.exists()):
        raise ValueError(
            f"OUT: {out} is not empty and not a prepared corpus; name a new or an empty folder"
        )
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w", encoding="utf-8") as lock:
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by workers
        except (BlockingIOError, PermissionError):
            raise ValueError(f"OUT: another process is preparing {out}") from None
        try:
            yield work
        finally:
            if (out / MANIFEST).exists():
                shutil.rmtree(work, ignore_errors=True)


def _bound(out: Path, work: Path) -> dict:
    """Return the settings of what is finished, or of the shards that are whole; none where there are none."""
    if (out / MANIFEST).exists():
        return read_manifest(out)["settings"]
    return json.loads((work / "settings.json").read_bytes()) if whole(work) else {}


def _require_same(settings: dict, bound: dict, out: Path) -> None:
    """Raise ValueError if OUT was begun with other settings."""
    for field, value in settings.items():
        if bound.get(field, value) != value:
            what = f"is {value!r} and was {bound[field]!r}"
            what = "holds other files than" if field == "FROM" else what
            raise ValueError(
                f"{field}: {what} when {out} was begun; name another OUT, or remove this one to begin anew"
            )


def _digest(parts: dict[str, list[dict]], missing: list[dict]) -> str:
    ordered = {split: sorted(parts[split], key=lambda piece: piece["id"]) for split in parts}
    text = json.dumps([ordered, missing], sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _write_shards(shards, missing, folder: Path, work: Path, options) -> list[dict]:
    """Write the shards that are not whole yet; return the notes of all, in order."""
    total = sum(len(shard["pieces"]) for shard in shards) + len(missing)
    bad = {"known": missing, "total": total, "share": options.max_bad_share}
    more = {"folder": str(folder), "work": str(work), "encoding": options.encoding}
    more |= {"rows": options.rows_per_group, "bad": bad}
    (work / "failed").unlink(missing_ok=True)
    there = whole(work)
    if todo := [shard for shard in shards if shard["file"] not in there]:
        in_processes(write_shard, todo, options.workers, desc="shards", fn_kwargs=more)
    there = whole(work)
    notes = [there[shard["file"]] | {"split": shard["split"]} for shard in shards]
    skipped = [*missing, *(entry for note in notes for entry in note["skipped"])]
    require_few(skipped, total, options.max_bad_share)
    for entry in skipped:
        log.warning("skipped: %s %s", entry["file"], entry["reason"])
    return notes
