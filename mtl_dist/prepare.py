"""`mtl-dist prepare`: a published corpus becomes Parquet shards of 16 kHz mono FLAC or WAV, shuffled, with a manifest.

    mtl-dist prepare fsdkaggle2018 data/FSDKaggle2018 prepared/fsdkaggle2018
    mtl-dist prepare --verify prepared/fsdkaggle2018

What is in a shard is a function of the list of files, the seed and the shard's number alone, whatever the number of
processes: so a run that was killed goes on with the next shard and ends with the same bytes. Tested by
tests/test_prepare.py.
"""

import argparse
import difflib
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

from mtl_dist.preparing.encoding import Encoded, Workers, chunks, encode_chunk
from mtl_dist.preparing.pieces import (
    BYTES_PER_SECOND,
    RATE,
    Shard,
    expected_bytes,
    list_digest,
    plan_shards,
)
from mtl_dist.preparing.shards import write_shard
from mtl_dist.preparing.sources import LAYOUTS, list_clips, look, survey, unpack_all
from mtl_dist.preparing.verifying import verify
from mtl_dist.preparing.work import Work, describe, make_manifest, size

log = logging.getLogger("mtl_dist")

ROWS_PER_GROUP = {"chime3": 1}
"""Where it is not as many as make about 4 MB: noise is drawn a piece at a time."""

ENCODING = {"chime3": "wav"}
"""Where it is not flac: a stretch of noise is drawn for every clip, and reading it should cost next to nothing."""


def add_prepare(commands) -> None:
    """Declare `mtl-dist prepare`."""
    command = commands.add_parser(
        "prepare",
        allow_abbrev=False,
        help="make shards of a published corpus, or verify them",
        description="Write a corpus as Parquet shards of 16 kHz mono audio, shuffled by the seed. Started again after it "
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
        help="rows of a row group, the least that is read at a time (default: 16, of wav 8; chime3: 1)",
    )
    command.add_argument(
        "--encoding",
        choices=tuple(BYTES_PER_SECOND),
        help="flac, or wav: 1.8 times the bytes, but nothing to decode (default: flac; chime3: wav)",
    )
    command.add_argument(
        "--workers",
        type=int,
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
    if options.workers is None:
        options.workers = len(os.sched_getaffinity(0))
    if options.workers < 1:
        raise ValueError(f"--workers: {options.workers} is not allowed; use 1 or more")
    try:
        if options.verify is None:
            _check(options)
            prepare(options)
        elif options.kind is not None:
            raise ValueError("--verify OUT stands alone, without KIND, FROM and OUT")
        elif not verify(options.verify.expanduser(), options.workers):
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
        near = difflib.get_close_matches(options.kind, LAYOUTS, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(
            f"KIND: {options.kind!r} is not known{hint} (allowed: {', '.join(LAYOUTS)})"
        )
    for field in ("manifest", "labelled"):
        if options.kind != "folder" and getattr(options, field):
            raise ValueError(f"--{field}: is for the kind folder only, not for {options.kind}")
    if options.encoding is None:
        options.encoding = ENCODING.get(options.kind, "flac")
    if options.rows_per_group is None:
        usual = {"flac": 16, "wav": 8}[options.encoding]
        options.rows_per_group = ROWS_PER_GROUP.get(options.kind, usual)
    for field in ("rows_per_group", "shard_mb"):
        if not getattr(options, field) > 0:
            value = getattr(options, field)
            raise ValueError(f"--{field}: {value} is not allowed; use more than 0")
    if not 0 <= options.max_bad_share <= 1:
        raise ValueError(f"--max_bad_share: {options.max_bad_share} is not allowed; use 0 to 1")


def prepare(options: argparse.Namespace) -> None:
    """Write OUT, or what is missing of it, and print the counts. Raises ValueError or OSError."""
    begun = time.monotonic()
    kind, out = options.kind, options.out.expanduser()
    folder, archives = look(kind, options.source.expanduser())
    fields = ("kind", "seed", "rows_per_group", "shard_mb", "encoding")
    work = Work(out, {field: getattr(options, field) for field in fields} | {"rate": RATE})
    unpacked = out / "unpacked"
    if folder is None:
        if work.manifest and not unpacked.exists():
            print(
                describe(work.manifest, out),
                "(finished before; the archives are not unpacked again)",
            )
            return work.tidy()
        folder = unpack_all(kind, archives, unpacked)
    elif archives:
        log.warning("%s is read as it is; archives such as %s are left alone", folder, archives[0])
    listing = list_clips(kind, folder, options.manifest, options.labelled)
    with Workers(options.workers) as workers:
        pieces, sizes, unusable = survey(kind, options.encoding, folder, listing, workers)
        work.begin(list_digest(pieces, sizes, unusable))
        if work.manifest:
            print(describe(work.manifest, out), "(finished before)")
            return work.tidy()
        bad = Bad(options.max_bad_share, len(pieces) + len(unusable), unusable)
        shards = plan_shards(pieces, options.seed, options.rows_per_group, options.shard_mb)
        records = _write(work, shards, options.rows_per_group, workers, bad)
    manifest = make_manifest(
        kind,
        listing.classes,
        options.seed,
        list(zip(shards, records, strict=True)),
        sum(sizes.values()),
    )
    manifest["skipped"] = [*unusable, *manifest["skipped"]]
    work.finish(manifest)
    print(describe(manifest, out))
    print(
        f"took {time.monotonic() - begun:.0f} s; reads back whole: mtl-dist prepare --verify {out}"
    )
    if folder.is_relative_to(unpacked):
        print(f"the unpacked archives are no longer needed: rm -r {unpacked}")


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
    needed = sum(expected_bytes(shards[n].pieces) for n in todo)
    free = shutil.disk_usage(work.out).free
    if needed > free:
        log.warning("%s: about %s are needed and %s are free", work.out, size(needed), size(free))
    tasks = [(n, chunk) for n in todo for chunk in chunks(shards[n].pieces)]
    results = workers.in_order(encode_chunk, (chunk for _, chunk in tasks))
    done = sum(len(shard.pieces) for shard, facts in zip(shards, records, strict=True) if facts)
    bar = tqdm(
        total=sum(len(shard.pieces) for shard in shards), initial=done, unit="clip", disable=None
    )
    pairs = zip((n for n, _ in tasks), results, strict=True)
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
