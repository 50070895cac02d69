"""`mtl-dist prepare`: a published corpus becomes Parquet shards of 16 kHz mono FLAC, shuffled, with a manifest.

    mtl-dist prepare fsdkaggle2018 data/FSDKaggle2018 prepared/fsdkaggle2018
    mtl-dist prepare --verify prepared/fsdkaggle2018

What is in a shard is a function of the list of files, the seed and the shard's number alone, whatever the number of
processes: so a run that was killed goes on with the next shard and ends with the same bytes. Tested by
tests/test_prepare.py.
"""

import argparse
import itertools
import logging
import os
import shutil
import sys
import time
from collections.abc import Iterable, Iterator
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from tqdm import tqdm

from mtl_dist.corpora.base import Listing
from mtl_dist.preparing.encoding import Encoded, Workers, chunks, encode_chunk, measure
from mtl_dist.preparing.pieces import (
    RATE,
    Piece,
    Shard,
    cut,
    flac_bytes,
    list_digest,
    name_within,
    plan_shards,
)
from mtl_dist.preparing.shards import check_shard, write_shard
from mtl_dist.preparing.sources import LAYOUTS, find_source, list_clips, published
from mtl_dist.preparing.work import Work, make_manifest, read_manifest

log = logging.getLogger("mtl_dist")

ROWS_PER_GROUP = {"chime3": 1}
"""Where it is not 16: noise is drawn a piece at a time."""

HEADERS = 64
"""Headers read by a process at a time."""


def add_prepare(commands) -> None:
    """Declare `mtl-dist prepare`."""
    command = commands.add_parser(
        "prepare",
        allow_abbrev=False,
        help="make shards of a published corpus, or verify them",
        description="Write a corpus as Parquet shards of 16 kHz mono FLAC, shuffled by the seed. Started again after it "
        "was killed it goes on where it was.",
    )
    command.add_argument("kind", metavar="KIND", nargs="?", help=", ".join(LAYOUTS))
    command.add_argument(
        "source",
        metavar="FROM",
        nargs="?",
        type=Path,
        help="folder as published, or folder that holds the published archives",
    )
    command.add_argument("out", metavar="OUT", nargs="?", type=Path, help="folder to write")
    command.add_argument(
        "--verify", metavar="OUT", type=Path, help="read a prepared corpus back instead"
    )
    command.add_argument("--seed", type=int, default=0, help="of the order (default: 0)")
    command.add_argument(
        "--shard_mb", type=float, default=256.0, help="about the size of a shard (default: 256)"
    )
    command.add_argument(
        "--rows_per_group",
        type=int,
        help="rows of a row group, the least that is read at a time (default: 16; chime3: 1)",
    )
    command.add_argument(
        "--workers",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="processes (default: one for each core)",
    )
    command.add_argument(
        "--max_bad_share",
        type=float,
        default=0.05,
        help="stop if more than this share of the files cannot be used (default: 0.05)",
    )
    command.add_argument(
        "--manifest", type=Path, help="folder: CSV with the column path, and label, split if any"
    )
    command.add_argument(
        "--labelled", action="store_true", help="folder: take labels from the first folder level"
    )
    command.set_defaults(act=run_prepare)


def run_prepare(options: argparse.Namespace, overrides: list[str]) -> None:
    """Prepare or verify; exit code 1 where something is wrong. Raises ValueError or OSError saying what."""
    if overrides:
        raise ValueError(f"{overrides[0]}: not known; see mtl-dist prepare --help")
    if options.workers < 1:
        raise ValueError(f"--workers: {options.workers} is not allowed; use 1 or more")
    try:
        if options.verify is None:
            _check(options)
            prepare(options)
        elif options.kind is not None:
            raise ValueError("--verify OUT stands alone, without KIND, FROM and OUT")
        elif not verify(options.verify, options.workers):
            sys.exit(1)
    except BrokenProcessPool as error:
        raise ValueError(
            "a worker was killed, or ran out of memory; what is whole is kept: start the same command again, with fewer "
            "--workers if memory is short"
        ) from error
    except KeyboardInterrupt:
        print("stopped; start the same command again to go on", file=sys.stderr)
        sys.exit(130)


