"""A residual layer by Triton kernels: the forward reads x once and writes x + h once, the backward needs nothing but x.

    TRITON_INTERPRET=1 python -m pytest tests/test_triton.py

Bytes for an element of x in half precision (in full: twice as many): the forward reads 2 and writes 2, and 2 more where h is
asked for. The backward reads x and the gradient of x + h twice, once for the gradient of x (2 bytes written) and once for
those of the weights: 10. x[t - dilation] and x[t + dilation] come out of a cache. Operations: a forward's 8 C^2 a sample for
each of three recomputations (at t and t + dilation, and for the weights), 16 C^2 for the gradients.
Shapes: B clips, C channels, T samples.
"""

import functools
import importlib.util
from typing import NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mtl_dist.models.layer import LayerWeights, eager

CHANNELS = 64
"""At most. A program holds the weights of all channels; those of 128 do not fit the shared memory of an H100."""
LAUNCHES = ((True, False), (False, True))
"""Of the backward: (gradient of x, gradients of the weights). All in one, ((True, True),), reads least, but needs more
registers than there are and writes them to memory in between.
"""
SHARED = {torch.float32: 152 * 1024, torch.bfloat16: 88 * 1024, torch.float16: 88 * 1024}
"""Bytes of shared memory that the largest program takes, compiled for compute capability 9.0 (tests/test_triton.py)."""
INTERPRETED_PROGRAMS = 3
"""Few, so that the interpreter's programs walk over several tiles as a GPU's do."""


class Precision(NamedTuple):
    """In what products are taken: the type of their operands, and what tl.dot does with fp32 ones."""

    dtype: torch.dtype
    dot: str


class Outputs(NamedTuple):
    """Which of a layer's outputs are wanted, or have a gradient."""

    total: bool
    """x + h."""
    hidden: bool
    """h."""


def can_run(
    device: torch.device, channels: int = 1, dtype: torch.dtype = torch.bfloat16
) -> str | None:
    """Return why this kernel cannot compute layers of `channels` with products in `dtype`, or None where it can.

    `dtype` is autocast's where that is on, else the parameters'. The defaults ask about the device alone.
    """
    return layers_reason(channels, dtype) or _device_reason(device, dtype)


def layers_reason(channels: int, dtype: torch.dtype) -> str | None:
    """Return can_run's reason on any device, or None."""
    if channels > CHANNELS:
        return f"{channels} channels are more than {CHANNELS}"
    return None if dtype in SHARED else f"the precision is {dtype}"


def _device_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    if not _installed():
        return "triton is not installed"
    from mtl_dist.models import triton_kernels

    if triton_kernels.interpreted():
        return None
    if device.type != "cuda" or torch.version.cuda is None:
        return f"the device is {device.type}, not an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU's compute capability {major}.{minor} is below 8.0"
    shared = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if shared < SHARED[dtype]:
        return f"{SHARED[dtype]} bytes of shared memory are more than the GPU's {shared}"
    if dtype == torch.float32 and not torch.backends.cudnn.allow_tf32:
        return "the precision is float32 without TF32 (torch.backends.cudnn.allow_tf32)"
    return None


