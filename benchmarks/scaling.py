"""Weak scaling on CPU ranks: the same clips a rank and round on 1, 2 and 4 ranks, one thread each, through the launcher.

    python benchmarks/scaling.py build/scaling --turns 3

For each turn: one process alone; as many processes at once that do not know each other (what the machine itself costs:
cores, memory bandwidth); and one world of so many ranks. Efficiency is the time of a round of one process over that of the
world. A model of a round, work + stragglers + reduction, is checked on these and carried on to 1,024 ranks for a network
that is stated (`--cluster`), with the paper's gradient (`--megabytes 2.2`) and the time of a round there (`--round_ms`).
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
CLIPS = 8
"""Clips of every task in a round on every rank."""


def command(run: Path, ranks: int, rounds: int, recipe: str) -> list[str]:
    """Return the launcher's command for a world of so many ranks."""
    file = "one_cpu" if ranks == 1 else "two_cpu_processes"
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / f"launch_configs/{file}.yaml")]
    launcher += ["--num_processes", str(ranks), str(ROOT / "mtl_dist/train.py")]
    words = ["--config", recipe, "--train.global_batch", str(CLIPS * ranks), "--data.workers", "0"]
    words += ["--train.rounds", str(rounds), "--train.log_every", str(rounds // 2)]
    words += ["--train.validate_every", str(rounds), "--evaluation.max_clips", "2"]
    return [*launcher, *words, "--evaluation.examples", "0", "--run.dir", str(run)]


def worlds(out: Path, turn: str, many: int, ranks: int, rounds: int, recipe: str) -> list[dict]:
    """Run `many` worlds of `ranks` at once; return the last entry of each one's rounds."""
    runs = [out / f"{turn}_{many}x{ranks}_{n}" for n in range(many)]
    started = [
        subprocess.Popen(
            command(run, ranks, rounds, recipe),
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for run in runs
    ]
    assert [process.wait() for process in started] == [0] * many
    entries = [map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) for run in runs]
    return [[e for e in lines if e["kind"] == "round"][-1] for lines in entries]


def ring(ranks: int, megabytes: float, latency_ms: float, gigabytes_per_second: float) -> float:
    """Milliseconds of a ring all-reduce: 2 (n - 1) latencies, and 2 (n - 1) / n of the bytes through each link."""
    steps = 2 * (ranks - 1)
    return steps * latency_ms + steps / ranks * megabytes / gigabytes_per_second


def predicted(ranks: int, alone_ms: float, options: argparse.Namespace) -> float:
    """Milliseconds of a round: work, the slowest of n normal ranks (spread * sqrt(2 ln n)), and its collectives.

    They are one all-reduce of the gradient, and two of a few numbers (counts; losses and stop requests) that pay latency.
    """
    slowest = options.spread_ms * math.sqrt(2 * math.log(ranks)) if ranks > 1 else 0.0
    network = (options.latency_ms, options.gigabytes_per_second)
    return (
        alone_ms + slowest + ring(ranks, options.megabytes, *network) + 2 * ring(ranks, 0, *network)
    )


def main() -> None:
    """Measure in turns, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    network = parser.add_argument_group(
        "model", "of the machine measured; mtl-dist doctor tells them"
    )
    network.add_argument("--latency_ms", type=float, default=0.1, help="of one hop")
    network.add_argument("--gigabytes_per_second", type=float, default=1.0)
    network.add_argument("--megabytes", type=float, default=0.137, help="the demo's gradient")
    network.add_argument("--spread_ms", type=float, default=5.0, help="of a rank's rounds")
    network.add_argument("--round_ms", type=float, default=120.0, help="of a cluster's rank")
    network.add_argument(
        "--cluster", type=float, nargs=2, default=(0.005, 10.0), help="a hop's latency in ms, GB/s"
    )
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    kinds = [(1, 1), *[k for n in options.ranks for k in ((n, 1), (1, n))]]
    seconds: dict[tuple[int, int], list[float]] = {kind: [] for kind in kinds}
    for turn in range(options.turns):
        for many, ranks in kinds:
            found = worlds(options.out, str(turn), many, ranks, options.rounds, options.recipe)
            seconds[many, ranks].append(statistics.mean(e["time/seconds_per_round"] for e in found))
    print("| processes | ms a round, each turn | one process / this |\n|---|---|---|")
    for (many, ranks), values in seconds.items():
        what = f"one world of {ranks}" if many == 1 else f"{many} worlds of 1, at once"
        ratios = [one / this for one, this in zip(seconds[1, 1], values, strict=True)]
        shown = ", ".join(f"{1e3 * value:.0f}" for value in values)
        print(f"| {what} | {shown} | {statistics.median(ratios):.3f} |")
    for ranks in options.ranks:
        beside, world = (1e3 * statistics.median(seconds[k]) for k in ((ranks, 1), (1, ranks)))
        model = predicted(ranks, beside, options)
        print(f"{ranks} ranks: {world:.0f} ms measured, {model:.0f} ms by the model")
    print("| ranks | ms a round by the model | efficiency |\n|---|---|---|")
    for ranks in (8, 64, 512, 1024):
        alone = options.round_ms
        options.latency_ms, options.gigabytes_per_second = options.cluster
        model = predicted(ranks, alone, options)
        print(f"| {ranks} | {model:.1f} | {alone / model:.3f} |")


if __name__ == "__main__":
    main()
