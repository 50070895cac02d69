"""What it costs to begin in the middle, and what 1,024 ranks plan: a corpus as large as LibriSpeech train-other-500.

    OMP_NUM_THREADS=1 python benchmarks/seeking.py build/seeking --data ../shared/data

Its 148,688 rows are stand-ins, 0.3 s of real utterances, 0.8 GB in all; its shards and row groups are as many as `mtl-dist
prepare` makes of the real one. What is read is counted in the calls to the kernel (os.pread), and which rows those
bytes hold by the files' own footers. Prints the tables of README.md; ends with an error where a law does not hold.
"""

import argparse
import dataclasses
import io
import itertools
import json
import os
import pickle
import time
import tracemalloc
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

import numpy as np
import psutil
import pyarrow.parquet as pq
import soundfile

from mtl_dist.config import load_config
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.preparing.shards import write_shard
from mtl_dist.runtime import World
from mtl_dist.streams.order import Order
from mtl_dist.streams.rounds import RoundStream, endless_positions
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.table import Table

SPLIT = "train-other-500"
ROWS, SHARDS, ROWS_PER_GROUP, SPEAKERS = 148_688, 124, 16, 1_166
"""Of train-other-500: 31.81 GB are 124 shards of 256 MB."""
SECONDS = 0.3
"""Of each stand-in."""
FAR, BATCH, RANKS, TASK = 1_000_000, 48, 1_024, "next_step"


def write_corpus(data: Path, root: Path) -> None:
    """Write the shards and the manifest as `mtl-dist prepare librispeech` does."""
    sounds = []
    for path in sorted((data / "LibriSpeech").rglob("*.flac"))[:64]:
        wave, rate = soundfile.read(path, dtype="int16")
        buffer = io.BytesIO()
        middle = len(wave) // 2
        soundfile.write(buffer, wave[middle : middle + int(SECONDS * rate)], rate, format="FLAC")
        sounds.append(buffer.getvalue())
    root.mkdir(parents=True, exist_ok=True)
    ends = np.arange(1, SHARDS) * ROWS // SHARDS // ROWS_PER_GROUP * ROWS_PER_GROUP
    shards = []
    for shard, (first, end) in enumerate(itertools.pairwise([0, *ends.tolist(), ROWS])):
        rows = (row(number, sounds) for number in range(first, end))
        path = root / f"{SPLIT}-{shard:05d}-of-{SHARDS:05d}.parquet"
        shards.append(write_shard(path, rows, ROWS_PER_GROUP))
    about = {"clips": ROWS, "hours": ROWS * SECONDS / 3600, "shards": shards}
    manifest = {"format": 1, "kind": "librispeech", "classes": [], "splits": {SPLIT: about}}
    (root / "manifest.json").write_text(json.dumps(manifest))


def row(number: int, sounds: list[bytes]) -> dict:
    """Return a row of the prepared corpus."""
    speaker = number * 7919 % SPEAKERS
    name = f"{speaker}-{1000 + speaker}-{number:06d}"
    audio = {"bytes": sounds[number % len(sounds)], "path": f"{name}.flac"}
    told = {"label": None, "speaker": str(speaker), "split": SPLIT, "seconds": SECONDS}
    return {"id": f"{SPLIT}/{name}", "audio": audio} | told


class Watch:
    """Counts what is read from files and times what is planned while it is entered."""

    def __enter__(self) -> "Watch":
        self.stack, self.planning, pread = ExitStack(), 0.0, os.pread
        self.requests: list[tuple[str, int, int]] = []  # (file, offset, bytes received)

        def noted(handle: int, count: int, offset: int) -> bytes:
            data = pread(handle, count, offset)
            self.requests.append((os.readlink(f"/proc/self/fd/{handle}"), offset, len(data)))
            return data

        self.stack.enter_context(patch.object(os, "pread", noted))
        for owner, name in ((Order, "permutation"), (Table, "dealt"), (Table, "blocks")):
            self.stack.enter_context(patch.object(owner, name, self._timed(getattr(owner, name))))
        self.kernel, self.began = psutil.Process().io_counters().read_chars, time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self.seconds = time.perf_counter() - self.began
        self.kernel = psutil.Process().io_counters().read_chars - self.kernel
        self.stack.close()

    def _timed(self, action: Callable) -> Callable:
        def timed(*arguments):
            began = time.perf_counter()
            try:
                return action(*arguments)
            finally:
                self.planning += time.perf_counter() - began

        return timed

    def bytes(self) -> int:
        """Return how many bytes were received; `kernel` is what the process has read by the kernel's count."""
        return sum(count for _, _, count in self.requests)


