"""Train: parse, build, run. Nothing here is importable by others.

accelerate launch mtl_dist/train.py                                      the embedded demo
accelerate launch mtl_dist/train.py --config paper --corpora.fsdkaggle2018.root DIR ...
"""

import logging
import sys
import time
from pathlib import Path

from accelerate.utils import broadcast_object_list

from mtl_dist.config import ConfigError, load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import StopRequest, collect, start, world_of
from mtl_dist.trainer import Trainer, TrainingError


def run(words: list[str]) -> int:
    """Train as the command line says; return the exit code."""
    config = load_config(words)
    stop = StopRequest().listen()
    accelerator = start(config.train.mixed_precision)
    try:
        name = [config.run.dir or time.strftime("runs/%Y%m%d-%H%M%S")]
        folder = RunFolder(Path(broadcast_object_list(name)[0]))
        with accelerator.local_main_process_first():
            experiment = build_experiment(config)
        open_together(accelerator, folder, config)
        trainer = Trainer(experiment, accelerator, folder, stop)
        if accelerator.is_main_process:
            describe(accelerator, experiment, trainer)
        try:
            results = trainer.train()
        finally:
            trainer.close()
        if accelerator.is_main_process:
            print(
                f"run folder: {folder.path}\nlook at it: tensorboard --logdir {folder.path.parent}"
            )
        return 0 if results is not None or stop.signal is None else 128 + stop.signal
    finally:
        accelerator.end_training()


def open_together(accelerator, folder: RunFolder, config) -> None:
    """Let rank 0 claim the run folder; if it cannot, every rank raises the same ConfigError."""
    problem: list[str] = []
    if accelerator.is_main_process:
        try:
            folder.open(config, world_of(accelerator), accelerator.device)
        except ConfigError as error:
            problem = [str(error)]
    problem = collect(accelerator, problem)
    if problem:
        raise ConfigError(problem[0])


def describe(accelerator, experiment, trainer) -> None:
    """Print what is really in force."""
    plan, train = trainer.plan, experiment.config.train
    for corpus in experiment.corpora.values():
        print(corpus.describe(), file=sys.stderr)
    parameters = sum(p.numel() for p in trainer.bare_model.parameters())
    print(
        f"{type(trainer.model).__name__} of {parameters:,} parameters, receptive field "
        f"{trainer.bare_model.trunk.receptive_field} samples; {accelerator.num_processes} processes on "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}, {train.schedule}; global batch "
        f"{train.global_batch} = {accelerator.num_processes} ranks x {plan.micro_batch} x {plan.accumulation}; "
        f"{plan.rounds} rounds, {plan.rounds_per_epoch:.1f} an epoch; tasks: {', '.join(train.tasks)}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        sys.exit(run(sys.argv[1:]))
    except (ConfigError, TrainingError) as error:
        sys.exit(f"error: {error}")
