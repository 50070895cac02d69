"""One Adam with a parameter group for the trunk and one per head; learning rates as a pure function of the epoch."""

import dataclasses
from collections.abc import Mapping

import torch

from mtl_dist.sections import OptimConfig
from mtl_dist.tasks.base import TaskConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """base * factor ** floor(epoch / every): multiplied by `factor` every `every` epochs (paper section 4.2)."""

    base: float
    factor: float
    every: int

    def at(self, epoch: int) -> float:
        """Return the learning rate in an epoch (counted from 0)."""
        return self.base * self.factor ** (epoch // self.every)


def schedules(optim: OptimConfig, tasks: Mapping[str, TaskConfig]) -> dict[str, Schedule]:
    """Return {"trunk" or task: Schedule}."""
    return {"trunk": Schedule(optim.learning_rate, optim.decay_factor, optim.decay_epochs)} | {
        name: Schedule(task.learning_rate, task.decay_factor, task.decay_epochs)
        for name, task in tasks.items()
    }


def make_optimizer(model: torch.nn.Module, optim: OptimConfig, groups: Mapping[str, Schedule]):
    """Return Adam with one group per schedule: "trunk", and each task's head."""
    parameters = {"trunk": model.trunk.parameters()} | {
        name: head.parameters() for name, head in model.heads.heads.items()
    }
    return torch.optim.Adam(
        [
            {"params": list(parameters[name]), "name": name, "lr": schedule.base}
            for name, schedule in groups.items()
        ],
        betas=(optim.beta1, optim.beta2),
        eps=optim.eps,
    )


def set_learning_rates(optimizer, groups: Mapping[str, Schedule], epoch: int) -> dict[str, float]:
    """Set every group's learning rate for an epoch, and return them."""
    for group in optimizer.param_groups:
        group["lr"] = groups[group["name"]].at(epoch)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
