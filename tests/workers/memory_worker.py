"""The processes of an engine: what a rank holds and sends, and what a copy of the model for an evaluation costs.

accelerate launch --config_file launch_configs/FILE.yaml tests/workers/memory_worker.py CORPORA OUT [--model.channels 192]

Words are those of mtl_dist/train.py. Used by tests/test_held_memory.py on a small model and by benchmarks/memory.py on a
large one. Two rounds are made, as Adam's moments come with the first; the second is measured.
"""

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import big_batch
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_dist.config import load_config
from mtl_dist.engines import make_engine
from mtl_dist.experiment import build_experiment
from mtl_dist.optim import make_optimizer, schedules
from mtl_dist.round import run_round
from mtl_dist.runtime import leave, precision_asked_for, start

ACCUMULATION = 4


COLLECTIVES = {
    "allreduce_": ("all-reduce", 0, 2),
    "_allgather_base_": ("all-gather", 0, 1),
    "_reduce_scatter_base_": ("reduce-scatter", 1, 1),
}
"""{operator: (name, which argument is whole, how often a ring sends it)}"""


class Sent(TorchDispatchMode):
    """Adds up by collective what a ring of so many ranks sends: (n - 1)/n of the whole tensor, or twice that."""

    def __init__(self, ranks: int):
        super().__init__()
        self.share, self.sent = (ranks - 1) / ranks, {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d" and func._opname in COLLECTIVES:
            name, place, times = COLLECTIVES[func._opname]
            leaves = [x for x in tree_leaves(args[place]) if torch.is_tensor(x)]
            whole = sum(x.nbytes for x in leaves if x.dtype != torch.float64)  # those are losses
            if whole:
                self.sent[name] = self.sent.get(name, 0) + round(times * self.share * whole)
        return func(*args, **(kwargs or {}))


def memory(field: str) -> int:
    """Return VmRSS, or VmHWM, its peak, of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def main(corpora: Path, out: Path, words: list[str]) -> None:
    """Write memory_RANK.json."""
    accelerator = start("launcher")
    config = load_config(tiny.tiny_words(corpora, *words))
    experiment = build_experiment(config)
    rates = schedules(config.optim, {n: t.config for n, t in experiment.tasks.items()})
    rank, ranks = accelerator.process_index, accelerator.num_processes
    share = big_batch.share_of_round(tuple(experiment.tasks), rank, ranks, ACCUMULATION)
    before = memory("VmRSS")
    engine = make_engine(
        accelerator,
        experiment.build_model,
        lambda model: make_optimizer(model, config.optim, rates),
        clip_norm=config.optim.clip_norm,
        precision=precision_asked_for(config.train.mixed_precision),
    )
    for _ in range(2):
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        with Sent(ranks) as sent:
            run_round(engine, experiment.tasks, share, schedule="round_robin")
    result = {
        "engine": engine.name,
        "held": engine.held_bytes(),
        "sent": sent.sent,
        "resident": memory("VmRSS") - before,
        "resident_peak": memory("VmHWM") - before,
    }
    kept, began = memory("VmRSS"), time.perf_counter()
    copy = engine.plain_model()
    result["copy_seconds"] = time.perf_counter() - began
    result["copy_resident"] = memory("VmRSS") - kept
    del copy
    (out / f"memory_{rank}.json").write_text(json.dumps(result))
    leave(accelerator)


main(*map(Path, sys.argv[1:3]), sys.argv[3:])
