"""The interface of an engine, and its plainest form: one process, or DDP with a copy of everything on every rank.

A round is: `with engine.accumulating():` forward and `backward` every micro-batch, then `step`. All ranks call every method.
Weights and Adam's moments travel as whole tensors under the names of the plain model's parameters, so that what one
engine saved on any number of ranks is loaded by any other. Tested by tests/test_engines.py.
"""

import contextlib
import math
from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from mtl_dist.runtime import DTYPES

MOMENTS = ("exp_avg", "exp_avg_sq")


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that lies on this rank: of a DTensor, whose module takes a second to import, its shard."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


class Engine:
    """What training needs of an engine. `model` is called, `bare` is the module with the parameters."""

    def __init__(
        self,
        accelerator: Accelerator,
        build: Callable[[], nn.Module],
        optimizer_of: Callable[[nn.Module], torch.optim.Optimizer],
        *,
        clip_norm: float | None = None,
        precision: str = "no",
    ):
        self.accelerator, self.build, self.precision = accelerator, build, precision
        self.clip_norm = clip_norm
        self.bare = build().to(accelerator.device)
        self.shapes = {name: value.shape for name, value in self.bare.state_dict().items()}
        self.prepare_for(accelerator)
        self.model, self.optimizer = accelerator.prepare(self.bare, optimizer_of(self.bare))

    def prepare_for(self, accelerator: Accelerator) -> None:
        """Set what Accelerate must know before it wraps the model."""

    @property
    def name(self) -> str:
        """What is really in force, read back from the wrapped model."""
        raise NotImplementedError

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """torch's own optimizer, below all wrappers."""
        return self.optimizer.optimizer

    def autocast(self) -> contextlib.AbstractContextManager:
        """Return the context of forward passes in the engine's precision."""
        if self.precision == "no":
            return contextlib.nullcontext()
        return torch.autocast(self.accelerator.device.type, dtype=DTYPES[self.precision])

    @contextlib.contextmanager
    def accumulating(self) -> Iterator[None]:
        """Surround all micro-batches of a round."""
        yield

    def micro_batch(self, last: bool) -> contextlib.AbstractContextManager:
        """Surround forward and backward of a micro-batch; gradients are reduced in the last one only."""
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradient. Losses are divided by the number of ranks: gradients are averaged."""
        self.accelerator.backward(loss)

    def spoil(self) -> None:
        """Called before the end of `accumulating` where the losses are not finite, and `step` will not be."""

    def step(self) -> tuple[float, bool]:
        """Clip, step and forget the gradients: (their norm before clipping, whether the fault is the run's).

        With a norm that is not finite nothing is stepped; a fault only if it is not fp16's ordinary search for a scale.
        """
        limit, scaler = self.clip_norm or math.inf, self.accelerator.scaler
        self.accelerator.unscale_gradients(self.optimizer)
        norm = float(self.gathered(nn.utils.clip_grad_norm_(self.bare.parameters(), limit)))
        searching = scaler is not None and scaler.get_scale() >= 1.0
        if math.isfinite(norm) or scaler is not None:
            self.optimizer.step()
        self.forget()
        return norm, not math.isfinite(norm) and not searching

    def gathered(self, value: Tensor) -> Tensor:
        """Return the whole of a tensor that may lie in shards, on every rank."""
        return value

    def forget(self) -> None:
        """Drop the gradients."""
        self.optimizer.zero_grad(set_to_none=True)

    def held(self) -> dict[str, list[Tensor]]:
        """Return {parameters, gradients, optimizer: tensors} that this rank keeps now; some may share their storage."""
        states = self.inner_optimizer.state.values()
        parameters = [local(p) for p in self.bare.parameters()]
        return {
            "parameters": [*parameters, *self.bare.buffers()],
            "gradients": [local(p.grad) for p in self.bare.parameters() if p.grad is not None],
            "optimizer": [local(t) for s in states for t in s.values() if torch.is_tensor(t)],
        }

    def held_bytes(self) -> dict[str, int]:
        """Return {parameters, gradients, optimizer: bytes} that this rank keeps now, every storage counted once."""
        known, found = set(), {}
        for what, tensors in self.held().items():
            storages = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
            found[what] = sum(size for place, size in storages.items() if place not in known)
            known |= storages.keys()
        return found

    def full_state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return ({parameter: value}, {"exp_avg/parameter": value, ...}) whole, on the CPU of rank 0; empty elsewhere."""
        weights, moments = {}, {}
        for name, parameter in self.bare.named_parameters():
            self._keep(weights, name, self.whole(parameter))
            for key in MOMENTS:
                if self.has_moments(parameter):
                    self._keep(moments, f"{key}/{name}", self.whole_moment(parameter, key))
            if self.has_moments(parameter):
                self._keep(moments, f"step/{name}", self.steps_of(parameter))
        for name, buffer in self.buffers(self.bare).items():
            self._keep(weights, name, buffer)
        return weights, moments

    def buffers(self, model: nn.Module) -> dict[str, Tensor]:
        """Return what a model saves besides parameters, such as running means: every rank holds it whole."""
        return {name: value for name, value in model.named_buffers() if name in self.shapes}

    def _keep(self, tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
        if self.accelerator.is_main_process:
            tensors[name] = torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()

    def has_moments(self, parameter: nn.Parameter) -> bool:
        """Whether the optimizer has stepped this parameter; the same on all ranks."""
        return "exp_avg" in self.inner_optimizer.state.get(parameter, {})

    def whole(self, parameter: nn.Parameter) -> Tensor:
        """Return a parameter's whole value, on every rank."""
        return self.gathered(parameter)

    def whole_moment(self, parameter: nn.Parameter, key: str) -> Tensor:
        """Return one of Adam's moments of a parameter, whole, on every rank."""
        return self.gathered(self.inner_optimizer.state[parameter][key])

    def steps_of(self, parameter: nn.Parameter) -> Tensor:
        """Return how often the optimizer stepped a parameter: a scalar."""
        return self.gathered(self.inner_optimizer.state[parameter]["step"])

    def load_state(self, weights: dict[str, Tensor], moments: dict[str, Tensor]) -> None:
        """Set weights and, where they are given, Adam's moments from whole tensors that every rank has."""
        self.load_weights(weights)
        state = self.inner_optimizer.state
        for name, parameter in self.bare.named_parameters():
            if f"step/{name}" in moments:
                state[parameter] = {
                    key: self.part_of(moments[f"{key}/{name}"], parameter) for key in MOMENTS
                } | {"step": moments[f"step/{name}"].clone()}

    @torch.no_grad()
    def load_weights(self, weights: dict[str, Tensor]) -> None:
        """Set weights and buffers from whole tensors that every rank has."""
        for name, parameter in self.bare.named_parameters():
            self.set_parameter(parameter, weights[name].to(self.accelerator.device))
        for name, buffer in self.buffers(self.bare).items():
            buffer.copy_(weights[name])

    def set_parameter(self, parameter: nn.Parameter, whole: Tensor) -> None:
        """Set a parameter from its whole value on the device."""
        parameter.copy_(self.part_of(whole, parameter))

    def part_of(self, whole: Tensor, parameter: nn.Parameter) -> Tensor:
        """Return what this rank holds of a parameter-shaped tensor, on the parameter's device."""
        return whole.to(parameter.device, copy=True)

    @torch.no_grad()
    def whole_copy(self) -> nn.Module:
        """Return a new, plain model on the device with the present whole weights."""
        twin = self.build().to(self.accelerator.device)
        theirs = dict(twin.named_parameters())
        for name, parameter in self.bare.named_parameters():
            theirs[name].copy_(self.whole(parameter))
        for name, buffer in self.buffers(twin).items():
            buffer.copy_(self.buffers(self.bare)[name])
        return twin

    def plain_model(self) -> nn.Module:
        """Return an unwrapped model with the present weights, good until the next step; a rank can use it by itself."""
        return self.bare

    def scaler_state(self) -> dict | None:
        """Return fp16's loss scale, or None."""
        return None if self.accelerator.scaler is None else self.accelerator.scaler.state_dict()

    def load_scaler_state(self, saved: dict | None) -> None:
        """Set fp16's loss scale, if there is one now and there was one then."""
        if saved is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(saved)


class DataParallel(Engine):
    """One process, or torch's DistributedDataParallel."""

    @property
    def name(self) -> str:
        """DDP or one process."""
        return "DDP" if isinstance(self.model, DistributedDataParallel) else "one process"
