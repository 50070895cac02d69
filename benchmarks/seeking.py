"""What it costs to start, at round 0 and in the middle, on one rank and as one of 1,024.

    OMP_NUM_THREADS=1 python benchmarks/seeking.py build/seeking

Two corpora of stand-ins, a few milliseconds of FLAC each, 0.4 GB in all: as many rows as LibriSpeech has on the Hub in its
`other` training split, 148,688 in 64 files with row groups of 100; and a million as `mtl-dist prepare` lays them out, 384
rows a file and row groups of 8. Times are therefore those of footers, planning and requests, not of audio. Prints the
tables of README.md; ends with an error where a law does not hold: a start reads a block a lane, or its next too; the lanes
of 1,024 ranks share no block and leave none out.
"""

import argparse
import io
import itertools
import pickle
import statistics
import time
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import soundfile

from mtl_dist.config import load_config
from mtl_dist.data.batches import Positions
from mtl_dist.data.lanes import Blocks
from mtl_dist.data.loader import ClipStream
from mtl_dist.data.streams import StreamFiles
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.runtime import World

LAYOUTS = {"hub": (148_688, 2_324, 100), "prepared": (1_000_000, 384, 8)}
"""{layout: (rows, rows a file, rows a row group)}"""
FAR_EPOCH, BATCH, RANKS, TASK = 1_000, 48, 1_024, "next_step"


def write_corpus(root: Path, rows: int, per_file: int, per_group: int) -> None:
    """Write a layout's files with the columns of openslr/librispeech_asr."""
    draw, sounds = np.random.default_rng(0), []
    for _ in range(64):
        buffer = io.BytesIO()
        soundfile.write(buffer, draw.uniform(-0.5, 0.5, 80), 16_000, format="FLAC")
        sounds.append(buffer.getvalue())
    root.mkdir(parents=True)
    for file, first in enumerate(range(0, rows, per_file)):
        names = [f"{n % 1166}-{n:07d}" for n in range(first, min(first + per_file, rows))]
        audio = [{"bytes": sounds[n % 64], "path": f"{name}.flac"} for n, name in enumerate(names)]
        speakers = [int(name.split("-")[0]) for name in names]
        table = pa.table({"id": names, "audio": audio, "speaker_id": speakers})
        path = root / f"train-{file:05d}.parquet"
        pq.write_table(table, path, row_group_size=per_group)


class Watch:
    """Counts, while it is entered, what is read: blocks, their rows, bytes by the kernel's count; and seconds."""

    def __enter__(self) -> "Watch":
        self.stack, read = ExitStack(), StreamFiles.read
        self.blocks = self.rows = 0

        def noted(files: StreamFiles, file: int, part: int):
            self.blocks += 1
            for table in read(files, file, part):
                self.rows += len(table)
                yield table

        self.stack.enter_context(patch.object(StreamFiles, "read", noted))
        self.bytes, self.began = psutil.Process().io_counters().read_chars, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.bytes = psutil.Process().io_counters().read_chars - self.bytes
        self.stack.close()


def words(root: Path, ranks: int) -> list[str]:
    """Return the words of a run of one task on so many ranks, with a clip a lane and round."""
    source = f"[{{path: {root}/*.parquet, columns: {{speaker: speaker_id}}}}]"
    batch = BATCH if ranks <= BATCH else RANKS
    return [
        *("--corpora.librispeech.sources", source, "--train.global_batch", str(batch)),
        *("--corpora.librispeech.heldout_share", "0.02"),
        *("--train.tasks", f"[{TASK}]", "--train.main_task", TASK),
        *(f"--tasks.{TASK}.sources", "[librispeech]", "--model.blocks", "1"),
    ]


