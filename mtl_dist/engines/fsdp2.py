"""FSDP2: parameters, gradients and Adam's moments in shards (torch.distributed.fsdp.fully_shard), through Accelerate."""

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy
from torch.distributed.tensor import DTensor, distribute_tensor

from mtl_dist.engines.data_parallel import Engine
from mtl_dist.runtime import DTYPES, LaunchError


class FullyShardedDataParallel(Engine):
    """Every parameter is a DTensor: rank r holds the r-th slice of its first dimension."""

    def prepare_for(self, accelerator: Accelerator) -> None:
        """Gather weights in the engine's precision, reduce gradients in fp32; autocast handles the inputs.

        In slices of time gradients are computed within the forward: units inside the model would scatter them there, slice
        by slice. Then the whole model is one unit, gathered before the forward.
        """
        if self.bare.slice_samples is not None:
            accelerator.state.fsdp_plugin.auto_wrap_policy = None
        accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=DTYPES.get(self.precision),
            reduce_dtype=torch.float32,
            cast_forward_inputs=False,  # targets must stay in fp32
        )

    @property
    def name(self) -> str:
        """FSDP2. Raises LaunchError if Accelerate has wrapped the model in something else."""
        if not isinstance(self.model, FSDPModule):
            raise LaunchError(f"FSDP2 was asked for, but the model became {type(self.model)}")
        return "FSDP2"

    def gathered(self, value: Tensor) -> Tensor:
        """All-gather a DTensor."""
        return value.full_tensor() if isinstance(value, DTensor) else value

    def part_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """Cut this rank's shard out, without communication."""
        on_device = whole.to(parameter.device, copy=True)
        mesh, placements = parameter.device_mesh, parameter.placements
        return distribute_tensor(on_device, mesh, placements, src_data_rank=None)

    def plain_model(self) -> nn.Module:
        """A copy with whole weights: evaluation takes another number of forwards on every rank."""
        return self.whole_copy()
