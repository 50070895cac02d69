"""The gradients of a round in given modes of kernel, recomputing, storage and slices, on one engine: gradients.safetensors.

accelerate launch --config_file launch_configs/FILE.yaml tests/workers/recompute_worker.py CORPORA OUT MODE ...

A mode is KERNEL,RECOMPUTE,STORAGE,SLICE_SECONDS.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import big_batch
import tiny
import torch
from safetensors.torch import save_file

from mtl_dist.config import load_config
from mtl_dist.engines import make_engine
from mtl_dist.experiment import build_experiment
from mtl_dist.round import run_round
from mtl_dist.runtime import leave, start


def gradients(accelerator, corpora: str, mode: str) -> dict[str, torch.Tensor]:
    """{mode/schedule/parameter: what one step of SGD takes away}, by both schedules, two micro-batches a task."""
    kernel, recompute, storage, slices = mode.split(",")
    words = ["--model.kernel", kernel, "--memory.recompute", recompute, "--memory.storage", storage]
    words += ["--memory.slice_seconds", slices]
    words = tiny.tiny_words(Path(corpora), *big_batch.weight_words(), *words)
    experiment = build_experiment(load_config(words), device=accelerator.device)
    engine = make_engine(
        accelerator,
        lambda: big_batch.build(experiment, big_batch.NAMES),
        lambda model: torch.optim.SGD(model.parameters(), lr=big_batch.RATE),
    )
    first, _ = engine.full_state()
    found = {}
    for schedule in ("round_robin", "joint"):
        share = big_batch.share_of_round(
            big_batch.NAMES, accelerator.process_index, accelerator.num_processes, 2
        )
        run_round(engine, experiment.tasks, share, schedule=schedule)
        for name, after in engine.full_state()[0].items():
            change = first[name].double() - after.double()
            found[f"{mode}/{schedule}/{name}"] = change / big_batch.RATE
        engine.load_weights(big_batch.initial_weights(experiment, big_batch.NAMES))
    return found


def main(corpora: str, out: str, *modes: str) -> None:
    """Write all modes' gradients."""
    accelerator = start("launcher")
    found = {}
    for mode in modes:
        found |= gradients(accelerator, corpora, mode)
    if accelerator.is_main_process:
        save_file(found, Path(out) / "gradients.safetensors")
    leave(accelerator)


main(*sys.argv[1:])
