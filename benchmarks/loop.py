"""What the training loop costs beside a bare PyTorch loop of the same model, rounds and optimizer.

    OMP_NUM_THREADS=1 python benchmarks/loop.py

Both train the recipe given (default: demo) on rounds prepared beforehand, in turns of a few rounds in one process. The bare
loop sums the tasks' losses, divides by their counts, and steps Adam; ours is all that Trainer does in a round, logging too.
"""

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from pathlib import Path

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.micro_batch import plan_together
from mtl_dist.optim import make_optimizer
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import StopRequest, start, world_of
from mtl_dist.trainer import Trainer


def bare_round(model, optimizer, tasks, round_) -> None:
    """One step as a tutorial would write it: a forward and a backward per task."""
    for name, task in tasks.items():
        for micro in round_.micro_batches[name]:
            batch = micro.batch
            features = model.trunk(batch.inputs)
            total, count = task.loss(model.heads.heads[name](features, batch.valid), batch)
            (task.config.weight * total / count).backward()
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def timed(act, times: int) -> float:
    """Seconds of a call, over `times` calls."""
    began = time.perf_counter()
    for _ in range(times):
        act()
    return (time.perf_counter() - began) / times


def main() -> None:
    """Measure in turns and print medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--rounds", type=int, default=4, help="rounds of a turn")
    options, more = parser.parse_known_args()
    config = load_config(["--config", options.recipe, "--run.dir", tempfile.mkdtemp(), *more])
    accelerator, folder = start("no"), RunFolder(Path(config.run.dir))
    folder.open(config, world_of(accelerator), accelerator.device)
    experiment = build_experiment(config)
    plan = plan_together(accelerator, experiment, Phases())
    trainer = Trainer(experiment, plan, accelerator, folder, StopRequest())
    loader = trainer._rounds()
    rounds = itertools.cycle([next(loader) for _ in range(4)])
    loader.close()
    model = trainer.experiment.build_model()
    optimizer = make_optimizer(model, config.optim, trainer.rates)

    def ours() -> None:
        round_ = next(rounds)
        round_.number = trainer.state.round
        trainer._watch(trainer._one_round(iter([round_])))

    def bare() -> None:
        bare_round(model, optimizer, trainer.experiment.tasks, next(rounds))

    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    timed(ours, 2), timed(bare, 2)
    for _ in range(options.turns):
        seconds["ours"].append(timed(ours, options.rounds))
        seconds["bare"].append(timed(bare, options.rounds))
    trainer.close()
    ratios = sorted(a / b for a, b in zip(*seconds.values(), strict=True))
    for name, values in seconds.items():
        print(f"{name}: median {1e3 * statistics.median(values):.1f} ms a round")
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(f"ours / bare: median {middle:.3f}, middle half {low:.3f} to {high:.3f}")


if __name__ == "__main__":
    sys.exit(main())