def far_positions(stream: ClipStream) -> Positions:
    """Return where lanes may be in the middle of an epoch: in the middle of a block of theirs."""
    found = {}
    for number in range(stream.lanes):
        own = stream.lane(number, 0, {}).own(FAR_EPOCH)
        found[number] = (FAR_EPOCH, len(own) // 2, 40)
    return {stream.name: found}


def first_round(experiment: Experiment, world: World, positions: Positions) -> tuple[Watch, int]:
    """Return what the first round of a rank took, and how many lanes it has; stop where that broke the law."""
    stream = experiment.rounds(world, 1, 0, positions)
    lanes = len(stream.own_lanes(0, 1))
    with Watch() as watch:
        begun = next(stream.rounds(0, pin_memory=False))
    assert not begun.bad, begun.bad[:3]
    assert begun.clips == stream.global_batch // world.size
    assert watch.blocks <= 2 * lanes, f"{watch.blocks} blocks were read in {lanes} lanes"
    return watch, lanes


def start_up(layout: str, root: Path) -> Experiment:
    """Print how long rank 0 takes to its first batch, and what it sends to the others."""
    with Watch() as opening:
        experiment = build_experiment(load_config(words(root, 1)))
    first, _ = first_round(experiment, World(), {})
    (part,) = experiment.corpora["librispeech"].parts["train"]
    sent = len(pickle.dumps(experiment.corpora)) / 1e6
    about = "" if part.exact else "about "
    print(
        f"| {layout}: {LAYOUTS[layout][0]:,} rows | {len(part.blocks):,} | {about}{part.clips:,} "
        f"| {opening.seconds:.2f} | {opening.bytes / 1e6:.1f} | {first.seconds:.2f} "
        f"| {opening.seconds + first.seconds:.2f} | {sent:.2f} |"
    )
    return experiment


def seeking(layout: str, root: Path, turns: int) -> None:
    """Print what the first round takes from the beginning and from the middle of a far epoch, in turns."""
    worlds = {
        "1 rank": World(),
        "rank 3 of 8": World(3, 8),
        f"rank 3 of {RANKS:,}": World(3, RANKS),
    }
    for what, world in worlds.items():
        experiment = build_experiment(load_config(words(root, world.size)))
        (stream,) = experiment.streams()
        places = {"0": {}, f"the middle of epoch {FAR_EPOCH:,}": far_positions(stream)}
        found: dict[str, list[Watch]] = {place: [] for place in places}
        first_round(experiment, world, {})  # imports
        for _, place in itertools.product(range(turns), places):
            watch, lanes = first_round(experiment, world, places[place])
            found[place].append(watch)
        for place, runs in found.items():
            figures = [(w.blocks, w.rows, w.bytes / 1e6, w.seconds) for w in runs]
            blocks, rows, size, seconds = map(statistics.median, zip(*figures, strict=True))
            print(
                f"| {layout}, {what} | {place} | {lanes} | {blocks:.0f} | {rows:.0f} | {size:.2f} | {seconds:.3f} |"
            )


def disjoint(layout: str, experiment: Experiment) -> None:
    """Print what the lanes of 1,024 ranks deal of an epoch; stop where a block comes twice or never."""
    parts = experiment.corpora["librispeech"].parts["train"]
    stream = ClipStream([TASK], ["librispeech"], parts, {}, lanes=RANKS, weights={})
    began = time.perf_counter()
    own = [stream.lane(number, 0, {}).own(FAR_EPOCH) for number in range(RANKS)]
    each = 1e6 * (time.perf_counter() - began) / RANKS
    counts = np.bincount(np.concatenate(own), minlength=len(Blocks(parts)))
    assert (counts == 1).all(), "the lanes' blocks are not disjoint and complete"
    sizes = f"{min(map(len, own))} to {max(map(len, own))}"
    print(f"| {layout} | {RANKS:,} | all {len(counts):,} | {sizes} | {each:.0f} |")


def heading(columns: str) -> None:
    """Begin a table."""
    names = columns.split(", ")
    print(f"\n| {' | '.join(names)} |\n{'|---' * len(names)}|")


def main() -> None:
    """Write the corpora that are not there, and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="folder that gets 0.4 GB")
    parser.add_argument("--turns", type=int, default=5)
    options = parser.parse_args()
    roots = {layout: options.work.resolve() / layout for layout in LAYOUTS}
    for layout, root in roots.items():
        if not root.is_dir():
            write_corpus(root, *LAYOUTS[layout])
    heading(
        "start of rank 0, blocks, training clips, opening s, MB read, first round s, both s, MB sent"
    )
    experiments = {layout: start_up(layout, root) for layout, root in roots.items()}
    heading("rank, from, lanes, blocks, rows, MB, first round s")
    for layout, root in roots.items():
        seeking(layout, root, options.turns)
    heading("an epoch, lanes, blocks that come once, blocks of a lane, us a lane")
    for layout, experiment in experiments.items():
        disjoint(layout, experiment)


if __name__ == "__main__":
    main()
