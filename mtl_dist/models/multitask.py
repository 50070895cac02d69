"""Trunk and heads as one module with one forward, whatever tasks a micro-batch holds.

Every parameter gets a gradient in every forward: heads whose task is not in the batch are touched with weight 0. So
DDP, FSDP2 and ZeRO see the same parameters on every rank and in every micro-batch, in any order of tasks.

In slices of time (slices.py) a task is one number with one gradient to all around it, so that the number of slices may
differ between ranks. Engines then gather the whole model at once, since gradients are computed within its forward.
"""

from collections.abc import Callable, Collection, Mapping

import torch
from torch import Tensor, nn

from mtl_dist.models.heads import wide
from mtl_dist.models.slices import Slicer, can_be_sliced
from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.tasks.base import Task, TaskBatch


class Heads(nn.Module):
    """All heads behind one forward. `touch_idle`: off where the engine itself gives idle heads a gradient of 0."""

    def __init__(self, heads: Mapping[str, nn.Module]):
        super().__init__()
        self.touch_idle = True
        self.heads = nn.ModuleDict(heads)

    def forward(
        self,
        hidden: Mapping[str, Tensor],
        valid: Mapping[str, Tensor],
        elsewhere: Collection[str] = (),
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({task: outputs}, 0): the zero hangs on the parameters of all heads used neither here nor elsewhere."""
        outputs = {name: wide(self.heads[name](hidden[name], valid[name])) for name in hidden}
        used = {*hidden, *elsewhere}
        idle = [head for name, head in self.heads.items() if name not in used]
        touched = [p for head in idle for p in head.parameters()] if self.touch_idle else []
        device = next(self.parameters()).device
        return outputs, sum(
            (0.0 * p.float().sum() for p in touched), torch.zeros((), device=device)
        )


class MultitaskModel(nn.Module):
    """forward({task: TaskBatch}) -> {task: (sum of losses, number of terms)}, in slices of `slice_samples` if given."""

    def __init__(
        self, trunk: WaveNetTrunk, tasks: Mapping[str, Task], slice_samples: int | None = None
    ):
        super().__init__()
        self.tasks = dict(tasks)
        self.trunk = trunk
        self.heads = Heads({name: task.build_head(trunk.channels) for name, task in tasks.items()})
        self.slice_samples = slice_samples
        self.slicers: dict[str, Slicer] = {}
        if slice_samples is not None:
            self.slicers = {
                name: Slicer(trunk, self.heads.heads[name], task, slice_samples)
                for name, task in tasks.items()
                if can_be_sliced(task, self.heads.heads[name])
            }

    def unsliced(self) -> list[str]:
        """Return the tasks that are computed whole although slices are asked for: they do not say how to."""
        return [n for n in self.tasks if self.slice_samples is not None and n not in self.slicers]

    def outputs(
        self, batches: Mapping[str, TaskBatch], elsewhere: Collection[str] = ()
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return ({task: head outputs}, a zero that touches the heads that are used neither here nor elsewhere).

        Equally long tasks share one trunk pass. Whole clips have one of their own, so that all ranks have as many: their
        lengths are equal by chance, on one rank. Where no gradients are asked for, it is in slices if there are slices.
        """
        sliced = {} if torch.is_grad_enabled() else self._in_slices(Slicer.outputs, batches)
        rest = {name: batch for name, batch in batches.items() if name not in sliced}
        hidden: dict[str, Tensor] = {}
        passes = {
            n: (n, 0) if self.tasks[n].whole else ("", b.inputs.shape[1]) for n, b in rest.items()
        }
        for key in sorted(set(passes.values())):
            group = {n: b.inputs for n, b in rest.items() if passes[n] == key}
            features = self.trunk(torch.cat(list(group.values())))
            parts = features.split([len(inputs) for inputs in group.values()])
            hidden.update(zip(group, parts, strict=True))
        valid = {name: batch.valid for name, batch in rest.items()}
        found, zero = self.heads(hidden, valid, {*elsewhere, *sliced})
        return found | sliced, zero

    def forward(self, batches: Mapping[str, TaskBatch]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return each task's (sum, count); the caller divides by the count over all ranks and micro-batches."""
        sums = self._in_slices(Slicer.loss_sum, batches) if torch.is_grad_enabled() else {}
        rest = {name: batch for name, batch in batches.items() if name not in sums}
        outputs, zero = self.outputs(rest, elsewhere=sums)
        losses = {
            name: (total, self.tasks[name].count(batches[name])) for name, total in sums.items()
        }
        losses |= {name: self.tasks[name].loss(outputs[name], rest[name]) for name in rest}
        first = next(iter(losses))
        losses[first] = (losses[first][0] + zero, losses[first][1])
        return losses

    def _in_slices(self, do: Callable, batches: Mapping[str, TaskBatch]) -> dict[str, Tensor]:
        """Return {task: what a Slicer's method does} of the tasks that can be sliced."""
        return {n: do(self.slicers[n], b) for n, b in batches.items() if n in self.slicers}
