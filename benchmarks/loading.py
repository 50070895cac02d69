"""Clips a second from files to collated batches of 2 s with noise mixed and 4 kHz inputs made, beside other loaders.

    python benchmarks/loading.py build/loading --data build/sample

Runs in the environment of rivals/requirements.txt (see README.md). Every contender makes the same batches (checked on each
one's first) from the same utterances, in a process of its own on the given cores, and they take turns: all others are frozen
with SIGSTOP, so that the machine's speed, which drifts, meets all alike, and ratios are of the same turn. Batches that
workers had ready before a turn do not count. Prints the tables of README.md.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import psutil

CONTENDERS = [
    "ours_prepared_wav",
    "ours_prepared",
    "ours_folders",
    "parquet_torchcodec",
    "whole_files",
    "lhotse_cuts",
    "webdataset_tars",
]
OURS = "ours_folders", "ours_prepared", "ours_prepared_wav"
COPIES = 36
"""251 utterances so many times, under other names: 9,036 files."""
READY = 5
"""Batches that two workers may have ready before a turn, and one more that was begun."""
H100 = 1_500
"""Two-second crops a second that one H100 is taken to eat."""


def write_corpora(data: Path, work: Path) -> None:
    """Write utterances and backgrounds under `work` as they are published (WAV backgrounds)."""
    for source in sorted((data / "LibriSpeech").rglob("*.flac")):
        speaker, chapter, number = source.stem.split("-")
        folder = work / "LibriSpeech/train-clean-100" / speaker / chapter
        folder.mkdir(parents=True)
        for copy in range(COPIES):
            shutil.copyfile(
                source, folder / f"{speaker}-{chapter}-{int(number) + 1000 * copy:04d}.flac"
            )
    shutil.copytree(data / "CHiME3", work / "CHiME3")


def serve(name: str, work: Path, workers: int) -> None:
    """Be a contender: tell of the first batch, then take a turn for every number of seconds that is asked for."""
    from rivals import common

    batches = importlib.import_module(f"rivals.{name}").batches(work, workers)
    common.check(next(batches))
    print(json.dumps("first batch"), flush=True)
    for line in sys.stdin:
        for _ in range(READY if workers else 0):
            next(batches)
        clips, began, cpu = 0, time.perf_counter(), cpu_seconds()
        while time.perf_counter() < began + float(line):
            clips += len(next(batches)[0])
        seconds, cpu = time.perf_counter() - began, cpu_seconds() - cpu
        print(json.dumps((clips / seconds, 1e3 * cpu / clips)), flush=True)


def cpu_seconds() -> float:
    """Return the processor time of this process and its workers."""
    main = psutil.Process()
    times = [process.cpu_times() for process in (main, *main.children(recursive=True))]
    return sum(t.user + t.system for t in times)


class Contender:
    """A process that serves batches on some cores, frozen unless it is its turn."""

    def __init__(self, stack: ExitStack, name: str, work: Path, cores: str, workers: int):
        self.name, self.workers, self.megabytes, self.cpu = name, workers, 0.0, []
        words = ["taskset", "-c", cores, sys.executable, __file__, str(work)]
        began = time.perf_counter()
        with (work / f"{name}.log").open("a") as log:
            self.process = subprocess.Popen(
                [*words, "--serve", name, "--workers", str(workers)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                start_new_session=True,
            )
        stack.callback(self.end)
        self.answer()
        self.first_seconds = time.perf_counter() - began
        os.killpg(self.process.pid, signal.SIGSTOP)

    def answer(self):
        """Wait for the process' next line."""
        line = self.process.stdout.readline()
        if not line:
            sys.exit(f"{self.name} has ended, see its log in the work folder")
        return json.loads(line)

    def turn(self, seconds: float) -> float:
        """Let it run; return its clips a second."""
        os.killpg(self.process.pid, signal.SIGCONT)
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        rate, cpu = self.answer()
        self.cpu.append(cpu)
        os.killpg(self.process.pid, signal.SIGSTOP)
        self.megabytes = max(self.megabytes, *map(peak_megabytes, self.loading()))
        return rate

    def loading(self) -> list[psutil.Process]:
        """Return the processes that load: the workers, or the process itself."""
        main = psutil.Process(self.process.pid)
        children = [c for c in main.children(recursive=True) if c.num_threads()]
        return children if self.workers else [main]

    def end(self) -> None:
        """Kill it with its workers, unless that is done."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def peak_megabytes(process: psutil.Process) -> float:
    """Return the largest resident size that Linux saw of a process, in MiB."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


