"""DeepSpeed ZeRO-1, -2 and -3, through Accelerate: Adam's moments, then gradients, then parameters in shards."""

import contextlib
import math

import torch
from accelerate import Accelerator
from deepspeed.runtime.zero import GatheredParameters
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_get_full_optimizer_state,
    safe_set_full_fp32_param,
    safe_set_full_optimizer_state,
    safe_set_local_fp32_param,
    safe_set_local_optimizer_state,
    set_z3_leaf_modules,
)
from torch import Tensor, nn

from mtl_dist.engines.data_parallel import MOMENTS, Engine
from mtl_dist.models.multitask import Heads, MultitaskModel

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}


class Zero(Engine):
    """A DeepSpeedEngine that steps once a round, on gradients that are reduced once a round.

    Its own accumulation (GAS) stays 1: `coalesce_grad_reduction` adds up the micro-batches, in any order of tasks. Weights
    stay fp32 and forwards run under torch's autocast, as with the other engines, instead of DeepSpeed's bf16 weights.
    """

    def prepare_for(self, accelerator: Accelerator) -> None:
        """Complete the launch file's DeepSpeed configuration."""
        config = accelerator.state.deepspeed_plugin.deepspeed_config
        config |= {
            "train_micro_batch_size_per_gpu": 1,  # DeepSpeed wants a number; nothing here depends on it
            "gradient_accumulation_steps": 1,
            "gradient_clipping": self.clip_norm or 0.0,  # unset, Accelerate makes it 1.0
            "zero_force_ds_cpu_optimizer": False,  # torch's Adam, also where it is offloaded: no build, one formula
        }
        # unset, DeepSpeed takes room for 500 million gradients on every rank, however small the model
        most = min(500_000_000, sum(p.numel() for p in self.bare.parameters()))
        config["zero_optimization"].setdefault("reduce_bucket_size", most)
        if self.precision != "no":
            config["torch_autocast"] = {"enabled": True, "dtype": AUTOCAST[self.precision]}

    @property
    def name(self) -> str:
        """ZeRO and its stage."""
        return f"ZeRO-{int(self.model.zero_optimization_stage())}"

    @property
    def zero_optimizer(self):
        """DeepSpeed's optimizer around torch's."""
        return self.model.optimizer

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """torch's Adam, over flat shards."""
        return self.zero_optimizer.optimizer

    def accumulating(self) -> contextlib.AbstractContextManager:
        """Add up locally; reduce at the end."""
        return self.model.coalesce_grad_reduction()

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Nothing to do: `accumulating` keeps gradients local."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor) -> None:
        """Backward without the step that Accelerate would take in it."""
        self.model.backward(loss)

    def spoil(self) -> None:
        """Put a NaN into a gradient: DeepSpeed then skips its step, and cleans up, by itself."""
        self.local_gradient(next(self.bare.parameters())).fill_(math.nan)

    def local_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return what `accumulating` has added up on this rank."""
        return self.zero_optimizer.get_gradient_for_reduction(parameter)

    def step(self) -> tuple[float, bool]:
        """Clip and step; see Engine.step."""
        self.model.step()
        norm = self.model.get_global_grad_norm()
        scaler = self.zero_optimizer.torch_autocast_gradscaler
        searching = scaler is not None and scaler.get_scale() >= 1.0
        return float(norm), self.zero_optimizer.overflow and not searching

    def forget(self) -> None:
        """Let DeepSpeed skip a step that `spoil` has spoilt."""
        self.model.step()

    def has_moments(self, parameter: nn.Parameter) -> bool:
        """Whether Adam has stepped: all parameters at once."""
        return any("exp_avg" in state for state in self.inner_optimizer.state.values())

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Gather the fp32 value."""
        return safe_get_full_fp32_param(parameter)

    def whole_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Gather a moment's shards."""
        return safe_get_full_optimizer_state(parameter, key)

    def steps_of(self, parameter: nn.Parameter) -> Tensor:
        """All parameters step together."""
        return next(iter(self.inner_optimizer.state.values()))["step"]

    @torch.no_grad()
    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Set weights and moments; see Engine.load_state."""
        self.load_weights(weights)
        if not moments:
            return
        steps = next(value for key, value in moments.items() if key.startswith("step/"))
        for flat in self.flat_shards():
            state = self.inner_optimizer.state[flat]
            for key in MOMENTS:
                state.setdefault(key, torch.zeros_like(flat))
            state.setdefault("step", steps.clone()).copy_(steps)
        self.link_moments()
        for name, parameter in self.bare.named_parameters():
            for key in MOMENTS:
                value = moments[f"{key}/{name}"].to(self.accelerator.device)
                self.set_moment(parameter, value, key)

    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Gather everything; see Engine.full_state."""
        self.link_moments()
        return super().full_state()

    def held(self) -> dict[str, list[Tensor]]:
        """Add what DeepSpeed keeps beside the model: fp32 shards that Adam steps, and reduced gradients."""
        found = super().held()
        found["optimizer"] += self.flat_shards()
        found["gradients"] += self.reduced_gradients()
        return found

    def reduced_gradients(self) -> list[Tensor]:
        """Return this rank's shards of the gradient, there from the end of `accumulating` until the step."""
        groups = self.zero_optimizer.averaged_gradients.values()
        return [gradient for group in groups if group is not None for gradient in group]

    def flat_shards(self) -> list[Tensor]:
        """Return what Adam steps: this rank's fp32 shards of many parameters in one."""
        return self.zero_optimizer.single_partition_of_fp32_groups

    def link_moments(self) -> None:
        """Tell DeepSpeed where each parameter's moments lie.

        By itself it looks once, after its first parameter group has made its first step, and finds none of the others.
        """
        self.zero_optimizer._hp_optimizer_states_linked = False
        self.zero_optimizer._lazy_init_hp_params_optimizer_state()

    def set_moment(self, parameter: nn.Parameter, whole: Tensor, key: str) -> None:
        """Set the shards of one of Adam's moments."""
        safe_set_full_optimizer_state(parameter, whole, key)

    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set the fp32 shards, and the model's own parameter, which otherwise the next step would make from them."""
        safe_set_full_fp32_param(parameter, whole)
        parameter.copy_(whole)

    def scaler_state(self) -> dict | None:
        """Return fp16's loss scale, or None."""
        scaler = self.zero_optimizer.torch_autocast_gradscaler
        return None if scaler is None else scaler.state_dict()

    def load_scaler_state(self, saved: dict | None) -> None:
        """Set fp16's loss scale."""
        scaler = self.zero_optimizer.torch_autocast_gradscaler
        if saved is not None and scaler is not None:
            scaler.load_state_dict(saved)