def _check(options: argparse.Namespace) -> None:
    if options.out is None:
        raise ValueError("KIND, FROM and OUT are needed: mtl-dist prepare KIND FROM OUT")
    if options.kind not in LAYOUTS:
        raise ValueError(f"KIND: {options.kind!r} is not known (allowed: {', '.join(LAYOUTS)})")
    for field in ("manifest", "labelled"):
        if options.kind != "folder" and getattr(options, field):
            raise ValueError(f"--{field}: is for the kind folder only, not for {options.kind}")
    if options.rows_per_group is None:
        options.rows_per_group = ROWS_PER_GROUP.get(options.kind, 16)
    for field in ("rows_per_group", "shard_mb"):
        if not getattr(options, field) > 0:
            value = getattr(options, field)
            raise ValueError(f"--{field}: {value} is not allowed; use more than 0")
    if not 0 <= options.max_bad_share <= 1:
        raise ValueError(f"--max_bad_share: {options.max_bad_share} is not allowed; use 0 to 1")


def prepare(options: argparse.Namespace) -> None:
    """Write OUT, or what is missing of it, and print the counts. Raises ValueError or OSError."""
    begun = time.monotonic()
    kind, source, out = options.kind, options.source.expanduser(), options.out.expanduser()
    if not source.is_dir():
        find_source(kind, source, out)  # says what is wrong, before OUT is made
    fields = ("kind", "seed", "rows_per_group", "shard_mb")
    work = Work(out, {field: getattr(options, field) for field in fields} | {"rate": RATE})
    unpacked = out / "unpacked"
    if work.manifest and published(kind, source) is None and not unpacked.exists():
        print(_report(work.manifest, out), "(finished before; its archives were not looked at)")
        return work.tidy()
    folder = find_source(kind, source, unpacked)
    listing = list_clips(kind, folder, options.manifest, options.labelled)
    with Workers(options.workers) as workers:
        pieces, sizes, unusable = _survey(kind, folder, listing, workers)
        work.require("files", list_digest(pieces, sizes, unusable))
        if work.manifest:
            print(_report(work.manifest, out), "(finished before)")
            return work.tidy()
        bad = Bad(options.max_bad_share, len(pieces) + len(unusable), unusable)
        shards = plan_shards(pieces, options.seed, options.rows_per_group, options.shard_mb)
        records = _write(work, shards, options.rows_per_group, workers, bad)
    manifest = make_manifest(
        kind, listing.classes, options.seed, list(zip(shards, records)), sum(sizes.values())
    )
    manifest["skipped"] = [*unusable, *manifest["skipped"]]
    work.finish(manifest)
    print(_report(manifest, out))
    print(
        f"took {time.monotonic() - begun:.0f} s; reads back whole: mtl-dist prepare --verify {out}"
    )
    if folder.is_relative_to(unpacked):
        print(f"the unpacked archives are no longer needed: rm -r {unpacked}")


def _survey(
    kind: str, folder: Path, listing: Listing, workers: Workers
) -> tuple[list[Piece], dict[str, int], list[dict]]:
    """Read all headers: (pieces, {path: bytes} of the files that can be used, what of the others to skip and why)."""
    paths = [str(row["path"]) for row in listing.rows]
    lots = [paths[i : i + HEADERS] for i in range(0, len(paths), HEADERS)]
    bar = tqdm(total=len(paths), desc="headers", unit="file", disable=None)
    pieces, sizes, unusable = [], {}, []
    found = []
    with bar:
        for lot in workers.in_order(measure, lots):
            found += lot
            bar.update(len(lot))
    for row, header in zip(listing.rows, found, strict=True):
        name = name_within(folder, Path(row["path"]))
        if isinstance(header, str):
            unusable.append({"file": name, "reason": header})
            continue
        frames, rate, sizes[str(row["path"])] = header
        pieces += cut(row, name, frames, rate, kind)
    for path in (path for paths in listing.missing.values() for path in paths):
        unusable.append({"file": name_within(folder, Path(path)), "reason": "is not there"})
    return pieces, sizes, sorted(unusable, key=lambda entry: entry["file"])


