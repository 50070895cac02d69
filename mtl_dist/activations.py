"""What forward and backward of a model hold, followed operation by operation on tensors without numbers.

Tested by tests/test_planning.py.
"""

import contextlib
import copy
import dataclasses
import weakref
from collections.abc import Iterable, Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_dist.footprint import batch_of
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.base import Task, TaskBatch


@dataclasses.dataclass(frozen=True)
class Activations:
    """What forward and backward of a task hold at their fullest: `constant` bytes, and `per_clip` for every clip."""

    constant: int
    per_clip: int


def pretended() -> FakeTensorMode:
    """Return a context in which tensors have shapes and types and no numbers, and every operation runs without computing.

    Autograd and autocast are the real ones, so what is held and for how long is that of a real forward and backward.
    """
    return FakeTensorMode(allow_non_fake_inputs=True)


class LiveBytes(TorchDispatchMode):
    """Follows the bytes of the storages that operations make while it is in force; `peak` is the most that lived at once.

    Storages of `known` tensors are left out, and so is what a kernel takes and gives back within itself.
    """

    def __init__(self, known: Iterable[torch.Tensor]):
        super().__init__()
        self.known = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._follow(leaf.untyped_storage())
        self.peak = max(self.peak, self.now)
        return out

    def _follow(self, storage: torch.UntypedStorage) -> None:
        if storage not in self.known:
            self.known.add(storage)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._freed, storage.nbytes())

    def _freed(self, count: int) -> None:
        self.now -= count


def peak_bytes(model: MultitaskModel, batches: Mapping[str, TaskBatch], precision: str) -> int:
    """Return the most bytes that one forward and backward hold at once beside parameters and gradients.

    In half precision under autocast to bf16, whose copies of the weights count too; fp16 takes as many bytes.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(p.grad for p in model.parameters())]
    half = precision != "no"
    with LiveBytes(known) as live:
        with torch.autocast("cpu", torch.bfloat16) if half else contextlib.nullcontext():
            losses = model(batches)
        sum(total for total, _ in losses.values()).backward()
    model.zero_grad(set_to_none=True)
    return live.peak


def stretch_bytes(model: MultitaskModel, task: Task, samples: int, precision: str) -> int:
    """Return the most bytes of one forward and backward of a stretch of a task's audio, not cut into slices of time."""
    whole = copy.copy(model)
    whole.slicers = {}
    wave, targets = torch.zeros(1, samples), batch_of(task, 1).targets
    stretch = TaskBatch(wave, wave if targets.ndim == 2 else targets, torch.full((1,), samples))
    return peak_bytes(whole, {task.name: stretch}, precision)


def measure_activations(model: MultitaskModel, task: Task, precision: str) -> Activations:
    """Follow a task's forward and backward of one clip and of two: the difference is a clip's, the rest is constant.

    Called with a model built in `pretended()`, it takes seconds and no memory for a model of any size. In slices of time
    it is one pass and its gradients, however many clips.
    """
    if task.name in model.slicers:
        slicer = model.slicers[task.name]
        held = stretch_bytes(model, task, slicer.samples + slicer.halo, precision)
        return Activations(constant=held + 8 * slicer.elements, per_clip=0)
    one, two = (
        peak_bytes(model, {task.name: batch_of(task, clips)}, precision) for clips in (1, 2)
    )
    return Activations(constant=one - (two - one), per_clip=two - one)


def activation_bytes(measured: Mapping[str, Activations], schedule: str, micro_batch: int) -> int:
    """Return what the fullest micro-step holds: the largest task's for round_robin, all tasks' for joint."""
    each = [task.constant + micro_batch * task.per_clip for task in measured.values()]
    return sum(each) if schedule == "joint" else max(each)
