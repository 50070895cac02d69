"""How long the slices of time are (models/slices.py): as memory.slice_seconds says, or as memory.budget_gb lets them be.

Tested by tests/test_slice_length.py.
"""

from collections.abc import Callable, Mapping

import torch

from mtl_dist.activations import Meter
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.base import Task

GB = 10**9

Build = Callable[[int, bool], MultitaskModel]
"""build(samples of a slice, whether real numbers go through it) -> a new model."""


def slice_samples(
    config, build: Build, tasks: Mapping[str, Task], precision: str, device: torch.device | None
) -> int | None:
    """Return the length of a slice in samples, or None for whole clips.

    Raises:
        ValueError: auto without a budget, or with one that no slice fits, or slices together with fp16.
    """
    memory, rate = config.memory, config.data.sample_rate
    if memory.slice_seconds is None:
        return None
    if precision == "fp16":
        raise ValueError(
            "memory.slice_seconds: not together with mixed precision fp16, because a slice's gradient is computed before "
            "the loss is scaled, and small numbers would be lost; use --train.mixed_precision bf16 or no"
        )
    if memory.slice_seconds != "auto":
        return max(1, round(memory.slice_seconds * rate))
    if memory.budget_gb is None:
        raise ValueError(
            "memory.slice_seconds: auto takes what memory.budget_gb lets it, which is null; say how many GB, or a length"
        )
    budget, schedule = memory.budget_gb * GB, config.train.schedule
    followed = Meter(lambda: build(1, False), tasks, precision)
    found = longest(budget, followed, schedule)
    if device is not None and device.type == "cuda":  # where more is taken than tensors are
        found = shortened(
            budget, Meter(lambda: build(1, True), tasks, precision, device), schedule, found
        )
    return found


def longest(budget: float, meter: Meter, schedule: str) -> int:
    """Return the largest number of samples whose pass fits into so many bytes. Raises ValueError where none is."""
    least = meter.model.trunk.receptive_field
    if not meter.model.slicers:
        raise ValueError(
            "memory.slice_seconds: no task of train.tasks can be computed in slices; use null"
        )
    short, long = (meter.slices(schedule, n) for n in (least, 2 * least))
    found = least + max(0, int((budget - short) * least / (long - short)))
    return shortened(budget, meter, schedule, found)  # memory is not quite a straight line


def shortened(budget: float, meter: Meter, schedule: str, samples: int) -> int:
    """Return the first of ever shorter slices that fits. Raises ValueError where none does."""
    least = meter.model.trunk.receptive_field
    while (needed := meter.slices(schedule, samples)) > budget:
        if samples == least:
            raise ValueError(
                f"memory.budget_gb: {budget / GB:g} GB are not enough for slices of time. The shortest, {least} samples and "
                f"what is heard around them, take {needed / GB:.3g} GB with their gradients; allow so much, or use a "
                "smaller model"
            )
        samples = max(least, int(0.98 * samples * min(1.0, budget / needed + 0.02)))
    return samples
