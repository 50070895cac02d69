"""`train.micro_batch: auto`: the most clips that fit in one forward and backward of every rank; the rest is accumulated.

Found by measuring, before there is an engine, on a model of the rank's own: nothing of the run is touched, and ranks need
not try the same sizes. Tested by tests/test_auto_micro_batch.py.
"""

import os
import sys
from platform import node

import torch
from accelerate import Accelerator

from mtl_dist import footprint
from mtl_dist.activations import Meter
from mtl_dist.blueprint import Blueprint
from mtl_dist.config import ConfigError
from mtl_dist.device_memory import bytes_for_tensors
from mtl_dist.experiment import Experiment, Plan, plan_rounds, raise_together
from mtl_dist.feasibility import USABLE, Case
from mtl_dist.phases import Phases
from mtl_dist.runtime import collect, engine_asked_for


def plan_together(accelerator: Accelerator, experiment: Experiment, phases: Phases) -> Plan:
    """Work out the rounds, on all ranks together and the same on all; where micro_batch is auto, find it first.

    Raises:
        ConfigError: the arithmetic does not come out whole, or not even one clip fits a rank; on rank 0, others exit.
    """
    config, ranks, rank = experiment.config, accelerator.num_processes, accelerator.process_index
    clips = experiment.clips(config.train.main_task)
    auto = config.train.micro_batch == "auto"
    agree_on_slices(accelerator, experiment.blueprint, phases)
    found, problem = [], []
    try:
        plan = plan_rounds(config, clips, ranks)
        if auto:
            found = [find(case_here(accelerator, experiment, clips), rank)]
        elif config.memory.budget_gb is not None:
            keep_budget(case_here(accelerator, experiment, clips), rank)
    except (ConfigError, torch.OutOfMemoryError) as error:
        problem = [str(error)]
    torch.cuda.empty_cache()  # for those that take memory of a GPU by themselves, such as NCCL
    raise_together(accelerator, problem, phases)
    if auto:
        phases.enter("collective")
        micro, why = min(collect(accelerator, found))
        phases.enter("start")
        plan = plan_rounds(config, clips, ranks, micro)
    if auto and accelerator.is_main_process:
        text = f"micro_batch {micro} (auto: {why}; accumulation {plan.accumulation})"
        print(text, file=sys.stderr)
    experiment.clips_per_forward = min(experiment.clips_per_forward, plan.micro_batch)
    return plan


def agree_on_slices(accelerator: Accelerator, blueprint: Blueprint, phases: Phases) -> None:
    """Give all ranks the shortest slices that one of them needs. Raises ConfigError on all of them where one has none."""
    problem, lengths = [], []
    try:
        lengths = [blueprint.slice_samples]
    except ConfigError as error:
        problem = [str(error)]
    raise_together(accelerator, problem, phases)
    if lengths != [None]:
        phases.enter("collective")
        blueprint.slice_samples = min(collect(accelerator, lengths))
        phases.enter("start")


def case_here(accelerator: Accelerator, experiment: Experiment, main_clips: int) -> Case:
    """Return this run on this rank's device as it is now: before an engine is made."""
    ranks_of_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    memory = bytes_for_tensors(accelerator.device, ranks_of_node)
    blueprint, real = experiment.blueprint, accelerator.device.type == "cuda"
    build = blueprint.model if real else blueprint.outline
    meter = Meter(build, experiment.tasks, blueprint.precision, accelerator.device)
    return Case(
        config=experiment.config,
        nodes=1,
        per_node=accelerator.num_processes,
        engine=engine_here(accelerator),
        precision=blueprint.precision,
        memory=memory,
        main_clips=main_clips,
        size=footprint.size_of(meter.model),
        activations=meter,
    )


def engine_here(accelerator: Accelerator) -> str:
    """Return the engine that the launch file asks for, as footprint.ENGINES calls it. Raises ConfigError for others."""
    engine = engine_asked_for().lower()
    if engine == "deepspeed":
        engine = f"zero{accelerator.state.deepspeed_plugin.zero_stage}"
    if engine not in footprint.ENGINES:
        raise ConfigError(
            f"train.micro_batch auto and memory.budget_gb: what {engine} holds is not known; use "
            f"{', '.join(footprint.ENGINES)}, or a number and no budget"
        )
    return engine


def find(case: Case, rank: int) -> tuple[int, str]:
    """Return the largest micro-batch that fits a rank, and why in words. Raises ConfigError where not even 1 does."""
    best = case.with_smaller_batches()
    if best is None:
        raise ConfigError(_too_small(case.changed(micro_batch=1), rank))
    micro, took = best.rounds().micro_batch, best.activations_needed()
    return micro, f"{_clips(micro)} {_gb(took)} of {_gb(best.room())} on rank {rank}"


def keep_budget(case: Case, rank: int) -> None:
    """Raise ConfigError where forward and backward take more than memory.budget_gb."""
    held = case.activations_needed()
    if held > case.budget():
        clips = case.rounds().micro_batch
        raise ConfigError(
            f"memory.budget_gb: {_clips(clips)} {_gb(held)} on rank {rank} ({node()}), and {_gb(case.budget())} are "
            "allowed; use train.micro_batch auto or memory.slice_seconds auto"
        )


def _too_small(one: Case, rank: int) -> str:
    """Say what a micro-batch of 1 takes, what there is, and what to do."""
    state, held = sum(one.state_needed().values()), one.activations_needed()
    limit = (
        f"memory.budget_gb allows {_gb(one.budget())}"
        if one.budget() == one.room()
        else f"of the {_gb(one.memory)} for tensors {USABLE:.0%} may be used, {_gb(state)} of them by parameters, gradients "
        "and optimizer"
    )
    return (
        f"train.micro_batch: auto finds none on rank {rank} ({node()}): {_clips(1)} {_gb(held)}, and {limit}; use "
        "memory.slice_seconds, memory.recompute, shorter clips (data.crop_seconds, or longest_seconds of whole ones), "
        "train.schedule round_robin, an engine that shards (fsdp2 or zero3), or more memory"
    )


def _clips(micro: int) -> str:
    return f"{micro} clips take" if micro > 1 else "1 clip takes"


def _gb(count: float) -> str:
    """Return bytes in the unit of memory.budget_gb."""
    return f"{count / 1e9:.3g} GB" if count < float("inf") else "more than there is"
