"""The processes of an engine: the gradients of every subset, schedule and accumulation, and a round with a NaN on one rank.

accelerate launch --config_file launch_configs/FILE.yaml tests/workers/engine_worker.py CORPORA OUT SHARED

A gradient is what one step of SGD takes away from the weights, so that reduction, clipping and gathering are all in it.
Then the engine goes on with the newest two runs in SHARED that others have stopped, and stops one of its own there
(crossing.py).
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import big_batch
import crossing
import tiny
import torch
from safetensors.torch import save_file

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.round import run_round
from mtl_dist.runtime import leave, start


def gradients_of(accelerator, experiment, subset, clip) -> tuple[dict, dict, str]:
    """{key/parameter: gradient} and {key: report} of both schedules, with and without accumulation."""
    engine = big_batch.engine(accelerator, experiment, subset, clip)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    first, _ = engine.full_state()
    gradients, reports = {}, {}
    for schedule in ("round_robin", "joint"):
        for accumulation in big_batch.accumulations(subset):
            share = big_batch.share_of_round(subset, rank, ranks, accumulation)
            tasks = {name: experiment.tasks[name] for name in subset}
            report = run_round(engine, tasks, share, schedule=schedule)
            after, _ = engine.full_state()
            key = f"{'+'.join(subset)}/{schedule}/{accumulation}/{clip}"
            gradients |= {
                f"{key}/{n}": (first[n].double() - after[n].double()) / big_batch.RATE
                for n in after
            }
            reports[key] = report.losses | {"grad_norm": report.grad_norm}
            engine.load_weights(big_batch.initial_weights(experiment, subset))
    return gradients, reports, engine.name


def poisoned_rounds(accelerator, experiment) -> dict:
    """What a NaN on the last rank, and the clean round after it, do to all ranks."""
    engine = big_batch.engine(accelerator, experiment, big_batch.NAMES, None)
    rank, ranks = accelerator.process_index, accelerator.num_processes
    before, outcome = engine.full_state()[0], {}
    for poison in ("next_step", None):
        named = poison if rank == ranks - 1 else None
        report = run_round(
            engine,
            experiment.tasks,
            big_batch.share_of_round(big_batch.NAMES, rank, ranks, 2, named),
            schedule="round_robin",
            stop=lambda: rank == ranks - 1,
        )
        after = engine.full_state()[0]
        outcome[str(poison)] = {
            "nonfinite": report.nonfinite,
            "unchanged": all(torch.equal(after[n], before[n]) for n in before),
            "finite": all(bool(tensor.isfinite().all()) for tensor in after.values()),
            "stop": report.stop,
        }
    return outcome


def slices(accelerator, corpora: Path, out: Path) -> None:
    """Write slices.safetensors (rank 0) and slices_RANK.json: all tasks, and the labelled one alone, in slices of time."""
    words = tiny.tiny_words(corpora, *big_batch.weight_words(), *big_batch.slice_words())
    experiment = build_experiment(load_config(words))
    assert set(experiment.build_model().slicers) == set(big_batch.NAMES)
    gradients, reports = {}, {}
    for subset in (big_batch.NAMES, big_batch.NAMES[:1]):
        found, told, _ = gradients_of(accelerator, experiment, subset, None)
        gradients, reports = gradients | found, reports | told
    (out / f"slices_{accelerator.process_index}.json").write_text(json.dumps(reports))
    if accelerator.is_main_process:
        save_file(gradients, out / "slices.safetensors")


def main(corpora: Path, out: Path, shared: Path) -> None:
    """Write gradients.safetensors (rank 0) and outcome_RANK.json."""
    accelerator = start("launcher")
    experiment = build_experiment(load_config(tiny.tiny_words(corpora, *big_batch.weight_words())))
    gradients, reports, names = {}, {}, set()
    for subset in big_batch.SUBSETS:
        for clip in (None, 0.05) if subset == big_batch.NAMES else (None,):
            found, told, name = gradients_of(accelerator, experiment, subset, clip)
            gradients, reports, names = gradients | found, reports | told, names | {name}
    outcome = {"reports": reports, "names": sorted(names)}
    outcome["poisoned"] = poisoned_rounds(accelerator, experiment)
    (out / f"outcome_{accelerator.process_index}.json").write_text(json.dumps(outcome))
    if accelerator.is_main_process:
        save_file(gradients, out / "gradients.safetensors")
    (name,) = names
    crossing.resume_all(accelerator, corpora, shared, name, newest=2)
    crossing.write(accelerator, corpora, shared, name)
    slices(accelerator, corpora, out)  # last: FSDP2 keeps in mind that the whole model is one unit
    leave(accelerator)


main(*map(Path, sys.argv[1:]))