def best_of(contenders: list[Contender], seconds: float) -> Contender:
    """Keep the fastest and end the others."""
    if len(contenders) > 1:
        contenders.sort(key=lambda contender: contender.turn(seconds))
    for contender in contenders[:-1]:
        contender.end()
    return contenders[-1]


def measure(options: argparse.Namespace, names: list[str], cores: str) -> list[tuple]:
    """Return [(contender, [clips a second of each turn])] on these cores."""
    many = len(cores.split(","))
    choices = [0, 1] if many == 1 else [many]
    found = []
    with ExitStack() as stack:
        for name in names:
            tried = [Contender(stack, name, options.work, cores, workers) for workers in choices]
            found.append((best_of(tried, options.seconds), []))
        for _ in range(options.turns):
            for contender, rates in found:
                rates.append(contender.turn(options.seconds))
    return found


def report(found: list[tuple], cores: int) -> None:
    """Print one table: clips a second, ratios of the same turn, the first batch, memory."""
    print(f"\n{cores} core{'s' * (cores > 1)}\n")
    best = max(
        (rates for c, rates in found if c.name not in OURS), key=statistics.median, default=None
    )
    print("| loader | workers | clips/s: median, lowest to highest | over the best other |", end="")
    print(" CPU ms a clip | first batch, s | peak memory of a worker, MiB |\n" + "|---" * 7 + "|")
    for contender, rates in found:
        ratio = ""
        if best:
            ratios = [a / b for a, b in zip(rates, best, strict=True)]
            ratio = f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}"
        shown = f"{statistics.median(rates):.0f}, {min(rates):.0f} to {max(rates):.0f}"
        name = importlib.import_module(f"rivals.{contender.name}").NAME
        print(f"| {name} | {contender.workers} | {shown} | {ratio} ", end="")
        print(f"| {statistics.median(contender.cpu):.2f} ", end="")
        print(f"| {contender.first_seconds:.1f} | {contender.megabytes:.0f} |")
    for contender, rates in found:
        if contender.name in OURS and cores == 1:
            every = 16 * statistics.median(rates)
            print(f"\nOne H100 eats {H100} two-second crops a second; 16 cores deliver ", end="")
            print(f"{every:.0f} by {contender.name}: {every / H100:.1f} of an H100.")


def main() -> None:
    """Write what is missing, measure in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("work", type=Path, help="folder that gets 0.5 GB for every kind of file")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("build/sample"),
        help="with LibriSpeech and CHiME3 as published",
    )
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--cores", nargs="+", default=["0", "0,1"])
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=2.0, help="of a turn")
    parser.add_argument("--serve", choices=CONTENDERS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.work = options.work.resolve()
    if options.serve:
        serve(options.serve, options.work, options.workers)
        return
    for name in ["corpora", *options.only]:
        written = options.work / f"{name}.written"
        if not written.exists():
            options.work.mkdir(parents=True, exist_ok=True)
            if name == "corpora":
                write_corpora(options.data, options.work)
            else:
                importlib.import_module(f"rivals.{name}").write(options.work)
            written.touch()
    for cores in options.cores:
        report(measure(options, options.only, cores), len(cores.split(",")))


if __name__ == "__main__":
    main()
