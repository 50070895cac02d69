"""Engines: how a model is spread over ranks. One interface (data_parallel.py), chosen by the launch file alone."""

from collections.abc import Callable

from accelerate import Accelerator
from torch import nn

from mtl_dist.engines.data_parallel import DataParallel, Engine
from mtl_dist.runtime import engine_asked_for

__all__ = ["DataParallel", "Engine", "make_engine"]


def make_engine(
    accelerator: Accelerator,
    build: Callable[[], nn.Module],
    optimizer_of: Callable,
    *,
    clip_norm: float | None = None,
    precision: str = "no",
) -> Engine:
    """Return the engine that the launch file asks for.

    Args:
        build: makes a new model, always with the same initial values.
        optimizer_of: makes the optimizer of a model.
        clip_norm: clip the gradient's global norm to this, or None.
        precision: no, bf16 or fp16.
    """
    asked = engine_asked_for()
    if asked == "DeepSpeed":
        from mtl_dist.engines.zero import Zero, Zero3

        kind = Zero3 if accelerator.state.deepspeed_plugin.zero_stage == 3 else Zero
    elif asked == "FSDP2":
        from mtl_dist.engines.fsdp2 import FullyShardedDataParallel as kind
    else:
        kind = DataParallel
    return kind(accelerator, build, optimizer_of, clip_norm=clip_norm, precision=precision)