def blocks_of(root: Path) -> dict[tuple[str, int], int]:
    """Return {(file, where the audio of a row group begins): its rows}, as the files' footers have it."""
    found = {}
    for path in sorted(root.glob("*.parquet")):
        meta = pq.read_metadata(path)
        leaf = next(i for i in range(meta.num_columns) if "bytes" in meta.schema.column(i).path)
        for number in range(meta.num_row_groups):
            group = meta.row_group(number)
            found[str(path), group.column(leaf).data_page_offset] = group.num_rows
    return found


def stream_of(experiment: Experiment, world: World, batch: int, first: int) -> RoundStream:
    """Return the rounds of a rank from round `first` on, with `batch` clips over all ranks."""
    train = dataclasses.replace(experiment.config.train, global_batch=batch)
    config = dataclasses.replace(experiment.config, train=train)
    return dataclasses.replace(experiment, config=config).rounds(
        world, 1, first, {TASK: first * batch}
    )


def first_round(stream: RoundStream, blocks: dict[tuple[str, int], int]) -> list[float]:
    """Return rows, blocks, MB, requests, seconds of planning and in all of the round that a start begins with."""
    with Watch() as watch:
        begun = next(stream.rounds(0, pin_memory=False))
    assert begun.number == stream.first_round
    assert not begun.bad, begun.bad
    read = [(file, offset) for file, offset, _ in watch.requests]
    received = watch.bytes()
    assert received <= watch.kernel <= received + 65_536, "more was read than was noted"
    rows = sum(blocks[block] for block in read)
    return [rows, len(set(read)), received / 1e6, len(read), watch.planning, watch.seconds]


def start_up(root: Path) -> Experiment:
    """Print how long listing takes and what is sent to the other ranks; return the experiment of one task."""
    with Watch() as footers:
        shards = Shards.open("corpora.librispeech", str(root))
    with Watch() as listing:
        assert shards.listing().num_rows == ROWS
    words = ["--corpora.librispeech.root", str(root), "--corpora.librispeech.splits", f"[{SPLIT}]"]
    words += ["--corpora.librispeech.heldout_share", "1e-9"]  # one speaker for each split
    words += ["--train.tasks", f"[{TASK}]", "--train.main_task", TASK]
    words += [f"--tasks.{TASK}.sources", "[librispeech]", "--train.global_batch", str(BATCH)]
    with Watch() as whole:
        experiment = build_experiment(load_config(words))
    print("| start | seconds | requests | MB read |\n|---|---|---|---|")
    for name, watch in (
        (f"footers of {SHARDS} files", footers),
        ("all columns but audio", listing),
        ("all that rank 0 does: both, splits, tables", whole),
    ):
        print(
            f"| {name} | {watch.seconds:.2f} | {len(watch.requests):,} | {watch.bytes() / 1e6:.1f} |"
        )
    sent, small = (len(pickle.dumps(what)) / 1e6 for what in (experiment.corpora, shards))
    print(f"\nSent to every other rank: {sent:.1f} MB, of which the footers are {small:.1f} MB.")
    print(f"{len(experiment.table(TASK)):,} of {ROWS:,} rows are in training.\n")
    return experiment


def seeking(experiment: Experiment, root: Path, turns: int) -> None:
    """Print what the first round after a start costs; stop where a lane read more than a block."""
    blocks = blocks_of(root)
    print("| | from round | rows | blocks | MB | requests | planning, s | first round after, s |")
    print("|---" * 8 + "|")
    for what, world, batch in (
        ("1 rank", World(), BATCH),
        ("rank 3 of 8", World(3, 8), BATCH),
        ("rank 3 of 1,024", World(3, RANKS), RANKS * BATCH),
    ):
        found: dict[int, list[list[float]]] = {0: [], FAR: []}
        next(stream_of(experiment, world, batch, FAR).rounds(0, pin_memory=False))  # imports
        for _ in range(turns):
            for first, runs in found.items():
                runs.append(first_round(stream_of(experiment, world, batch, first), blocks))
        lanes = batch // world.size
        for first, runs in found.items():
            rows, different, size, requests, planning, seconds = np.median(runs, axis=0)
            print(
                f"| {what} | {first:,} | {rows:.0f} | {different:.0f} | {size:.2f} | {requests:.0f} ",
                end="",
            )
            print(f"| {planning:.3f} | {seconds:.3f} |")
            most = max(max(run[3], run[0] / ROWS_PER_GROUP) for run in runs)
            assert most <= lanes, f"{what}: {most} blocks were read in {lanes} lanes"
        ratios = np.median(np.array(found[FAR]) / np.array(found[0]), axis=0)
        print(f"| {what} | {FAR:,} : 0 | {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |")
    print(
        "\nNo more than one block of rows a lane was read, in any turn; a replay of all rounds before would have read ",
        end="",
    )
    print(f"{FAR * BATCH:,} rows.\n")


