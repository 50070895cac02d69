"""What a run takes, in bytes: memory of a rank, the wire, a checkpoint, the loaders. Arithmetic, and one measurement.

P is the number of parameters, n the number of ranks. Sources: ZeRO (Rajbhandari et al. 2020, sections 3, 5 and 7) for what
each engine keeps and sends; NCCL tests' PERFORMANCE.md for the factors of a ring. Tested by tests/test_planning.py.
"""

import contextlib
import dataclasses
import math
import weakref
from collections.abc import Iterable, Mapping

import numpy as np
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mtl_dist.audio.clips import Clip
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.streams.rounds import keyed_generators
from mtl_dist.tasks.base import Task, TaskBatch

PREFETCHED_ROUNDS = 2
"""Rounds that a loader's worker prepares ahead (streams/rounds.py)."""
ZERO3_LIVE_PARAMETERS = 10**9
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance: fewer stay gathered once they are."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """What a data-parallel engine splits over the ranks.

    `master`: DeepSpeed's parameters and gradients are of the working precision, beside an fp32 copy of the parameters that
    belongs to the optimizer (ZeRO, section 3.1). DDP and FSDP2 keep fp32 parameters and cast them in the forward.
    """

    shards: frozenset[str]
    master: bool


ENGINES = {
    "ddp": Engine(frozenset(), master=False),
    "fsdp2": Engine(frozenset({"optimizer", "gradients", "parameters"}), master=False),
    "zero1": Engine(frozenset({"optimizer"}), master=True),
    "zero2": Engine(frozenset({"optimizer", "gradients"}), master=True),
    "zero3": Engine(frozenset({"optimizer", "gradients", "parameters"}), master=True),
}


@dataclasses.dataclass(frozen=True)
class Activations:
    """What forward and backward of a task hold at their fullest: `constant` bytes, and `per_clip` for every clip."""

    constant: int
    per_clip: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shapes of the parameters, and the number of elements of the largest module that FSDP2 gathers at a time."""

    shapes: list[torch.Size]
    largest_unit: int

    @property
    def elements(self) -> int:
        """Number of parameters P."""
        return sum(shape.numel() for shape in self.shapes)


def size_of(model: MultitaskModel) -> ModelSize:
    """Return a model's sizes; every residual layer, and all heads together, are taken as a unit of FSDP2."""
    units = [*model.trunk.layers, model.heads]
    return ModelSize(
        shapes=[p.shape for p in model.parameters()],
        largest_unit=max(sum(p.numel() for p in unit.parameters()) for unit in units),
    )


def shard_elements(size: ModelSize, engine: str, ranks: int) -> int:
    """Return how many of P elements the fullest rank holds of what `engine` shards.

    FSDP2 cuts each parameter along its first dimension, ZeRO-3 each parameter's elements, ZeRO-1 and 2 all of them in a row.
    """
    if engine == "fsdp2":
        return sum(math.ceil(s[0] / ranks) * s[1:].numel() for s in size.shapes)
    if engine == "zero3":
        return sum(math.ceil(s.numel() / ranks) for s in size.shapes)
    return math.ceil(size.elements / ranks)


def state_bytes(
    size: ModelSize, engine: str, precision: str, ranks: int, micro_steps: int
) -> dict[str, int]:
    """Return {what: bytes} that a rank holds besides activations: parameters, gradients, optimizer, gathered.

    Gradients are reduced once a round, so from the second micro-step on each rank keeps all of them until then, whatever the
    engine shards (FSDP2 without gradient sync, DeepSpeed's coalesce_grad_reduction). DDP's buckets are a second copy.
    `gathered` are the parameters that are whole for the moment: of FSDP2 one unit and the next, which is fetched ahead.
    """
    kind, total, half = ENGINES[engine], size.elements, precision != "no"
    shard = shard_elements(size, engine, ranks)
    working = 2 if kind.master and half else 4
    reduced = shard if "gradients" in kind.shards else total
    gradients = total if micro_steps > 1 else reduced
    buckets = total if engine == "ddp" and ranks > 1 else 0
    gathered = 0
    if "parameters" in kind.shards and ranks > 1:
        units = min(total, 2 * size.largest_unit) * (2 if half else 4)
        gathered = units if engine == "fsdp2" else min(total, ZERO3_LIVE_PARAMETERS) * working
    return {
        "parameters": working * (shard if "parameters" in kind.shards else total),
        "gradients": working * (gradients + buckets),
        "optimizer": (12 if kind.master else 8) * (shard if "optimizer" in kind.shards else total),
        "gathered": gathered,
    }


