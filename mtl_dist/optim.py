"""One Adam with a parameter group for the trunk and one per head; learning rates as a pure function of the step."""

import dataclasses
import math
from collections.abc import Mapping

import torch

from mtl_dist.sections import OptimConfig
from mtl_dist.tasks.base import TaskConfig


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Learning rates of a group. decay: base * factor ** floor(epoch / every), as in the paper (section 4.2). cosine: from
    base to 0 along half a cosine over the whole run (Loshchilov and Hutter 2017, SGDR, equation 5, without restarts). In
    the first `first_epochs` epochs times `first_factor`."""

    base: float
    factor: float
    every: int
    kind: str = "decay"
    first_factor: float = 1.0
    first_epochs: int = 0

    def at(self, epoch: int, done: float) -> float:
        """Return the learning rate in an epoch (counted from 0), with a share `done` of the run's steps done."""
        base = self.base * (self.first_factor if epoch < self.first_epochs else 1.0)
        if self.kind == "cosine":
            return base * (1 + math.cos(math.pi * min(1.0, done))) / 2
        return base * self.factor ** (epoch // self.every)


def schedules(optim: OptimConfig, tasks: Mapping[str, TaskConfig]) -> dict[str, Schedule]:
    """Return {"trunk" or task: Schedule}."""
    found = {
        name: Schedule(own.learning_rate, own.decay_factor, own.decay_epochs, optim.schedule)
        for name, own in {"trunk": optim, **tasks}.items()
    }
    first = {"first_factor": optim.trunk_factor, "first_epochs": optim.trunk_epochs}
    return found | {"trunk": dataclasses.replace(found["trunk"], **first)}


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


def set_learning_rates(
    optimizer, groups: Mapping[str, Schedule], epoch: int, done: float
) -> dict[str, float]:
    """Set every group's learning rate as Schedule.at has it, and return them."""
    for group in optimizer.param_groups:
        group["lr"] = groups[group["name"]].at(epoch, done)
    return {group["name"]: group["lr"] for group in optimizer.param_groups}
