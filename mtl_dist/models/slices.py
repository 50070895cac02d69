"""The exact sum of a task's losses, and its gradient, in slices of time: the memory of one slice for clips of any length.

The trunk is causal and sees `receptive_field` samples, and losses are sums of terms that are local in time, or hang on a sum
over time. A pass computes the outputs start .. stop - 1 of a clip from these samples and a halo before and after, whose own
outputs are thrown away: at the true ends of a clip there is none, and trunk and head pad every layer with zeros, as
they do with whole clips. Clips shorter than a slice go through together. What is behind a clip's last term costs nothing.

Shapes: B clips, C channels, T samples, L samples of a pass. Tested by tests/test_slices.py; time and memory:
benchmarks/slices.py.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mtl_dist.models.heads import wide
from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.tasks.base import LocalTask, Task, TaskBatch


class Pass(NamedTuple):
    """Outputs start .. stop - 1 of some clips, which are computed together."""

    clips: list[int]
    start: int
    stop: int


def passes(first: int, stops: list[int], samples: int, halo: int) -> list[Pass]:
    """Cut outputs first .. stop - 1 of every clip into slices, so that no pass hears more than samples + halo samples.

    Clips that fit into one slice share a pass, the longest first; longer ones have passes of their own.
    """
    found = []
    short = [c for c, stop in enumerate(stops) if first < stop <= first + samples]
    short.sort(key=lambda clip: -stops[clip])
    while short:
        stop = stops[short[0]]
        together = max(1, (samples + halo) // (stop - first + halo))
        found.append(Pass(sorted(short[:together]), first, stop))
        short = short[together:]
    for clip, stop in enumerate(stops):
        if stop > first + samples:
            cuts = range(first, stop, samples)
            found += [Pass([clip], cut, min(cut + samples, stop)) for cut in cuts]
    return found


def can_be_sliced(task: Task, head: nn.Module) -> bool:
    """Whether task and head say how, and nothing derived from them has put something else in the place of the whole."""
    local = isinstance(task, LocalTask) and _in_step(task, "loss", ["terms"])
    local = local and _in_step(head, "forward", ["reach"])
    return local or _pooled(head)


def _pooled(head: nn.Module) -> bool:
    return _in_step(head, "forward", ["sums", "classify"])


def _in_step(thing: object, whole: str, parts: list[str]) -> bool:
    """Whether a class has the parts, and its `whole` is not newer than they are."""
    kinds, names = type(thing).__mro__, [whole, *parts]
    owners = [
        kinds[0] if n in vars(thing) else next((c for c in kinds if n in vars(c)), None)
        for n in names
    ]
    return all(owner and issubclass(owner, owners[0]) for owner in owners[1:])


class Slicer:
    """One task's trunk and head, computed `samples` samples at a time."""

    def __init__(self, trunk: WaveNetTrunk, head: nn.Module, task: Task, samples: int):
        self.trunk, self.head, self.task, self.samples = trunk, head, task, samples
        self.pooled = _pooled(head)
        self.reach = 0 if self.pooled else head.reach
        self.halo = trunk.receptive_field - 1 + 2 * self.reach

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Those of trunk and head."""
        return [*self.trunk.parameters(), *self.head.parameters()]

    @property
    def elements(self) -> int:
        """How many numbers the parameters are."""
        return sum(p.numel() for p in self.parameters)

    def loss_sum(self, batch: TaskBatch) -> Tensor:
        """Return the sum of the task's losses; its gradient is computed with it, and handed on by its backward."""
        work = self._pooled_gradients if self.pooled else self._local_gradients
        return _SumWithGradients.apply(partial(work, batch), *self.parameters)

    @torch.no_grad()
    def outputs(self, batch: TaskBatch) -> Tensor:
        """Return what the head returns for the whole clips, without gradients."""
        if self.pooled:
            sums, *_ = self._all_sums(batch)
            return wide(self.head.classify(sums, batch.valid))
        found = torch.zeros_like(wide(batch.inputs))
        for one in self._passes(0, torch.full_like(batch.valid, batch.inputs.shape[1])):
            found[one.clips, one.start : one.stop] = wide(self._outputs(batch, one))
        return found

    def _local_gradients(self, batch: TaskBatch, found: "_Gradients") -> None:
        """Slice by slice: outputs, terms, backward."""
        first, stops = self.task.positions(batch)
        for one in self._passes(first, stops):
            outputs = wide(self._outputs(batch, one))
            loss = self.task.terms(outputs, _of(one.clips, batch), one.start).sum()
            found.total += loss.detach()
            found.add(loss)

    def _pooled_gradients(self, batch: TaskBatch, found: "_Gradients") -> None:
        """The sums over time, the loss and its gradient by the sums, then every slice again, with that gradient.

        The last slice is held from the sums on, so that it is computed once.
        """
        sums, held, last, others = self._all_sums(batch)
        outputs = wide(self.head.classify(sums.requires_grad_(), batch.valid))
        loss, _ = self.task.loss(outputs, batch)
        found.total += loss.detach()
        (by_sums,) = found.add(loss, also=[sums])
        found.add(held, by_sums[last.clips])
        del held
        for one in others:
            found.add(self._sums(batch, one), by_sums[one.clips])

    def _all_sums(self, batch: TaskBatch) -> tuple[Tensor, Tensor, Pass, list[Pass]]:
        """Return the sums over time (B, F), the last pass's own with its graph, that pass, and those before it."""
        *others, last = self._passes(0, batch.valid) or [Pass([0], 0, 1)]
        with torch.no_grad():
            parts = [(one, self._sums(batch, one)) for one in others]
        held = self._sums(batch, last)
        sums = held.new_zeros(len(batch.valid), held.shape[1])
        for one, part in [*parts, (last, held.detach())]:
            sums[one.clips] += part
        return sums, held, last, others

    def _passes(self, first: int, stops: Tensor) -> list[Pass]:
        return passes(first, stops.tolist(), self.samples, self.halo)

    def _features(self, batch: TaskBatch, one: Pass) -> tuple[Tensor, Tensor, int]:
        """Return what the head must hear (B', C, L), the real samples in it (B',), and the position of the first."""
        first = max(0, one.start - self.reach)
        begin = max(0, first - self.trunk.receptive_field + 1)
        wave = _of(one.clips, batch.inputs[:, begin : one.stop + self.reach])
        hidden = self.trunk(wave)[..., first - begin :]
        return hidden, (_of(one.clips, batch.valid) - first).clamp(0, hidden.shape[-1]), first

    def _outputs(self, batch: TaskBatch, one: Pass) -> Tensor:
        """Return a pass's outputs (B', stop - start)."""
        hidden, valid, first = self._features(batch, one)
        return self.head(hidden, valid)[:, one.start - first : one.stop - first]

    def _sums(self, batch: TaskBatch, one: Pass) -> Tensor:
        """Return what a pass adds to the sums over time (B', F)."""
        hidden, valid, _ = self._features(batch, one)
        return self.head.sums(hidden, valid)


