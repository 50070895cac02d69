"""Seconds from the launch to the first round, and for which training waits for a checkpoint, by engine on two CPU ranks.

    python benchmarks/start.py build/start --turns 3

The demo's run, corpora made beforehand, one thread a rank; a checkpoint every second round. Engines take turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
FILES = {
    "DDP": "two_cpu_processes",
    "FSDP2": "fsdp2_two_cpu_processes",
    "ZeRO-1": "zero1_two_cpu_processes",
    "ZeRO-2": "zero2_two_cpu_processes",
    "ZeRO-3": "zero3_two_cpu_processes",
}


def entries(run: Path, kind: str) -> list[dict]:
    """Return the whole lines of a kind in metrics.jsonl so far."""
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("\n")]
    return [entry for entry in found if entry["kind"] == kind]


def measure(file: str, run: Path) -> tuple[float, list[float]]:
    """Launch; return (seconds to the first round, seconds of each checkpoint's pause)."""
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    launcher += ["--config_file", str(ROOT / f"launch_configs/{file}.yaml")]
    words = ["--train.rounds", "12", "--train.checkpoint_every", "2", "--train.log_every", "1"]
    words += ["--train.validate_every", "12", "--evaluation.max_clips", "2"]
    words += ["--evaluation.examples", "0", "--run.dir", str(run)]
    began = time.perf_counter()
    process = subprocess.Popen(
        [*launcher, str(ROOT / "mtl_dist/train.py"), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while not entries(run, "round") and process.poll() is None:
        time.sleep(0.05)
    first = time.perf_counter() - began
    assert process.wait() == 0, f"{file} failed"
    return first, [e["time/checkpoint_pause_seconds"] for e in entries(run, "checkpoint")]


def main() -> None:
    """Measure in turns and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    options = parser.parse_args()
    options.out.mkdir(parents=True)
    firsts: dict[str, list[float]] = {name: [] for name in FILES}
    pauses: dict[str, list[float]] = {name: [] for name in FILES}
    measure(FILES["DDP"], options.out / "warm")  # makes the corpora, fills the page cache
    for turn in range(options.turns):
        for name, file in FILES.items():
            first, pause = measure(file, options.out / f"{name}_{turn}")
            firsts[name].append(first)
            pauses[name] += pause
    print(
        "| engine | first round after, s | checkpoint's pause, ms: median, largest |\n|---|---|---|"
    )
    for name in FILES:
        shown = ", ".join(f"{value:.1f}" for value in firsts[name])
        middle, most = 1e3 * statistics.median(pauses[name]), 1e3 * max(pauses[name])
        print(f"| {name} | {shown} | {middle:.0f}, {most:.0f} |")


if __name__ == "__main__":
    main()
