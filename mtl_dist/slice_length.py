"""How long the slices of time are (models/slices.py): as memory.slice_seconds says, or as memory.budget_gb lets them be.

Tested by tests/test_slice_length.py.
"""

from collections.abc import Callable, Mapping

import torch

from mtl_dist.activations import peak_bytes, pretended
from mtl_dist.footprint import batch_of
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.slices import Slicer, can_be_sliced
from mtl_dist.tasks.base import Task, TaskBatch

GB = 10**9


def slice_samples(
    config, build: Callable[[], MultitaskModel], tasks: Mapping[str, Task], precision: str
) -> int | None:
    """Return the length of a slice in samples, or None for whole clips; `build` makes a model without slices.

    Raises:
        ValueError: auto without a budget, or with one that no slice fits, or slices together with fp16.
    """
    memory, rate = config.memory, config.data.sample_rate
    if memory.slice_seconds is None:
        return None
    if precision == "fp16":
        raise ValueError(
            "memory.slice_seconds: not together with mixed precision fp16, because a slice's gradient is computed before the "
            "loss is scaled, and small numbers would be lost; use --train.mixed_precision bf16 or no"
        )
    if memory.slice_seconds != "auto":
        return max(1, round(memory.slice_seconds * rate))
    if memory.budget_gb is None:
        raise ValueError(
            "memory.slice_seconds: auto takes what memory.budget_gb lets it, which is null; say how many GB, or a length"
        )
    joint = config.train.schedule == "joint"
    with pretended():
        return longest(round(memory.budget_gb * GB), Passes(build(), tasks, precision, joint))


class Passes:
    """What a pass takes: bytes beside parameters and their gradients, of a model without slices built in `pretended()`."""

    def __init__(
        self, model: MultitaskModel, tasks: Mapping[str, Task], precision: str, joint: bool
    ):
        heads = model.heads.heads
        self.model, self.precision = model, precision
        self.tasks = {n: task for n, task in tasks.items() if can_be_sliced(task, heads[n])}
        slicers = {n: Slicer(model.trunk, heads[n], task, 1) for n, task in self.tasks.items()}
        self.halos = {name: slicer.halo for name, slicer in slicers.items()}
        each = [
            sum(4 * p.numel() for m in (s.trunk, s.head) for p in m.parameters())
            for s in slicers.values()
        ]
        # a pass's own gradients and the sum of those before it; with joint the sums of all tasks wait for the backward
        self.gradients = max(each, default=0) + (sum(each) if joint else max(each, default=0))

    def needed(self, samples: int) -> int:
        """Return the most bytes that are held with slices of so many samples, whatever the clips."""
        return self.gradients + max(
            self.activations(name, samples + halo) for name, halo in self.halos.items()
        )

    def activations(self, name: str, samples: int) -> int:
        """Return the bytes of forward and backward of a stretch of a task's audio."""
        batch = batch_of(self.tasks[name], 1)
        wave = torch.zeros(1, samples)
        targets = wave if batch.targets.ndim == 2 else batch.targets
        stretch = TaskBatch(wave, targets, torch.full((1,), samples))
        return peak_bytes(self.model, {name: stretch}, self.precision)


def longest(budget: int, passes: Passes) -> int:
    """Return the largest number of samples whose pass fits into so many bytes. Raises ValueError where none is."""
    least = passes.model.trunk.receptive_field
    if not passes.tasks:
        raise ValueError(
            "memory.slice_seconds: no task of train.tasks can be computed in slices; use null"
        )
    short, long = (passes.needed(n) for n in (least, 2 * least))
    if short > budget:
        raise ValueError(
            f"memory.budget_gb: {budget / GB:g} GB are not enough for slices of time. The shortest, {least} samples with "
            f"a halo of {max(passes.halos.values())}, take {short / GB:.3g} GB, {passes.gradients / GB:.3g} GB of them for "
            "gradients; allow so much, or use a smaller model"
        )
    found = least + int((budget - short) * least / (long - short))
    while passes.needed(found) > budget:  # memory is not quite a straight line
        found = max(least, int(0.98 * found))
    return found
