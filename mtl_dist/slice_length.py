"""How long the slices of time are (models/slices.py): as memory.slice_seconds says, or as memory.budget_gb lets them be.

Tested by tests/test_slice_length.py.
"""

from collections.abc import Callable, Mapping

from mtl_dist.activations import pretended, stretch_bytes
from mtl_dist.footprint import slices_bytes
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.slices import Slicer, can_be_sliced
from mtl_dist.tasks.base import Task

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
            "memory.slice_seconds: not together with mixed precision fp16, because a slice's gradient is computed before "
            "the loss is scaled, and small numbers would be lost; use --train.mixed_precision bf16 or no"
        )
    if memory.slice_seconds != "auto":
        return max(1, round(memory.slice_seconds * rate))
    if memory.budget_gb is None:
        raise ValueError(
            "memory.slice_seconds: auto takes what memory.budget_gb lets it, which is null; say how many GB, or a length"
        )
    with pretended():
        each = Passes(build(), tasks, precision, config.train.schedule)
        return longest(round(memory.budget_gb * GB), each)


class Passes:
    """What a pass takes: bytes beside parameters and their gradients, of a model without slices built in `pretended()`."""

    def __init__(
        self, model: MultitaskModel, tasks: Mapping[str, Task], precision: str, schedule: str
    ):
        heads = model.heads.heads
        self.model, self.precision = model, precision
        self.tasks = {n: task for n, task in tasks.items() if can_be_sliced(task, heads[n])}
        slicers = {n: Slicer(model.trunk, heads[n], task, 1) for n, task in self.tasks.items()}
        self.halos = {name: slicer.halo for name, slicer in slicers.items()}
        elements = [slicer.elements for slicer in slicers.values()]
        together = elements if schedule == "joint" else [max(elements, default=0)]
        self.gradients = slices_bytes(together)

    def fullest(self, samples: int) -> str:
        """Return the task that takes most with slices of so many samples."""
        return max(self.tasks, key=lambda name: self.needed(name, samples))

    def needed(self, name: str, samples: int) -> int:
        """Return the most bytes that are held for a task in slices of so many samples, whatever the clips."""
        stretch = samples + self.halos[name]
        return self.gradients + stretch_bytes(self.model, self.tasks[name], stretch, self.precision)


def longest(budget: int, passes: Passes) -> int:
    """Return the largest number of samples whose pass fits into so many bytes. Raises ValueError where none is."""
    least = passes.model.trunk.receptive_field
    if not passes.tasks:
        raise ValueError(
            "memory.slice_seconds: no task of train.tasks can be computed in slices; use null"
        )
    name = passes.fullest(2 * least)
    short, long = (passes.needed(name, n) for n in (least, 2 * least))
    if short > budget:
        raise ValueError(
            f"memory.budget_gb: {budget / GB:g} GB are not enough for slices of time. The shortest, {least} samples with "
            f"a halo of {passes.halos[name]}, take {short / GB:.3g} GB, {passes.gradients / GB:.3g} GB of them for "
            "gradients; allow so much, or use a smaller model"
        )
    found = least + int((budget - short) * least / (long - short))
    while passes.needed(name, found) > budget:  # memory is not quite a straight line
        found = max(least, int(0.98 * found))
    return found