class Bad:
    """Counts what cannot be used; too much of it is an error."""

    def __init__(self, max_share: float, total: int, unusable: list[dict]):
        self.max_share, self.total, self.count = max_share, total, 0
        for entry in unusable:
            self.add(entry)

    def add(self, entry: dict) -> None:
        """Count a file. Raises ValueError once they are more than the allowed share."""
        log.warning("skipped: %s %s", entry["file"], entry["reason"])
        self.count += 1
        if self.count > self.max_share * self.total:
            raise ValueError(
                f"--max_bad_share: {self.count} of {self.total} clips cannot be used, such as {entry['file']} "
                f"({entry['reason']}); mend them, or allow a larger share"
            )


def _write(
    work: Work, shards: list[Shard], rows_per_group: int, workers: Workers, bad: Bad
) -> list[dict]:
    """Write the shards that are not there yet; return the records of all, in order."""
    records = [work.record(shard) for shard in shards]
    for entry in (entry for facts in records if facts for entry in facts["skipped"]):
        bad.add(entry)
    todo = [n for n, facts in enumerate(records) if facts is None]
    needed = sum(flac_bytes(shards[n].pieces) for n in todo)
    free = shutil.disk_usage(work.out).free
    if needed > free:
        log.warning("%s: about %s are needed and %s are free", work.out, _size(needed), _size(free))
    tasks = [(n, chunk) for n in todo for chunk in chunks(shards[n].pieces)]
    results = workers.in_order(encode_chunk, (chunk for _, chunk in tasks))
    done = sum(len(shard.pieces) for shard, facts in zip(shards, records, strict=True) if facts)
    bar = tqdm(
        total=sum(len(shard.pieces) for shard in shards), initial=done, unit="clip", disable=None
    )
    pairs = zip((n for n, _ in tasks), results)
    with bar:
        for n, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
            tally = {"seconds": 0.0, "clipped_samples": 0, "skipped": []}
            encoded = (item for _, items in group for item in items)
            rows = _rows(encoded, tally, bad, bar)
            facts = write_shard(work.out / shards[n].file, rows, rows_per_group)
            records[n] = facts | tally
            work.note(shards[n], records[n])
    return records


def _rows(encoded: Iterable[Encoded], tally: dict, bad: Bad, bar: tqdm) -> Iterator[dict]:
    """Yield the rows among the pieces, and tally them and the others."""
    for item in encoded:
        bar.update()
        tally["clipped_samples"] += item.clipped
        if item.row is None:
            tally["skipped"].append({"file": item.name, "reason": item.reason})
            bad.add(tally["skipped"][-1])
        else:
            tally["seconds"] += item.row["seconds"]
            yield item.row


def _size(count: float) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _report(manifest: dict, out: Path) -> str:
    lines = [f"{out}: {manifest['kind']}"]
    for split, part in manifest["splits"].items():
        groups = sum(shard["row_groups"] for shard in part["shards"])
        lines.append(
            f"  {split}: {part['clips']} clips, {part['hours']:.2f} h, {len(part['shards'])} shards of {groups} row groups"
        )
    lines.append(
        f"  in {_size(manifest['bytes_in'])}, out {_size(manifest['bytes_out'])}; {len(manifest['skipped'])} skipped; "
        f"{manifest['clipped_samples']} samples clipped"
    )
    return "\n".join(lines)


def verify(out: Path, count: int) -> bool:
    """Read every shard of a prepared corpus back, decode all of it, print what is wrong; return whether nothing is."""
    manifest = read_manifest(out.expanduser())
    parts = manifest["splits"].items()
    tasks = [(out / s["file"], split, s) for split, part in parts for s in part["shards"]]
    found: dict[str, list[tuple[int, float]]] = {split: [] for split in manifest["splits"]}
    wrong, first = [], {}
    with Workers(count) as workers, tqdm(total=len(tasks), unit="shard", disable=None) as bar:
        results = workers.in_order(_check_task, tasks)
        for (path, split, _), (problems, ids, seconds) in zip(tasks, results, strict=True):
            wrong += problems
            for row, clip in enumerate(ids):
                if first.setdefault(clip, path.name) is not path.name:
                    wrong.append(f"{path.name}, row {row} ({clip}): is in {first[clip]} too")
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
    print("\n".join(wrong) if wrong else f"{_report(manifest, out)}\n  everything reads back whole")
    return not wrong


def _check_task(task: tuple[Path, str, dict]) -> tuple[list[str], list[str], float]:
    return check_shard(*task)