class Zero3(Zero):
    """ZeRO-3: the model's own parameters lie in shards too, padded to equal length."""

    def prepare_for(self, accelerator: Accelerator) -> None:
        """Complete the launch file's configuration, and gather all heads together.

        A head that is first used after micro-step 0 would get a stale gradient buffer, 1e-2 off. As a leaf, idle heads get
        their zeros from DeepSpeed; touching them as well would reach parameters that it has put back into shards already.
        In slices of time, whose gradients are computed within the forward, the whole model is the leaf.
        """
        super().prepare_for(accelerator)
        leaf = Heads if self.bare.slice_samples is None else MultitaskModel
        set_z3_leaf_modules(self.bare, [leaf])
        self.bare.heads.touch_idle = False

    def local_gradient(self, parameter: nn.Parameter) -> Tensor:
        """Return what `accumulating` has added up on this rank: whole, although the parameter is in shards."""
        return parameter.grad

    def held(self) -> dict[str, list[Tensor]]:
        """Add the parameters' own shards: which fp32 ones share, and which small, whole parameters have beside them."""
        found = super().held()
        found["parameters"] += [p.ds_tensor for p in self.bare.parameters()]
        return found

    def reduced_gradients(self) -> list[Tensor]:
        """Return this rank's shards of the gradient and the buckets of the reduction: they are always there."""
        buckets = [bucket.buffer for bucket in self.zero_optimizer.ipg_buckets.values()]
        return [self.zero_optimizer.grad_partitions_flat_buffer, *buckets]

    def flat_shards(self) -> list[Tensor]:
        """Return this rank's fp32 shards."""
        return self.zero_optimizer.fp32_partitioned_groups_flat

    def link_moments(self) -> None:
        """ZeRO-3 looks moments up by parameter each time."""

    def set_moment(self, parameter: nn.Parameter, whole: Tensor, key: str) -> None:
        """Set this rank's shard of one of Adam's moments."""
        safe_set_local_optimizer_state(parameter, self.part_of(whole, parameter), key)

    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set the model's own shards, and this rank's fp32 shard, from which Adam goes on."""
        with GatheredParameters([parameter], modifier_rank=0):
            parameter.copy_(whole)
        safe_set_local_fp32_param(parameter, self.part_of(whole, parameter))

    def part_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """Cut this rank's shard out; the last one is padded with zeros. DeepSpeed's own setter takes no odd lengths."""
        size = parameter.ds_tensor.numel()
        shard = whole.flatten()[self.accelerator.process_index * size :][:size]
        return nn.functional.pad(shard, (0, size - len(shard)))

    def plain_model(self) -> nn.Module:
        """A copy with whole weights: evaluation takes another number of forwards on every rank."""
        return self.whole_copy()
