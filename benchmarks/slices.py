"""Memory and time of training in slices of time (models/slices.py): the paper's trunk by the CPU kernel, one thread.

    OMP_NUM_THREADS=1 python benchmarks/slices.py memory              clips of 2 to 60 s, batches of 1 to 64
    OMP_NUM_THREADS=1 python benchmarks/slices.py time                against whole clips, in turns in one run

Memory is that of one forward and backward of noise. Every row is a process of its own: `live` are the storages of tensors
beside waves, parameters and their gradients (activations.LiveBytes), `resident` what the process grew by from the waves on.
Both print rows of the tables of README.md; memory takes five minutes on one core, time three.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from room import EXACT_HEAP, resident

from mtl_dist.activations import LiveBytes
from mtl_dist.config import load_config
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.planning import FSD_CLASSES, without_corpora
from mtl_dist.tasks.base import TaskBatch

RATE = 16_000
MIB = 2**20
CASES = [(1, 2), (1, 10), (1, 60), (4, 2), (64, 2)]
"""(clips, seconds) of a batch."""


def build(slice_samples: int | None) -> MultitaskModel:
    """Return the paper's model."""
    seconds = [] if slice_samples is None else [f"--memory.slice_seconds={slice_samples / RATE}"]
    config = load_config(["--config", "paper", *seconds])
    return without_corpora(config, FSD_CLASSES, device=torch.device("cpu")).build_model()


def batch_of_noise(task: str, clips: int, samples: int) -> dict[str, TaskBatch]:
    """Return full clips."""
    waves = 0.1 * torch.randn(clips, samples)
    labels = torch.randint(FSD_CLASSES, (clips,))
    targets = labels if task == "audio_tagging" else waves.clone()
    return {task: TaskBatch(waves, targets, torch.full((clips,), samples))}


def step(model: MultitaskModel, batches: dict[str, TaskBatch]) -> None:
    """Forward and backward."""
    sum(total / count for total, count in model(batches).values()).backward()


def memory_of(task: str, clips: int, seconds: int, slice_samples: int | None) -> dict[str, int]:
    """Measure in this process."""
    model = build(slice_samples)
    step(model, batch_of_noise(task, 1, 1000))  # loads libraries, makes the gradients
    batches = batch_of_noise(task, clips, seconds * RATE)
    known = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    with LiveBytes([*known, *batches[task]]) as live:
        step(model, batches)
    return {"live": live.peak, "resident": resident("VmHWM") - before}


def memory(options) -> None:
    """Print a row for every case, and for the smallest one on whole clips."""
    print("| slice | clips | seconds | live, MiB | resident, MiB |\n|---|---|---|---|---|")
    whole = [(None, 1, 2)]
    for slice_samples, clips, seconds in whole + [(options.slice, *case) for case in CASES]:
        words = [sys.executable, __file__, "one", "--task", options.task]
        words += ["--clips", str(clips), "--seconds", str(seconds)]
        words += [] if slice_samples is None else ["--slice", str(slice_samples)]
        done = subprocess.run(
            words, env=os.environ | EXACT_HEAP, stdout=subprocess.PIPE, text=True, check=True
        )
        found = json.loads(done.stdout.splitlines()[-1])
        live, grown = (f"{found[key] / MIB:.0f}" for key in ("live", "resident"))
        print(
            f"| {slice_samples or 'whole'} | {clips} | {seconds} | {live} | {grown} |", flush=True
        )


def times(options) -> None:
    """Print seconds of a step and their ratio to whole clips': median and range, variants in turns."""
    batches = batch_of_noise(options.task, options.clips, options.seconds * RATE)
    variants = [None, *options.lengths]
    models = {length: build(length) for length in variants}
    found: dict[int | None, list[float]] = {length: [] for length in variants}
    for turn in range(options.turns + 1):  # the first warms up
        for length, model in models.items():
            began = time.perf_counter()
            step(model, batches)
            found[length] += [time.perf_counter() - began] if turn else []
    print(
        "| slice | seconds, median | to whole clips: median | least | most |\n|---|---|---|---|---|"
    )
    for length in variants:
        ratios = [a / b for a, b in zip(found[length], found[None], strict=True)]
        figures = [statistics.median(ratios), min(ratios), max(ratios)]
        cells = [f"{statistics.median(found[length]):.2f}", *(f"{r:.2f}" for r in figures)]
        print(f"| {length or 'whole'} | {' | '.join(cells)} |")


def main() -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=["memory", "time", "one"])
    parser.add_argument("--task", default="audio_tagging", help="default: audio_tagging")
    parser.add_argument("--slice", type=int, help="samples; memory: 4000 if not given")
    parser.add_argument("--clips", type=int, default=2, help="of a batch; default: 2")
    parser.add_argument("--seconds", type=int, default=2, help="of a clip; default: 2")
    parser.add_argument("--turns", type=int, default=7, help="default: 7")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1000, 2000, 4000, 32000])
    options = parser.parse_args()
    if options.what == "one":
        sizes = options.clips, options.seconds, options.slice
        print(json.dumps(memory_of(options.task, *sizes)))
    elif options.what == "memory":
        options.slice = options.slice or 4000
        memory(options)
    else:
        times(options)


if __name__ == "__main__":
    main()
