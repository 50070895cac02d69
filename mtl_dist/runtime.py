"""The process and its world: Accelerator, rank and size, sums over ranks, stop requests."""

import dataclasses
import logging
import os
import signal

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

log = logging.getLogger("mtl_dist")


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1


class LaunchError(RuntimeError):
    """The processes were not launched as they must be; the message says how to."""


def start(mixed_precision: str) -> Accelerator:
    """Create the Accelerator and make sure that the world is the one that was launched.

    `mixed_precision` is no, bf16, fp16, or launcher for what accelerate launch says.

    Raises:
        LaunchError: the launcher started more processes than have found each other, or the precision cannot be had.
    """
    cpu = not torch.cuda.is_available()
    wanted = None if mixed_precision == "launcher" else mixed_precision
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            "the launcher was asked for several processes and started one, or one a node that does not know the others. "
            "Launch with a file from launch_configs/ (on CPU: two_cpu_processes.yaml)"
        )
    try:
        accelerator = Accelerator(cpu=cpu, mixed_precision=wanted)
    except ValueError as error:
        raise LaunchError(
            f"{error} (WORLD_SIZE {launched}, mixed precision {mixed_precision})"
        ) from error
    if accelerator.num_processes != launched:
        raise LaunchError(
            f"the launcher started {launched} processes, but this one found {accelerator.num_processes}: they would train "
            "separate models. Launch with a file from launch_configs/ (on CPU: two_cpu_processes.yaml)"
        )
    if (
        accelerator.device.type == "cpu"
        and accelerator.mixed_precision == "fp16"
        and accelerator.is_main_process
    ):
        log.warning(
            "mixed_precision fp16 does nothing on a CPU: training in fp32 (bf16 works on CPUs)"
        )
    return accelerator


def world_of(accelerator: Accelerator) -> World:
    """Return rank and size."""
    return World(rank=accelerator.process_index, size=accelerator.num_processes)


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Add a float64 vector over all ranks; every rank calls it, every rank gets the sum."""
    if accelerator.num_processes == 1:
        return values
    values = values.to(accelerator.device, torch.float64)
    torch.distributed.all_reduce(values)
    return values.cpu()


def collect(accelerator: Accelerator, items: list) -> list:
    """Return the items of all ranks in order of ranks; every rank calls it. For small Python objects."""
    return items if accelerator.num_processes == 1 else gather_object(items)


class StopRequest:
    """Remembers SIGTERM, SIGINT (Ctrl-C) or SIGUSR1, so that a round is finished and saved before the run ends.

    A second Ctrl-C stops at once.
    """

    def __init__(self):
        self.signal: int | None = None

    def listen(self) -> "StopRequest":
        """Install the handlers (main thread only)."""
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame) -> None:
        if self.signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.signal = number
