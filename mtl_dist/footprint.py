"""What a run takes, in bytes: memory of a rank, the wire, a checkpoint, the loaders. activations.py measures the rest.

Sources: the engines as mtl_dist/engines sets them up, in torch 2.13 and DeepSpeed 0.19, for what each keeps and sends; NCCL
tests' PERFORMANCE.md for the factors of a ring. Tested by tests/test_planning.py, and against the engines themselves by
tests/test_held_memory.py.
"""

import dataclasses
import math
from collections.abc import Collection, Mapping

import numpy as np
import torch

from mtl_dist.audio.clips import Clip
from mtl_dist.data.batches import keyed_generators
from mtl_dist.data.workers import PARTS_AHEAD
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks.base import Task, TaskBatch

ZERO3_LIVE_PARAMETERS = 10**9
"""DeepSpeed's stage3_max_live_parameters and stage3_max_reuse_distance: fewer stay gathered from forward to backward."""
ZERO3_PERSISTENT = 10**5
"""DeepSpeed's stage3_param_persistence_threshold: parameters of so few elements stay whole, beside their shards."""


@dataclasses.dataclass(frozen=True)
class Engine:
    """What an engine of mtl_dist/engines keeps in shards between rounds; parameters are fp32 with all of them.

    `deepspeed`: Adam steps fp32 shards of its own beside the parameters, and gradients travel in the working precision.
    """

    shards: frozenset[str]
    deepspeed: bool