def planning(experiment: Experiment) -> None:
    """Print what 1,024 ranks plan of the epoch that round 1,000,000 is in; stop where a row is left out or comes twice."""
    block = experiment.table(TASK).blocks()
    print(
        f"| {RANKS:,} ranks | order of an epoch, s | places of a rank, us | rows that come once | read more than once |"
    )
    print("|---" * 5 + "|")
    for batch in (RANKS, RANKS * BATCH):
        order = Order(block, batch, (0, TASK))
        epoch = FAR * batch // len(order)
        first, end = epoch * len(order), (epoch + 1) * len(order)
        began = time.perf_counter()
        rows = order.permutation(epoch)
        seconds = time.perf_counter() - began
        rounds = -(-end // batch) - first // batch
        heard, readers, places = np.zeros(len(order), int), [], 0.0
        for rank in range(RANKS):
            stream = stream_of(experiment, World(rank, RANKS), batch, first // batch)
            began = time.perf_counter()
            own = stream.own_places(0, 1)[TASK]
            places += time.perf_counter() - began
            endless = endless_positions(first // batch, own, range(batch))
            positions = np.fromiter(itertools.islice(endless, rounds * len(own)), int)
            mine = rows[positions[(positions >= first) & (positions < end)] - first]
            np.add.at(heard, mine, 1)
            readers.append(len(np.unique(block[mine])))
        assert (heard == 1).all(), "the ranks' clips are not disjoint and complete"
        more = sum(readers) / len(np.unique(block))
        print(
            f"| {batch // RANKS} clips each a round | {seconds:.3f} | {1e6 * places / RANKS:.0f} ",
            end="",
        )
        print(f"| {(heard == 1).sum():,} of {len(order):,} | blocks {more:.2f} times |")


def memory(experiment: Experiment, rounds: int) -> None:
    """Print what the order and a worker of the loader hold."""
    tracemalloc.start()
    order = Order(experiment.table(TASK).blocks(), BATCH, (0, TASK))
    tracemalloc.reset_peak()
    rows = order.permutation(1)
    peak = tracemalloc.get_traced_memory()[1] / 1e6
    tracemalloc.stop()
    held = (order.blocks.nbytes + rows.nbytes) / 1e6
    print(f"\nThe order holds {held:.1f} MB, and {peak:.1f} MB while an epoch's is worked out.\n")
    print(
        "| worker of the loader, after round | its own, MB | resident at most, MB |\n|---|---|---|"
    )
    stream = stream_of(experiment, World(), BATCH, FAR).rounds(1, pin_memory=False)
    for number in range(rounds):
        next(stream)
        if number in (0, rounds // 10, rounds - 1):
            (worker,) = psutil.Process().children()
            status = Path(f"/proc/{worker.pid}/status").read_text()
            most = int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6
            print(f"| {number + 1} | {worker.memory_full_info().uss / 1e6:.0f} | {most:.0f} |")
    stream.close()


def main() -> None:
    """Write the corpus if it is not there, and print all tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="folder that gets 0.8 GB")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--turns", type=int, default=7)
    parser.add_argument("--rounds", type=int, default=400, help="for the memory of a worker")
    options = parser.parse_args()
    root = options.work.resolve() / "LibriSpeech"
    if not (root / "manifest.json").exists():
        write_corpus(options.data, root)
    experiment = start_up(root)
    seeking(experiment, root, options.turns)
    planning(experiment)
    memory(experiment, options.rounds)


if __name__ == "__main__":
    main()