@functools.cache
def _installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def products_in(x: Tensor) -> torch.dtype:
    """Return the type that a convolution of x would be computed in here: autocast's where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def settings(kernel: str, channels: int, precision: Precision) -> dict:
    """Return the constants that a kernel of triton_kernels.py is compiled with, whatever the outputs."""
    import triton

    from mtl_dist.models import triton_kernels

    half = precision.dtype != torch.float32
    block = 64 if half or kernel == "forward_kernel" else 32  # as registers and shared memory allow
    return {
        "C": channels,
        "BLOCK_C": max(16, triton.next_power_of_2(channels)),
        "BLOCK_T": block,
        "DTYPE": getattr(triton.language, str(precision.dtype).removeprefix("torch.")),
        "WIDE": triton_kernels.interpreted(),
        "PRECISION": precision.dot,
        "FULL": not half,
        "num_warps": 4 if block == 64 else 8,
        "num_stages": 1,
    }


def _launch(kernel: str, x_BCT: Tensor, pointers: list[Tensor], precision: Precision, **flags):
    """Run a kernel on all tiles of x; on tensors without numbers do nothing."""
    if isinstance(x_BCT, FakeTensor):
        return
    from mtl_dist.models import triton_kernels

    clips, channels, samples = x_BCT.shape
    run = getattr(triton_kernels, kernel)[(_programs(x_BCT),)]
    flags |= settings(kernel, channels, precision)
    with torch.cuda.device_of(x_BCT):
        run(*pointers, clips, samples, **flags)


def _programs(x_BCT: Tensor) -> int:
    """Return how many programs share the tiles: two for every multiprocessor, as shared memory and registers allow."""
    if x_BCT.device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return 2 * torch.cuda.get_device_properties(x_BCT.device).multi_processor_count


class _Gated(torch.autograd.Function):
    """(x, weight, bias, dilation, precision, wanted) -> (x + h or None, h or None), without a projection."""

    @staticmethod
    def forward(ctx, x_BCT, weight, bias, dilation, precision, wanted):
        ctx.save_for_backward(x_BCT, weight, bias)
        ctx.set_materialize_grads(False)
        ctx.dilation, ctx.precision = dilation, precision
        wide = torch.promote_types(x_BCT.dtype, precision.dtype)
        total = torch.empty_like(x_BCT, dtype=wide) if wanted.total else None
        hidden = torch.empty_like(x_BCT, dtype=precision.dtype) if wanted.hidden else None
        written = [x_BCT if output is None else output for output in (total, hidden)]
        flags = {"dilation": dilation, "OUT": wanted.total, "HIDDEN": wanted.hidden}
        pointers = [x_BCT, weight.contiguous(), bias, *written]
        _launch("forward_kernel", x_BCT, pointers, precision, **flags)
        return total, hidden

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_total, grad_hidden):
        x_BCT, weight, bias = ctx.saved_tensors
        given = Outputs(grad_total is not None, grad_hidden is not None)
        read = [x_BCT if g is None else g.contiguous() for g in (grad_total, grad_hidden)]
        parts = (_programs(x_BCT),)
        grad_x = torch.empty_like(x_BCT)
        weight_parts = weight.new_empty(parts + weight.shape, dtype=torch.float32)
        bias_parts = bias.new_empty(parts + bias.shape, dtype=torch.float32)
        pointers = [x_BCT, weight.contiguous(), bias, *read, grad_x, weight_parts, bias_parts]
        flags = {"dilation": ctx.dilation, "OUT": given.total, "HIDDEN": given.hidden}
        for of_x, of_weights in LAUNCHES:
            flags |= {"OF_X": of_x, "OF_WEIGHTS": of_weights}
            _launch("backward_kernel", x_BCT, pointers, ctx.precision, **flags)
        summed = (p.sum(0).to(weight.dtype) for p in (weight_parts, bias_parts))
        return grad_x, *summed, None, None, None


def triton_layer(
    x_BCT: Tensor, weights: LayerWeights, with_hidden: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Return (x + h, h), as layer.eager does; h is None, and not written, without `with_hidden`.

    Types are those of eager under the same autocast; sums are in fp32. A projection is PyTorch's own convolution of h. Where
    can_run gives a reason against the precision or the channels, eager computes the layer.
    """
    dtype = products_in(x_BCT)
    reason = layers_reason(x_BCT.shape[1], dtype)
    if not isinstance(x_BCT, FakeTensor):  # those stand for a GPU's wherever they are
        reason = reason or _device_reason(x_BCT.device, dtype)
    if reason is not None:
        return eager(x_BCT, weights)
    x_BCT = x_BCT.contiguous()
    projected = weights.projection is not None
    wanted = Outputs(total=not projected, hidden=projected or with_hidden)
    precision = Precision(dtype, "tf32" if x_BCT.is_cuda else "ieee")
    gated = x_BCT, weights.filter_gate, weights.bias, weights.dilation
    total, hidden = _Gated.apply(*gated, precision, wanted)
    if projected:
        hidden = functional.conv1d(hidden, weights.projection, weights.projection_bias)
        total = x_BCT + hidden
    return total, hidden
