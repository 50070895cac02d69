"""Weak scaling on CPU ranks: the same clips a rank and round on 1, 2 and 4 ranks, one thread each, through the launcher.

    python benchmarks/scaling.py build/scaling --ranks 2 4 --turns 10

All worlds run side by side, but never at once: they are frozen with SIGSTOP and take turns of a few rounds. So a machine
whose speed changes from minute to minute does not come between what is compared. In a turn: one process alone; n that do not
know each other, at once (what the machine itself costs: cores, memory bandwidth); one world of n. Efficiency is the time of
a round of one process over that of the world, in the same turn. The gap is told from the ranks' own files: waiting for the
slowest rank, then the collectives. A model of a round is checked on these and carried on to 1,024 ranks of a stated network.
"""

import argparse
import collections
import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parent.parent
CLIPS = 8
"""Clips of every task in a round on every rank."""


class World:
    """A run of so many ranks, launched and then frozen unless it is its turn."""

    def __init__(self, run: Path, ranks: int, recipe: str):
        self.run, self.ranks, self.read = run, ranks, 0
        file = "one_cpu" if ranks == 1 else "two_cpu_processes"
        words = [sys.executable, "-m", "accelerate.commands.launch"]
        words += ["--config_file", str(ROOT / f"launch_configs/{file}.yaml")]
        words += ["--num_processes", str(ranks), str(ROOT / "mtl_dist/train.py")]
        words += ["--config", recipe, "--train.global_batch", str(CLIPS * ranks)]
        words += ["--data.workers", "0", "--train.rounds", "1000000", "--train.log_every", "1"]
        words += ["--train.validate_every", "1000000", "--run.dir", str(run)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        with open(f"{run}.log", "w") as log:
            self.launcher = subprocess.Popen(words, env=environment, stdout=log, stderr=log)
        self.wait(2)
        self.signal(signal.SIGSTOP)
        self.read = len(self.lines())

    def lines(self) -> list[dict]:
        """Return the rounds that rank 0 has told of."""
        path = self.run / "metrics.jsonl"
        text = path.read_text() if path.exists() else ""
        found = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
        return [entry for entry in found if entry["kind"] == "round"]

    def wait(self, rounds: int) -> None:
        """Wait for so many rounds since the last turn, without taking a core's time from them."""
        path = self.run / "metrics.jsonl"
        while not path.exists() or path.read_bytes().count(b"\n") < self.read + rounds:
            assert self.launcher.poll() is None, f"{self.run} has ended, see {self.run}.log"
            time.sleep(0.3)

    def signal(self, number: int) -> None:
        """Send a signal to all ranks at once."""
        if self.launcher.poll() is None:
            for rank in psutil.Process(self.launcher.pid).children():
                rank.send_signal(number)

    def take(self, rounds: int) -> list[int]:
        """Return the numbers of this turn's rounds; the first was cut by the turns of others."""
        found = [entry["round"] for entry in self.lines()[self.read :]]
        self.read += len(found)
        return found[1 : 1 + rounds]


def turn(worlds: list[World], rounds: int) -> list[list[int]]:
    """Let these worlds run at once; return each one's rounds."""
    for world in worlds:
        world.signal(signal.SIGCONT)
    for world in worlds:
        world.wait(rounds + 1)
    for world in worlds:
        world.signal(signal.SIGSTOP)
    time.sleep(0.2)
    return [world.take(rounds) for world in worlds]


def milliseconds(world: World, rounds: list[int]) -> list[float]:
    """Return the time of each of these rounds."""
    return [1e3 * e["time/seconds_per_round"] for e in world.lines() if e["round"] in rounds]


def gap(world: World, rounds: list[int]) -> tuple[float, float, float]:
    """Return ms a round: (a rank's own work, more of it on the slowest rank, collectives on the rank that waits least)."""
    ranks = []
    for rank in range(world.ranks):
        lines = (world.run / f"ranks/rank_{rank:05d}.jsonl").read_text().splitlines()
        ranks.append({line["round"]: line for line in map(json.loads, lines)})
    own, slowest, least = [], [], []
    for number in rounds:
        of_round = [rank[number] for rank in ranks]
        work = [line["time/data"] + line["time/forward_backward"] for line in of_round]
        own.append(statistics.mean(work))
        slowest.append(max(work) - statistics.mean(work))
        least.append(min(line["time/collective"] for line in of_round))
    own_ms, slowest_ms, least_ms = (1e3 * statistics.mean(v) for v in (own, slowest, least))
    return own_ms, slowest_ms, least_ms


def all_reduce(ranks: int, megabytes: float, latency_ms: float, gigabytes_per_second: float):
    """Milliseconds of a sum over ranks by the better of two ways, as NCCL chooses (gloo has the first only).

    A ring has 2 (n - 1) steps, each of a latency and 1/n of the bytes; a tree has 2 log2(n), and all bytes twice.
    """
    steps, transfer = 2 * (ranks - 1), megabytes / gigabytes_per_second
    ring = steps * latency_ms + steps / ranks * transfer
    return min(ring, 2 * math.ceil(math.log2(ranks)) * latency_ms + 2 * transfer)


def predicted(ranks: int, work_ms: float, spread_ms: float, megabytes: float, network) -> float:
    """Milliseconds of a round: work, more of it on the slowest rank, and the collectives.

    The slowest of n ranks whose times are normal around their mean with a deviation of `spread_ms` is expected at the
    quantile (n - 0.375) / (n + 0.25) (Blom 1958). Collectives are one all-reduce of the gradient, and two of a few numbers
    (counts; losses and stop requests) that pay latency.
    """
    quantile = statistics.NormalDist().inv_cdf((ranks - 0.375) / (ranks + 0.25))
    collectives = all_reduce(ranks, megabytes, *network) + 2 * all_reduce(ranks, 0, *network)
    return work_ms + spread_ms * max(quantile, 0.0) + collectives


def main() -> None:
    """Measure in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=6, help="of a turn")
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument(
        "--here",
        type=float,
        nargs=2,
        default=(0.43, 0.36),
        help="a hop's latency in ms, GB/s, by doctor",
    )
    parser.add_argument("--megabytes", type=float, default=0.137, help="the recipe's gradient")
    cluster = parser.add_argument_group("the cluster that the model is carried on to")
    cluster.add_argument("--cluster", type=float, nargs=2, default=(0.005, 10.0))
    cluster.add_argument(
        "--cluster_megabytes", type=float, default=2.2, help="the paper's gradient"
    )
    cluster.add_argument("--cluster_round_ms", type=float, default=120.0)
    cluster.add_argument(
        "--cluster_spread", type=float, default=0.02, help="of a rank's rounds, as a share"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    alone = [
        World(options.out / f"alone_{n}", 1, options.recipe) for n in range(max(options.ranks))
    ]
    worlds = {n: World(options.out / f"world_{n}", n, options.recipe) for n in options.ranks}
    try:
        found = measure(alone, worlds, options.turns, options.rounds)
    finally:
        for world in (*alone, *worlds.values()):
            world.signal(signal.SIGKILL)
    report(found, options)


def measure(alone: list[World], worlds: dict[int, World], turns: int, rounds: int) -> dict:
    """Return lists of a value each turn.

    {(how many worlds, of how many ranks): ms a round, ("spread", n): deviation of the rounds of n processes at once,
    ("gap", n): what a world's ranks say}.
    """
    found = collections.defaultdict(list)
    for _ in range(turns):
        for kind in [(1, 1), *[k for n in worlds for k in ((n, 1), (1, n))]]:
            many, ranks = kind
            together = alone[:many] if ranks == 1 else [worlds[ranks]]
            numbers = turn(together, rounds)
            times = [t for pair in zip(together, numbers, strict=True) for t in milliseconds(*pair)]
            found[kind].append(statistics.mean(times))
            if many > 1:
                found["spread", many].append(statistics.stdev(times))
            if ranks > 1:
                found["gap", ranks].append(gap(together[0], numbers[0]))
    return found


def report(found: dict, options: argparse.Namespace) -> None:
    """Print the tables."""
    one = found[1, 1]
    print(
        "| processes | median ms a round | one process / this: median, middle half |\n|---|---|---|"
    )
    for kind, times in found.items():
        if isinstance(kind[0], int):
            what = f"one world of {kind[1]}" if kind[0] == 1 else f"{kind[0]} worlds of 1, at once"
            ratios = [a / b for a, b in zip(one, times, strict=True)]
            low, middle, high = statistics.quantiles(ratios, n=4)
            shown = f"{middle:.3f}, {low:.3f} to {high:.3f}"
            print(f"| {what} | {statistics.median(times):.0f} | {shown} |")
    print(
        "\n| ranks | own work, ms | the slowest's more | collectives | measured | by the model |\n"
        + "|---" * 6
        + "|"
    )
    for n in options.ranks:
        own, slowest, least = map(statistics.median, zip(*found["gap", n], strict=True))
        beside, spread = statistics.median(found[n, 1]), statistics.median(found["spread", n])
        model = predicted(n, beside, spread, options.megabytes, options.here)
        measured = statistics.median(found[1, n])
        print(f"| {n} | {own:.0f} | {slowest:.1f} | {least:.1f} | {measured:.0f} | {model:.0f} |")
    print("\n| ranks | ms a round by the model | efficiency |\n|---|---|---|")
    work, megabytes = options.cluster_round_ms, options.cluster_megabytes
    for ranks in (8, 64, 512, 1024):
        spread = options.cluster_spread * work
        model = predicted(ranks, work, spread, megabytes, options.cluster)
        print(f"| {ranks} | {model:.1f} | {work / model:.3f} |")


if __name__ == "__main__":
    main()