def wire_bytes(
    size: ModelSize, engine: str, precision: str, ranks: int, micro_steps: int
) -> dict[str, int]:
    """Return {collective: bytes} that a rank sends in a round.

    In a ring of n ranks a reduce-scatter or an all-gather of S bytes sends (n - 1)/n S and an all-reduce, which is both,
    2 (n - 1)/n S (PERFORMANCE.md). DDP: one all-reduce of the gradients. ZeRO-1 and 2: they are scattered, the new
    parameters gathered: the same volume (ZeRO, section 7.2.1). FSDP2 and ZeRO-3: parameters are gathered for every forward
    and again for every backward, gradients scattered once a round (section 7.2.2, with several micro-steps).
    """
    kind, half, ring = ENGINES[engine], precision != "no", (ranks - 1) / ranks
    working = 2 if half and engine != "ddp" else 4
    gradients = size.elements * (working if kind.master else 4)
    gathers = 2 * micro_steps if "parameters" in kind.shards else 1
    parts = {"all-reduce": 2 * gradients} if engine == "ddp" else {}
    if engine != "ddp":
        parts = {"reduce-scatter": gradients, "all-gather": gathers * working * size.elements}
    return {name: round(ring * sent) for name, sent in parts.items()}


def checkpoint_bytes(size: ModelSize) -> int:
    """Return a checkpoint's size: parameters and Adam's two moments in fp32, a step count each; its small texts left out.

    Safetensors' header takes some 100 bytes a tensor: two of each parameter's shape, one of the parameter, one step.
    """
    return 12 * size.elements + len(size.shapes) * (4 + 4 * 100)


def batch_of(task: Task, clips: int) -> TaskBatch:
    """Return a batch of absent clips, of the shapes that real ones have: nothing is read."""
    absent = [Clip(id=str(i), wave=np.zeros(0, np.float32)) for i in range(clips)]
    return task.prepare(absent, keyed_generators(0, task.name, 0))


def round_bytes(tasks: Mapping[str, Task], share: int) -> int:
    """Return the bytes of one rank's batches of a round of `share` clips a task."""
    return share * sum(t.nbytes for task in tasks.values() for t in batch_of(task, 1))


def loader_shared_memory(bytes_of_round: int, workers: int) -> int:
    """Return what a rank's loader takes of /dev/shm: the rounds ahead of all workers, and the one in use."""
    return (PREFETCHED_ROUNDS * workers + 1) * bytes_of_round if workers else 0


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


def measure_activations(model: MultitaskModel, task: Task, precision: str) -> Activations:
    """Follow a task's forward and backward of one clip and of two: the difference is a clip's, the rest is constant.

    Called with a model built in `pretended()`, it takes seconds and no memory for a model of any size.
    """
    one, two = (
        peak_bytes(model, {task.name: batch_of(task, clips)}, precision) for clips in (1, 2)
    )
    return Activations(constant=one - (two - one), per_clip=two - one)


def activation_bytes(measured: Mapping[str, Activations], schedule: str, micro_batch: int) -> int:
    """Return what the fullest micro-step holds: the largest task's for round_robin, all tasks' for joint."""
    each = [task.constant + micro_batch * task.per_clip for task in measured.values()]
    return sum(each) if schedule == "joint" else max(each)