ENGINES = {
    "ddp": Engine(frozenset(), deepspeed=False),
    "fsdp2": Engine(frozenset({"parameters", "optimizer"}), deepspeed=False),
    "zero1": Engine(frozenset({"optimizer"}), deepspeed=True),
    "zero2": Engine(frozenset({"optimizer"}), deepspeed=True),
    "zero3": Engine(frozenset({"parameters", "optimizer"}), deepspeed=True),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelSize:
    """Shapes of the parameters, and the number of elements of the largest module that FSDP2 gathers at a time."""

    shapes: list[torch.Size]
    largest_unit: int

    @property
    def elements(self) -> int:
        """Number of parameters P."""
        return sum(shape.numel() for shape in self.shapes)

    @property
    def persistent(self) -> int:
        """Number of elements that ZeRO-3 keeps whole."""
        return sum(s.numel() for s in self.shapes if s.numel() <= ZERO3_PERSISTENT)


def size_of(model: MultitaskModel) -> ModelSize:
    """Return a model's sizes; units of FSDP2 are every residual layer and all heads together, or with slices the model."""
    units = [*model.trunk.layers, model.heads] if model.slice_samples is None else [model]
    return ModelSize(
        shapes=[p.shape for p in model.parameters()],
        largest_unit=max(sum(p.numel() for p in unit.parameters()) for unit in units),
    )


def slices_bytes(elements: Collection[int]) -> int:
    """Return what slices of time hold beside a pass: its own gradients, and of each task of a micro-step their sum in fp32.

    `elements`: for each of these tasks, those of the parameters that it hangs on.
    """
    return 4 * (max(elements, default=0) + sum(elements))


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

    Gradients are reduced once a round. Until then a rank keeps its own of all parameters, whatever the engine shards: under
    DeepSpeed always (coalesce_grad_reduction), under FSDP2 from the second micro-step on (without gradient sync). DDP's and
    DeepSpeed's buckets are a second copy; ZeRO-3 also keeps room for the reduced shards.
    `gathered` are the parameters that are whole for the moment: of FSDP2 one unit and the next, which is fetched ahead.
    """
    kind, total = ENGINES[engine], size.elements
    working = 4 if precision == "no" else 2
    shard = shard_elements(size, engine, ranks)
    parameters, gathered = total, 0
    if "parameters" in kind.shards:
        parameters = shard
        units = min(total, 2 * size.largest_unit)
        gathered = working * units if ranks > 1 else 0
    gradients = 4 * (shard if engine == "fsdp2" and micro_steps == 1 else total)
    if engine == "ddp" and ranks > 1:
        gradients += 4 * total
    if kind.deepspeed:
        gradients += working * total
    if engine == "zero3":
        parameters += size.persistent
        gathered = working * min(total, ZERO3_LIVE_PARAMETERS)
        gradients += 4 * shard
    adam = (12 if kind.deepspeed else 8) * (shard if "optimizer" in kind.shards else total)
    return {
        "parameters": 4 * parameters,
        "gradients": gradients,
        "optimizer": adam,
        "gathered": gathered,
    }


def evaluation_bytes(size: ModelSize, engine: str) -> int:
    """Return the bytes of the whole model that evaluation makes on every rank where parameters are in shards."""
    return 4 * size.elements if "parameters" in ENGINES[engine].shards else 0


def wire_bytes(
    size: ModelSize, engine: str, precision: str, ranks: int, micro_steps: int
) -> dict[str, int]:
    """Return {collective: bytes} that a rank sends in a round.

    In a ring of n ranks a reduce-scatter or an all-gather of S bytes sends (n - 1)/n S and an all-reduce, which is both,
    2 (n - 1)/n S (PERFORMANCE.md). DDP: one all-reduce of the gradients in fp32. ZeRO-1 and 2: one in the working precision
    (DeepSpeed's get_comm_dtype under torch_autocast), of which each rank keeps its shard, and the new fp32 parameters are
    gathered. FSDP2: parameters are gathered for every forward and again for every backward, in the working precision;
    gradients are scattered once a round in fp32. ZeRO-3: gathered once for both if there are few enough, the persistent
    ones once a round in fp32; gradients are scattered in the working precision.
    """
    total, working = size.elements, 4 if precision == "no" else 2
    if engine == "ddp":
        parts = {"all-reduce": 8 * total}
    elif engine == "fsdp2":
        parts = {"reduce-scatter": 4 * total, "all-gather": 2 * micro_steps * working * total}
    elif engine == "zero3":
        moving = size.elements - size.persistent
        passes = micro_steps * (1 if total <= ZERO3_LIVE_PARAMETERS else 2)
        gathers = working * passes * moving + 4 * size.persistent
        parts = {"reduce-scatter": working * total, "all-gather": gathers}
    else:
        parts = {"all-reduce": 2 * working * total, "all-gather": 4 * total}
    return {name: round((ranks - 1) / ranks * sent) for name, sent in parts.items()}


def checkpoint_bytes(size: ModelSize) -> int:
    """Return a checkpoint's size: parameters and Adam's two moments in fp32, a step count each; its small texts left out.

    Safetensors' header takes some 100 bytes a tensor: two of each parameter's shape, one of the parameter, one step.
    """
    return 12 * size.elements + len(size.shapes) * (4 + 4 * 100)


def batch_of(task: Task, clips: int) -> TaskBatch:
    """Return a batch of absent clips, of the shapes that real ones have, whole ones at their longest: nothing is read."""
    absent = [Clip(id=str(i), wave=np.zeros(0, np.float32)) for i in range(clips)]
    batch = task.prepare(absent, keyed_generators(0, task.name, 0))
    return batch.with_samples(task.crop_samples + task.tail_samples) if task.whole else batch


def round_bytes(tasks: Mapping[str, Task], share: int) -> int:
    """Return the bytes of one rank's batches of a round of `share` clips a task."""
    return share * sum(t.nbytes for task in tasks.values() for t in batch_of(task, 1))


def loader_shared_memory(bytes_of_round: int, workers: int) -> int:
    """Return what a rank's loader takes of /dev/shm: the rounds ahead, each in parts of all workers, and the one in use."""
    return (PARTS_AHEAD + 1) * bytes_of_round if workers else 0


def loader_worker(lane_bytes: int, bytes_of_round: int, workers: int) -> int:
    """Return the bytes a worker holds: its share of the blocks of the rank's lanes, and of the rounds ahead."""
    each = max(1, workers)
    return lane_bytes // each + (
        PARTS_AHEAD * bytes_of_round // each if workers else bytes_of_round
    )
