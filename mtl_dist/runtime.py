"""The process and its world: process group, Accelerator, rank and size, sums over ranks, stop requests."""

import dataclasses
import datetime
import importlib.util
import logging
import os
import signal
import time

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedType,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
)
from torch import distributed

log = logging.getLogger("mtl_dist")

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""What products are computed in under a mixed precision."""
LET_GO_SECONDS = 0.1
"""How long gloo's threads get to drop what the last collective held; microseconds are enough."""


@dataclasses.dataclass(frozen=True)
class World:
    """Which of how many processes this is."""

    rank: int = 0
    size: int = 1


class LaunchError(RuntimeError):
    """The processes were not launched as they must be; the message says how to."""


def start(mixed_precision: str, timeout_seconds: float = 600.0) -> Accelerator:
    """Create the Accelerator and make sure that world and precision are those that were launched.

    `mixed_precision` is no, bf16, fp16, or launcher for what accelerate launch says. A collective that takes longer than
    `timeout_seconds` ends the process.

    Raises:
        LaunchError: the launcher started more processes than have found each other, or engine or precision cannot be had.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise LaunchError(
            "the launcher was asked for several processes and started one, or one a node that does not know the others. "
            "Launch with a file from launch_configs/ (on CPU: two_cpu_processes.yaml)"
        )
    asked = engine_asked_for()
    precision = precision_asked_for(mixed_precision)
    try:
        meet(timeout_seconds)
        if asked == "DDP":
            cpu = not torch.cuda.is_available()
            accelerator = Accelerator(cpu=cpu, mixed_precision=precision)
        else:
            accelerator = _start_sharding(asked, precision)
    except (ValueError, RuntimeError) as error:
        raise LaunchError(
            f"{error} (WORLD_SIZE {launched}, {asked}, mixed precision {precision})"
        ) from error
    if accelerator.num_processes != launched:
        raise LaunchError(
            f"the launcher started {launched} processes, but this one found {accelerator.num_processes}: they would train "
            "separate models. Launch with a file from launch_configs/ (on CPU: two_cpu_processes.yaml)"
        )
    return accelerator


def leave(accelerator: Accelerator) -> None:
    """End the process group, the last thing that a process of a world does.

    gloo's threads need the GIL to drop the tensors of the last collective. A group that is destroyed meanwhile holds the GIL
    and waits for these threads, for ever (pytorch issues 56297, 190489; without the pause, torch 2.13 hung within ten ends).
    """
    if accelerator.num_processes > 1:
        time.sleep(LET_GO_SECONDS)
    accelerator.end_training()


def engine_asked_for() -> str:
    """Return what the launch file asks for: DDP (also for one process), FSDP2 or DeepSpeed."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        return "DeepSpeed"
    return "FSDP2" if os.environ.get("ACCELERATE_USE_FSDP", "").lower() == "true" else "DDP"


def precision_asked_for(mixed_precision: str) -> str:
    """Return no, bf16 or fp16; `launcher` is what the launcher says. Raises LaunchError where it cannot be had."""
    if mixed_precision == "launcher":
        mixed_precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if mixed_precision == "fp16" and not torch.cuda.is_available():
        raise LaunchError(
            "mixed precision fp16 is not to be had on a CPU; use --mixed_precision bf16 or no"
        )
    return mixed_precision


def meet(timeout_seconds: float) -> None:
    """Make the process group of the launched world, over NCCL or gloo; nothing where one process was started alone.

    After an elastic restart the shared TCPStore still holds the addresses of the dead group, on which a new one fails or
    hangs (pytorch issue 135712): every attempt has a prefix of its own.
    """
    if distributed.is_initialized() or not {"MASTER_ADDR", "MASTER_PORT", "RANK"} <= {*os.environ}:
        return
    store, rank, size = rendezvous_store(), int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    distributed.init_process_group(
        "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo",
        store=store,
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_seconds),
    )


def rendezvous_store() -> distributed.Store:
    """Return a client of this attempt's part of the store by which the ranks find each other."""
    return distributed.PrefixStore(f"attempt_{attempt()}", launch_store())


def launch_store() -> distributed.Store:
    """Return a client of the store that the launcher keeps through all attempts, or rank 0 where the launcher keeps none."""
    kept_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    return distributed.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=os.environ["RANK"] == "0" and not kept_by_launcher,
        multi_tenant=True,
    )


def attempt() -> int:
    """Return how often the launcher has restarted this group of processes."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def restarts_left() -> int:
    """Return how often the launcher would start this group of processes again if it failed."""
    return int(os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) - attempt()


def agree_on_folder(accelerator: Accelerator, wanted: str) -> str:
    """Return the run folder, the same on all ranks and in all attempts of a launch: what rank 0 wanted first."""
    name = [wanted]
    if accelerator.is_main_process and restarts_left() + attempt() > 0:
        name = [launch_store().compare_set("run_folder", "", wanted).decode()]
    return broadcast_object_list(name)[0]


def _start_sharding(asked: str, precision: str) -> Accelerator:
    """Return the Accelerator of FSDP2 or DeepSpeed, on GPUs or, for which Accelerate has no switch, on CPUs."""
    if asked == "DeepSpeed":
        missing = [p for p in ("deepspeed", "transformers") if not importlib.util.find_spec(p)]
        if missing:
            raise LaunchError(
                f"DeepSpeed needs the packages {' and '.join(missing)}: pip install 'mtl_dist[deepspeed]'"
            )
        import deepspeed

        # built by g++ for a minute at the first start on a CPU, and not used in training
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    elif os.environ.get("FSDP_VERSION") != "2":
        raise LaunchError(
            "FSDP: only version 2 is supported; set fsdp_version: 2 in the launch file"
        )
    handlers = []
    if not torch.cuda.is_available():
        # with cpu=True both would silently become DDP
        os.environ.pop("ACCELERATE_USE_CPU", None)
        os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
        handlers = [InitProcessGroupKwargs(backend="gloo")]
    # DeepSpeed gets its precision from mtl_dist.engines.zero
    wanted = "no" if asked == "DeepSpeed" else precision
    return Accelerator(mixed_precision=wanted, kwargs_handlers=handlers)


def world_of(accelerator: Accelerator) -> World:
    """Return rank and size."""
    return World(rank=accelerator.process_index, size=accelerator.num_processes)


def sum_over_ranks(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Add a float64 vector over all ranks; every rank calls it, every rank gets the sum."""
    if accelerator.num_processes == 1:
        return values
    values = values.to(accelerator.device, torch.float64)
    distributed.all_reduce(values)
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
