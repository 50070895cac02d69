"""Whole rounds a second of the paper's recipe, and where a round's time goes, by kernel: through the launcher, in turns.

    python benchmarks/rounds.py build/rounds                               on a GPU: bf16, made-up corpora
    python benchmarks/rounds.py build/rounds --rounds 4 --skip 1 --file one_cpu --kernels cpu eager --train.global_batch 4

Further words go to the training command. A round's figures are those that the run notes itself (metrics.jsonl).
"""

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

from start import ROOT, entries

PHASES = ("data", "forward_backward", "collective", "optimizer")
CORPORA = ("fsdkaggle2018", "librispeech", "chime3")


def train(options: argparse.Namespace, words: list[str], kernel: str, run: Path) -> list[dict]:
    """Launch a run and return the figures of its rounds, but for the first ones."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / f"launch_configs/{options.file}.yaml")]
    own = ["--config", "paper", "--run.dir", str(run), "--model.kernel", kernel]
    own += [f"--corpora.{name}.root=synthetic" for name in CORPORA]
    own += ["--data.workers", str(max(1, len(os.sched_getaffinity(0)) - 2)), "--train.log_every=1"]
    own += ["--train.rounds", str(options.rounds), "--train.validate_every", str(options.rounds)]
    own += ["--evaluation.max_clips", "1", "--evaluation.examples", "0"]
    done = subprocess.run(
        [*launcher, str(ROOT / "mtl_dist/train.py"), *own, *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    return entries(run, "round")[options.skip :]


def main() -> None:
    """Print a row for every kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="new folder for the runs")
    parser.add_argument("--file", default="one_gpu", help="of launch_configs/")
    parser.add_argument("--rounds", type=int, default=60, help="of a run (default: 60)")
    parser.add_argument("--skip", type=int, default=10, help="rounds that warm up (default: 10)")
    parser.add_argument("--turns", type=int, default=3, help="runs of a kernel (default: 3)")
    parser.add_argument("--kernels", nargs="+", default=["triton", "compile", "eager"])
    options, words = parser.parse_known_args()
    options.out.mkdir(parents=True)
    found: dict[str, list[dict]] = {kernel: [] for kernel in options.kernels}
    for turn in range(options.turns):
        for kernel in options.kernels:
            found[kernel] += train(options, words, kernel, options.out / f"{kernel}_{turn}")
    shares = " | ".join(name.replace("_", " and ") for name in PHASES)
    print(f"| kernel | rounds/s | seconds a round, middle half | {shares} |")
    print("|---|---|---|" + "---|" * len(PHASES))
    for kernel, rounds in found.items():
        low, middle, high = statistics.quantiles([r["time/seconds_per_round"] for r in rounds], n=4)
        parts = [statistics.median(r[f"time/{name}"] for r in rounds) / middle for name in PHASES]
        cells = [f"{1 / middle:.3g}", f"{low:.3f} to {high:.3f}", *(f"{p:.0%}" for p in parts)]
        print(f"| {kernel} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
