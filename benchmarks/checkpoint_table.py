"""Every engine and world resumes what every other wrote: a table of the largest relative error of the losses after it.

    python benchmarks/checkpoint_table.py build/checkpoint_table

Ten ways to train (DDP, FSDP2, ZeRO-1, -2 and -3 on one and two CPU processes) each stop the tests' tiny run of all four
tasks after round 3; each goes on with all ten to round 6. Truth is one process without a stop.
"""

import os
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import crossing
import tiny
from accelerate import Accelerator

from mtl_dist.runtime import leave, start

ROOT = Path(__file__).parent.parent
ENGINES = {"DDP": "", "FSDP2": "fsdp2_", "ZeRO-1": "zero1_", "ZeRO-2": "zero2_", "ZeRO-3": "zero3_"}
WAYS = [(engine, ranks) for engine in ENGINES for ranks in (1, 2)]
ALLOWED = 1e-4


def launch(engine: str, ranks: int, out: Path, act: str) -> None:
    """Run this script's `act` under an engine."""
    file = f"{ENGINES[engine]}two_cpu_processes.yaml"
    if (engine, ranks) == ("DDP", 1):
        file = "one_cpu.yaml"
    options = ["--config_file", str(ROOT / "launch_configs" / file), "--num_processes", str(ranks)]
    words = [str(Path(__file__)), str(out), "--act", act, f"{engine} x {ranks}"]
    subprocess.run(
        ["accelerate", "launch", *options, *words],
        check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(out / f"{engine}_{ranks}_{act}.log").open("w"),
    )


def act(out: Path, what: str, who: str) -> None:
    """Write or resume, in the world that was launched."""
    accelerator = start("launcher")
    (crossing.write if what == "write" else crossing.resume_all)(
        accelerator, out / "corpora", out, who
    )
    leave(accelerator)


def main(out: Path) -> None:
    """Write, resume, and print the table."""
    out.mkdir(parents=True, exist_ok=True)
    tiny.write_corpora(out / "corpora")
    crossing.train(Accelerator(cpu=True), out / "corpora", out / "uninterrupted")
    for what in ("write", "resume"):
        for engine, ranks in WAYS:
            launch(engine, ranks, out, what)
    names, truth = (
        [f"{engine} x {ranks}" for engine, ranks in WAYS],
        crossing.losses(out / "uninterrupted"),
    )
    print("| written by / resumed by | " + " | ".join(names) + " |")
    print("|---" * (1 + len(names)) + "|")
    errors = []
    for writer in names:
        row = [crossing.worst(out / "resumed" / f"{writer}__{reader}", truth) for reader in names]
        errors += row
        print(f"| {writer} | " + " | ".join(f"{error:.0e}" for error in row) + " |")
    print(f"largest {max(errors):.1e}, allowed {ALLOWED:.0e}")
    sys.exit(max(errors) > ALLOWED)


if __name__ == "__main__":
    if "--act" in sys.argv:
        act(Path(sys.argv[1]), *sys.argv[3:])
    else:
        main(Path(sys.argv[1]))
