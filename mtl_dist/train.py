"""Train: parse, build, run. Nothing here is importable by others.

accelerate launch mtl_dist/train.py                                      the embedded demo
accelerate launch mtl_dist/train.py --config paper --corpora.fsdkaggle2018.root DIR ...
"""

import logging
import shutil
import sys
import time
from pathlib import Path

from mtl_dist.config import ConfigError, load_config
from mtl_dist.data.faults import DataError, exit_with
from mtl_dist.experiment import build_together, raise_together
from mtl_dist.feasibility import size_text
from mtl_dist.micro_batch import plan_together
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import (
    LaunchError,
    StopRequest,
    agree_on_folder,
    attempt,
    leave,
    rendezvous_store,
    restarts_left,
    start,
    world_of,
)
from mtl_dist.trainer import Trainer, TrainingError
from mtl_dist.watchdog import Watchdog

log = logging.getLogger("mtl_dist")


def run(words: list[str]) -> int:
    """Train as the command line says; return the exit code."""
    config = load_config(words)
    if attempt() > 0:  # the launcher has restarted what it runs: the run goes on
        config.run.resume = "auto"
    stop = StopRequest().listen()
    accelerator = start(config.train.mixed_precision, config.run.timeout_seconds)
    timeout, phases = config.run.timeout_seconds, Phases()
    watchdog = Watchdog(phases, world_of(accelerator), timeout, rendezvous_store)
    try:
        name = config.run.dir or time.strftime("runs/%Y%m%d-%H%M%S")
        folder = RunFolder(Path(agree_on_folder(accelerator, name)))
        experiment = build_together(accelerator, config, phases)
        plan = plan_together(accelerator, experiment, phases)
        open_together(accelerator, folder, experiment, phases)
        trainer = Trainer(experiment, plan, accelerator, folder, stop, phases)
        if accelerator.is_main_process:
            describe(accelerator, experiment, trainer)
        try:
            results = trainer.train()
            trainer.save_status("stopped" if results is None else "finished")
        except (TrainingError, DataError):
            trainer.save_status("failed")
            if not accelerator.is_main_process:
                sys.exit(1)
            raise
        finally:
            trainer.close()
        if accelerator.is_main_process:
            beside = Path(sys.executable).with_name("tensorboard")
            tensorboard = "tensorboard" if shutil.which("tensorboard") else beside
            print(
                f"run folder: {folder.path}\nlook at it: {tensorboard} --logdir {folder.path.parent}"
            )
        if results is not None or stop.signal is None or restarts_left() > 0:
            return 0  # with restarts left, a launcher would take another code for a failure; status.json says how it is
        return 128 + stop.signal
    finally:
        watchdog.close()
        leave(accelerator)


def open_together(accelerator, folder: RunFolder, experiment, phases: Phases) -> None:
    """Let rank 0 claim the run folder."""
    problem: list[str] = []
    if accelerator.is_main_process:
        try:
            device, kernel = accelerator.device, experiment.blueprint.kernel.name
            folder.open(experiment.config, world_of(accelerator), device, kernel)
        except ConfigError as error:
            problem = [str(error)]
    raise_together(accelerator, problem, phases)


def describe(accelerator, experiment, trainer) -> None:
    """Print what is really in force."""
    plan, train = trainer.plan, experiment.config.train
    for corpus in experiment.corpora.values():
        print(corpus.describe(), file=sys.stderr)
    engine = trainer.engine
    parameters = sum(shape.numel() for shape in engine.shapes.values())
    held = size_text(engine.held_bytes()["parameters"])
    samples, rate = engine.bare.slice_samples, experiment.reader.rate
    slices = f"slices of {samples} samples ({samples / rate:.4g} s)" if samples else "no slices"
    for name in engine.bare.unsliced():
        log.warning(
            "task %s is computed on whole clips: only a LocalTask (tasks/base.py) whose head has `reach`, or a head with "
            "`sums` and `classify` (models/heads.py), can be computed in slices of time",
            name,
        )
    kernel, recompute = experiment.blueprint.kernel, experiment.blueprint.recompute
    recompute = "layer" if kernel.recomputes and recompute == "none" else recompute
    print(
        f"{type(engine.bare).__name__} of {parameters:,} parameters, {held} of them on rank 0, receptive field "
        f"{engine.bare.trunk.receptive_field} samples; {engine.name}, {accelerator.num_processes} processes on "
        f"{accelerator.device.type}, precision {engine.precision}, {train.schedule}, kernel {kernel.name}, "
        f"{slices}, recompute {recompute}, storage {experiment.config.memory.storage}; global batch "
        f"{train.global_batch} = {accelerator.num_processes} ranks x {plan.micro_batch} x {plan.accumulation}; "
        f"{plan.rounds} rounds, {plan.rounds_per_epoch:.1f} an epoch; tasks: "
        f"{', '.join(task.describe() for task in experiment.tasks.values())}",
        file=sys.stderr,
    )


if __name__ == "__main__":
    logging.basicConfig(format="%(levelname)s: %(message)s", stream=sys.stderr)
    try:
        code = run(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    except (ConfigError, LaunchError, TrainingError) as error:
        code = f"error: {error}"
    except DataError as error:
        code = f"error: {error} (go on with --run.resume auto)"
    exit_with(code)