def _of(clips: list[int], tensors):
    """Return the rows of some clips, of a tensor or a batch; a view where they lie side by side."""
    if isinstance(tensors, TaskBatch):
        return TaskBatch(*(_of(clips, tensor) for tensor in tensors))
    side_by_side = clips[-1] - clips[0] == len(clips) - 1
    return tensors[clips[0] : clips[-1] + 1] if side_by_side else tensors[clips]


class _Gradients:
    """A sum of losses and the gradients of parameters, added up in fp32 or wider."""

    def __init__(self, parameters: tuple[Tensor, ...]):
        self.parameters = parameters
        self.total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        wider = [torch.promote_types(p.dtype, torch.float32) for p in parameters]
        self.sums = [torch.zeros_like(p, dtype=d) for p, d in zip(parameters, wider, strict=True)]

    def add(self, of: Tensor, upstream: Tensor | None = None, also: list[Tensor] = ()) -> tuple:
        """Add the gradients of a tensor, and return those by what else is asked for."""
        asked = [*self.parameters, *also]
        found = torch.autograd.grad(of, asked, upstream, materialize_grads=True)
        for total, gradient in zip(self.sums, found, strict=False):
            total += gradient
        return found[len(self.parameters) :]


class _SumWithGradients(torch.autograd.Function):
    """To the outside one differentiable number: its gradients exist after the forward, and the backward scales them.

    Inside, gradients are asked for by name (autograd.grad), which leaves the parameters' own gradients and the hooks on
    them alone. Autocast must not keep its copies of the weights: older torch would use those made without gradients where
    gradients are asked for (pytorch issue 112583).
    """

    @staticmethod
    def forward(ctx, work: Callable[[_Gradients], None], *parameters: Tensor) -> Tensor:
        found, kind = _Gradients(parameters), parameters[0].device.type
        with (
            torch.enable_grad(),
            torch.autocast(
                kind,
                torch.get_autocast_dtype(kind),
                enabled=torch.is_autocast_enabled(kind),
                cache_enabled=False,
            ),
        ):
            work(found)
        ctx.dtypes = [p.dtype for p in parameters]
        ctx.save_for_backward(*found.sums)
        return found.total.to(found.sums[0].dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, upstream: Tensor) -> tuple:
        gradients = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(gradient.mul_(upstream).to(dtype) for gradient, dtype in gradients)
