"""Two processes: the gradients of every subset, schedule and accumulation, and a round with a NaN on one rank.

accelerate launch --config_file launch_configs/two_cpu_processes.yaml tests/workers/round_worker.py CORPORA OUT
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import big_batch
import tiny
import torch
from safetensors.torch import save_file

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.round import run_round


def main(corpora: Path, out: Path) -> None:
    """Write gradients_RANK.safetensors and poisoned_RANK.json."""
    accelerator = big_batch.cpu_accelerator()
    rank, ranks = accelerator.process_index, accelerator.num_processes
    assert ranks == 2
    experiment = build_experiment(load_config(tiny.tiny_words(corpora, *big_batch.weight_words())))
    gradients, reports = {}, {}
    for subset in big_batch.SUBSETS:
        bare = big_batch.build(experiment, subset)
        model = accelerator.prepare(bare)
        for schedule in ("round_robin", "joint"):
            for accumulation, clip in ((1, None), (2, None), (2, 0.05)):
                recorder = big_batch.Recorder(bare)
                report = run_round(
                    accelerator,
                    model,
                    recorder,
                    bare.tasks,
                    big_batch.share_of_round(subset, rank, ranks, accumulation),
                    schedule=schedule,
                    clip_norm=clip,
                )
                key = f"{'+'.join(subset)}/{schedule}/{accumulation}/{clip}"
                gradients |= {f"{key}/{n}": g for n, g in recorder.steps[0].items()}
                reports[key] = report.losses | {"grad_norm": report.grad_norm}
    save_file(gradients, out / f"gradients_{rank}.safetensors")
    (out / f"reports_{rank}.json").write_text(json.dumps(reports))

    bare = big_batch.build(experiment, big_batch.NAMES)
    model = accelerator.prepare(bare)
    before = {n: p.detach().clone() for n, p in bare.named_parameters()}
    optimizer = torch.optim.SGD(bare.parameters(), lr=1.0)
    outcome = {}
    for poison in ("next_step", None):
        report = run_round(
            accelerator,
            model,
            optimizer,
            bare.tasks,
            big_batch.share_of_round(big_batch.NAMES, rank, ranks, 2, poison if rank else None),
            schedule="round_robin",
            clip_norm=None,
            stop=lambda: rank == 1,
        )
        same = all(torch.equal(p, before[n]) for n, p in bare.named_parameters())
        finite = all(bool(p.isfinite().all()) for p in bare.parameters())
        outcome[str(poison)] = {
            "nonfinite": report.nonfinite,
            "unchanged": same,
            "finite": finite,
            "stop": report.stop,
        }
    (out / f"poisoned_{rank}.json").write_text(json.dumps(outcome))
    accelerator.end_training()


main(Path(sys.argv[1]), Path(sys.argv[2]))
