"""Largest batch of 2 s clips in 8 GiB, and longest clip at a batch of 48: plain autograd, recompute, bf16 storage, slices.

    OMP_NUM_THREADS=1 python benchmarks/room.py                 a table: some minutes of a core, no memory
    OMP_NUM_THREADS=1 python benchmarks/room.py --check-gib 2   also real forwards and backwards, of what fits 2 GiB

The model is that of the recipe `paper` with all four tasks, one at a time (round_robin), in fp32, with parameters,
gradients and Adam. What a forward and backward hold is followed on tensors without numbers (mtl_dist/activations.py). A
check runs them in a process of its own and takes the growth of its resident memory at the most.
"""

import argparse
import functools
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from mtl_dist import footprint
from mtl_dist.activations import Meter
from mtl_dist.config import load_config
from mtl_dist.planning import FSD_CLASSES, without_corpora

GIB = 2**30
PLAIN = (
    "--model.kernel eager --memory.recompute none --memory.storage full --memory.slice_seconds null"
)
VARIANTS = {
    "plain autograd": "",
    "plain, bf16 storage": "--memory.storage bf16",
    "recompute layers": "--memory.recompute layer",
    "recompute layers, bf16 storage": "--memory.recompute layer --memory.storage bf16",
    "recompute blocks": "--memory.recompute block",
    "slices of 1 s": "--memory.slice_seconds 1",
    "slices of 1 s, recompute layers": "--memory.slice_seconds 1 --memory.recompute layer",
}
MOST_CLIPS, MOST_TENTHS = 1024, 6000
"""Where the search ends: clips of 2 s, and tenths of seconds at a batch of 48."""
CLIPS, SECONDS = 48, 2.0
EXACT_HEAP = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""Lets the C library map every tensor by itself, so that what is resident is what is held."""


def experiment_of(variant: str, seconds: float):
    """Return the paper's experiment on clips of some seconds."""
    words = [*PLAIN.split(), *VARIANTS[variant].split(), "--data.crop_seconds", str(seconds)]
    return without_corpora(load_config(["--config", "paper", *words]), FSD_CLASSES)


@functools.cache
def meter_of(variant: str, seconds: float) -> Meter:
    """Return what follows the forwards and backwards of clips of some seconds."""
    experiment = experiment_of(variant, seconds)
    return Meter(experiment.build_model, experiment.tasks, "no")


def held(variant: str, clips: int, seconds: float) -> int:
    """Return the bytes of a rank: the fullest micro-step, parameters, gradients and Adam."""
    meter = meter_of(variant, seconds)
    state = footprint.state_bytes(footprint.size_of(meter.model), "ddp", "no", 1, 4)
    return int(meter.micro_step("round_robin", clips)) + sum(state.values())


def largest(held: Callable[[int], int], room: float, most: int) -> int:
    """Return the largest number from 0 to `most` that fits; what is held grows with it, nearly in a straight line."""
    one, two = held(1), held(2)
    found = most if two == one else max(0, min(most, 1 + int((room - one) / (two - one))))
    while found < most and held(found + 1) <= room:
        found += 1
    while found > 0 and held(found) > room:
        found -= 1
    return found


def real_peak(variant: str, clips: int) -> int:
    """Return by how much a process of its own grows at the most when it makes real forwards and backwards."""
    words = [sys.executable, __file__, "--point", variant, "--clips", str(clips)]
    done = subprocess.run(
        words, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | EXACT_HEAP
    )
    return int(done.stdout.split()[-1])


def point(variant: str, clips: int) -> None:
    """Print the growth of this process over a forward and backward of each task."""
    experiment = experiment_of(variant, SECONDS)
    tasks = experiment.tasks
    short = experiment_of(variant, 0.05)
    batches = {n: footprint.batch_of(task, clips) for n, task in tasks.items()}
    warm = {n: footprint.batch_of(task, 1) for n, task in short.tasks.items()}
    model = experiment.build_model()
    for name, batch in warm.items():  # what libraries take when they are first used
        model({name: batch})[name][0].backward()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for name, batch in batches.items():
        model({name: batch})[name][0].backward()
    optimizer = torch.optim.Adam(model.parameters())
    optimizer.step()
    print(resident("VmHWM") - before)


def resident(field: str) -> int:
    """Return VmRSS, or VmHWM, its peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def row_of(variant: str, gib: float, check_gib: float | None) -> list[str]:
    """Return a variant's row of the table."""
    room = gib * GIB
    clips = largest(lambda n: held(variant, n, SECONDS), room, MOST_CLIPS)
    tenths = largest(lambda n: held(variant, CLIPS, n / 10), room, MOST_TENTHS)
    per_clip = held(variant, 2, SECONDS) - held(variant, 1, SECONDS)
    row = [variant, f"{per_clip / 1e6:,.0f}", or_more(clips, MOST_CLIPS)]
    row.append(or_more(tenths / 10, MOST_TENTHS / 10))
    if check_gib is not None:
        few = largest(lambda n: held(variant, n, SECONDS), check_gib * GIB, CLIPS)
        said, real = held(variant, few, SECONDS), real_peak(variant, few)
        row += [str(few), f"{said / GIB:.2f}", f"{real / GIB:.2f}"]
    return row


def or_more(found: float, most: float) -> str:
    """Return a number, or that the search ended there."""
    return f"{found:g}" if found < most else f"{most:g} or more"


def main() -> None:
    """Print a table, or measure one point of it."""
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--gib", type=float, default=8.0)
    parser.add_argument("--check-gib", type=float)
    parser.add_argument("--only", choices=VARIANTS, nargs="+", default=list(VARIANTS))
    parser.add_argument("--point", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--clips", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.point:
        point(options.point, options.clips)
        return
    head = ["variant", "MB the second clip adds", f"clips of 2 s in {options.gib:g} GiB"]
    head.append(f"seconds at a batch of {CLIPS}")
    if options.check_gib:
        head += [f"clips in {options.check_gib:g} GiB", "followed, GiB", "resident, GiB"]
    print(f"| {' | '.join(head)} |\n|{'---|' * len(head)}")
    for variant in options.only:
        print(f"| {' | '.join(row_of(variant, options.gib, options.check_gib))} |", flush=True)


if __name__ == "__main__":
    main()
