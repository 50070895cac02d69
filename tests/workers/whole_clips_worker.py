"""Two processes with two loader workers each: the gradient of a round of whole clips, as the step of SGD takes it.

accelerate launch --config_file launch_configs/two_cpu_processes.yaml tests/workers/whole_clips_worker.py ROOT OUT WORDS...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import big_batch
import torch
import whole
from safetensors.torch import save_file

from mtl_dist.round import run_round
from mtl_dist.runtime import leave, start, world_of

root, out = map(Path, sys.argv[1:3])
accelerator = start("launcher")
experiment = whole.build(root, *sys.argv[3:])
found: dict[str, torch.Tensor] = {}
for schedule in ("round_robin", "joint"):
    (round_,) = whole.rounds(experiment, 1, world_of(accelerator), workers=2, accumulation=2)
    engine = big_batch.engine(accelerator, experiment, big_batch.NAMES, None)
    before, _ = engine.full_state()
    run_round(engine, experiment.tasks, round_, schedule=schedule)
    after, _ = engine.full_state()
    found |= {f"{schedule}/{n}": (before[n] - after[n]) / big_batch.RATE for n in after}
if accelerator.is_main_process:
    save_file(found, out / "gradients.safetensors")
leave(accelerator)
