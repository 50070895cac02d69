"""What forward and backward of a model hold at their fullest: followed operation by operation on tensors without numbers,
or, on a GPU, tried.

Tested by tests/test_planning.py and tests/test_auto_micro_batch.py.
"""

import contextlib
import copy
import math
import weakref
from collections.abc import Callable, Iterable, Mapping

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_dist.footprint import batch_of, slices_bytes
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.base import Task, TaskBatch


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


class ReservedBytes:
    """What the allocator of a GPU takes for tensors while it is in force, at the most: with what it loses between them."""

    def __init__(self, device: torch.device):
        self.device, self.peak = device, 0

    def __enter__(self) -> "ReservedBytes":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(self.device)
        self.before = torch.cuda.memory_reserved(self.device)
        return self

    def __exit__(self, *_) -> None:
        self.peak = torch.cuda.max_memory_reserved(self.device) - self.before


def peak_bytes(model: MultitaskModel, batches: Mapping[str, TaskBatch], precision: str) -> int:
    """Return the most bytes that one forward and backward hold at once beside parameters and gradients.

    In half precision under autocast to bf16, whose copies of the weights count too; fp16 takes as many bytes. Gradients
    of the model are gone afterwards.
    """
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(p.grad for p in model.parameters())]
    device, half = known[0].device, precision != "no"
    with ReservedBytes(device) if device.type == "cuda" else LiveBytes(known) as held:
        with torch.autocast(device.type, torch.bfloat16) if half else contextlib.nullcontext():
            losses = model({name: batch.to(device) for name, batch in batches.items()})
        sum(total for total, _ in losses.values()).backward()
    model.zero_grad(set_to_none=True)
    return held.peak


def stretch_bytes(model: MultitaskModel, task: Task, samples: int, precision: str) -> int:
    """Return the most bytes of one forward and backward of a stretch of a task's audio, not cut into slices of time."""
    whole = copy.copy(model)
    whole.slicers = {}
    wave, targets = torch.zeros(1, samples), batch_of(task, 1).targets
    stretch = TaskBatch(wave, wave if targets.ndim == 2 else targets, torch.full((1,), samples))
    return peak_bytes(whole, {task.name: stretch}, precision)


class Meter:
    """Says what a micro-step holds, by forwards and backwards of as many absent clips as it is asked about.

    With a GPU they are real ones, on a model of their own. Without, tensors have no numbers: that takes about a second for a
    model of any size, and no memory; `build` may then make an outline. Of tasks in slices of time, a pass is followed.
    """

    def __init__(
        self,
        build: Callable[[], MultitaskModel],
        tasks: Mapping[str, Task],
        precision: str,
        device: torch.device | str = "cpu",
    ):
        self.tasks, self.precision = tasks, precision
        real = torch.device(device).type == "cuda"
        self.context = contextlib.nullcontext() if real else pretended()
        with self.context:
            self.model = build()
        self.known: dict[tuple[tuple[str, ...], int], float] = {}
        if real:
            self.model.to(device)
            for name in tasks:  # what is compiled, tuned or loaded once is not a clip's
                self._tried(self._fullest, (name,), 1)

    def micro_step(self, schedule: str, clips: int) -> float:
        """Return the bytes of the fullest micro-step of so many clips of a task: of one task, or of all for joint."""
        return max(self.of(names, clips) for names in _steps(schedule, self.tasks))

    def of(self, names: tuple[str, ...], clips: int) -> float:
        """Return the bytes of a forward and backward of so many clips of each of these tasks; inf: more than there are."""
        if (names, clips) not in self.known:
            self.known[names, clips] = self._tried(self._fullest, names, clips)
        return self.known[names, clips]

    def slices(self, schedule: str, samples: int) -> float:
        """Return the bytes of the fullest micro-step in slices of so many samples, whatever the clips; inf as above."""
        steps = _steps(schedule, self.model.slicers)
        return max(self._tried(self._in_slices, names, samples) for names in steps)

    def _tried(self, measure: Callable[..., int], *arguments) -> float:
        try:
            with self.context:
                return measure(*arguments)
        except torch.OutOfMemoryError:
            self.model.zero_grad(set_to_none=True)
            return math.inf

    def _fullest(self, names: tuple[str, ...], clips: int) -> int:
        """Return the bytes of tasks in slices, one after another, or of the others, at once; the slices' gradients stay."""
        sliced = tuple(n for n in names if n in self.model.slicers)
        batches = {n: batch_of(self.tasks[n], clips) for n in names if n not in sliced}
        rest = peak_bytes(self.model, batches, self.precision) if batches else 0
        if not sliced:
            return rest
        gradients = slices_bytes([self.model.slicers[n].elements for n in sliced])
        return max(rest + gradients, self._in_slices(sliced, self.model.slice_samples))

    def _in_slices(self, names: tuple[str, ...], samples: int) -> int:
        """Return the bytes of the fullest pass of tasks in slices, and of their gradients."""
        slicers = {n: self.model.slicers[n] for n in names}
        passes = [
            stretch_bytes(self.model, self.tasks[n], samples + slicer.halo, self.precision)
            for n, slicer in slicers.items()
        ]
        return max(passes) + slices_bytes([slicer.elements for slicer in slicers.values()])


def _steps(schedule: str, names: Iterable[str]) -> list[tuple[str, ...]]:
    """Return the tasks of each micro-step."""
    return [tuple(names)] if schedule == "joint" else [(name,) for name in names]
