"""Trunk and heads as one module with one forward, whatever tasks a micro-batch holds.

Every parameter gets a gradient in every forward: heads whose task is not in the batch are touched with weight 0. So
DDP, FSDP2 and ZeRO see the same parameters on every rank and in every micro-batch, in any order of tasks.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.tasks.base import Task, TaskBatch


class Heads(nn.Module):
    """All heads behind one forward. `touch_idle`: off where the engine itself gives idle heads a gradient of 0."""

    def __init__(self, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.touch_idle = True
        self.heads = nn.ModuleDict(heads)

    def forward(
        self, hidden: Mapping[str, Tensor], valid: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({task: outputs}, 0): the zero hangs on the parameters of all heads that were not asked."""
        outputs = {name: self.heads[name](hidden[name], valid[name]).float() for name in hidden}
        idle = [head for name, head in self.heads.items() if name not in hidden]
        touched = [p for head in idle for p in head.parameters()] if self.touch_idle else []
        device = next(iter(hidden.values())).device
        return outputs, sum(
            (0.0 * p.float().sum() for p in touched), torch.zeros((), device=device)
        )


class MultitaskModel(nn.Module):
    """forward({task: TaskBatch}) -> {task: (sum of losses, number of terms)}."""

    def __init__(self, trunk: WaveNetTrunk, tasks: Mapping[str, Task]):
        super().__init__()
        self.tasks = dict(tasks)
        self.trunk = trunk
        self.heads = Heads({name: task.build_head(trunk.channels) for name, task in tasks.items()})

    def outputs(self, batches: Mapping[str, TaskBatch]) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({task: head outputs}, a zero that touches idle heads); equally long tasks share one trunk pass.

        Whole clips have one of their own, so that all ranks have as many: their lengths are equal by chance, on one rank.
        """
        hidden: dict[str, Tensor] = {}
        keys = {
            n: (n, 0) if self.tasks[n].whole else ("", b.inputs.shape[1])
            for n, b in batches.items()
        }
        for key in sorted(set(keys.values())):
            group = {n: b.inputs for n, b in batches.items() if keys[n] == key}
            features = self.trunk(torch.cat(list(group.values())))
            parts = features.split([len(inputs) for inputs in group.values()])
            hidden.update(zip(group, parts, strict=True))
        return self.heads(hidden, {name: batch.valid for name, batch in batches.items()})

    def forward(self, batches: Mapping[str, TaskBatch]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each task's (sum, count); the caller divides by the count over all ranks and micro-batches."""
        outputs, zero = self.outputs(batches)
        losses = {name: self.tasks[name].loss(outputs[name], batches[name]) for name in batches}
        first = next(iter(losses))
        losses[first] = (losses[first][0] + zero, losses[first][1])
        return losses
