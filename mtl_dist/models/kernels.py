"""Which kernel computes the trunk's layers: chosen once, at the start. Tested by tests/test_kernels.py."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist.models.cpu_layer import cpu_layer, cpu_layer_alone
from mtl_dist.models.layer import LayerKernel, LayerWeights, eager, gated, products
from mtl_dist.models.triton_layer import can_run, layers_reason, triton_layer


class Choice(NamedTuple):
    """A kernel by its name in model.kernel, and whether it keeps no more than a layer's input by itself."""

    name: str
    kernel: LayerKernel
    recomputes: bool
    warning: str = ""
    """Why it is not the one that was asked for."""


class Where(NamedTuple):
    """What a kernel must be able to compute; `dtype` is autocast's, or else the parameters'."""

    device: torch.device
    channels: int
    dtype: torch.dtype = torch.float32


REFERENCE = Choice("eager", eager, False)


def choose_kernel(asked: str, where: Where, alone: bool, keeps: bool = True) -> Choice:
    """Return the kernel that is in force, the reference with a warning where that which was `asked` for cannot run.

    Args:
        asked: a value of model.kernel.
        where: what it is chosen for.
        alone: only x + h is needed, and there are no projections.
        keeps: the gates may be kept for the backward, where that is faster.
    """
    name = asked
    if asked == "auto":
        name = "cpu" if where.device.type == "cpu" else "triton"
    if reason := why_not(name, where):
        text = f"model.kernel: {name} cannot run here ({reason}); eager is used"
        return REFERENCE._replace(warning=text)
    return _named(name, alone, keeps)


def expected_kernel(
    asked: str, channels: int, dtype: torch.dtype, alone: bool, keeps: bool
) -> Choice:
    """Return the kernel that would be in force on a machine that has what it needs, auto's being a GPU."""
    name = "triton" if asked == "auto" else asked
    return (
        REFERENCE
        if name == "triton" and layers_reason(channels, dtype)
        else _named(name, alone, keeps)
    )


def _named(name: str, alone: bool, keeps: bool) -> Choice:
    if name == "triton":
        return Choice(name, functools.partial(triton_layer, with_hidden=not alone), True)
    if name == "cpu":
        layer = cpu_layer_alone if alone else cpu_layer
        return Choice(name, functools.partial(layer, keep_gates=keeps), not keeps)
    return Choice(name, compiled, False) if name == "compile" else REFERENCE


def why_not(name: str, where: Where) -> str | None:
    """Return why a kernel cannot run, or None if it can."""
    if name == "cpu" and where.device.type != "cpu":
        return f"the device is {where.device.type}"
    if name == "compile":
        return trial(compiled, where)
    if name == "triton":
        return can_run(*where) or trial(triton_layer, where)
    return None


def trial(kernel: LayerKernel, where: Where) -> str | None:
    """Compute something small with a kernel that has yet to be compiled, and return what is wrong with it, or None.

    Whether there is a compiler, and one that works, only a trial shows; and it can fail in any way.
    """
    rng = torch.Generator().manual_seed(0)
    shapes = (2, where.channels, 70), (2 * where.channels, where.channels, 2), (2 * where.channels,)
    drawn = [torch.randn(shape, generator=rng) / 4 for shape in shapes]
    drawn[0] = drawn[0].to(where.dtype).float()  # the layers before round x
    truth = _with_gradients(eager, drawn, torch.float32)
    half = where.dtype in (torch.bfloat16, torch.float16)
    try:
        with torch.autocast(where.device.type, where.dtype if half else None, enabled=half):
            found = _with_gradients(
                kernel, [tensor.to(where.device) for tensor in drawn], where.dtype
            )
    except Exception as error:
        text = next(iter(str(error).strip().splitlines()), "")
        return f"a trial fails: {type(error).__name__}: {text}"
    pairs = zip(found, truth, strict=True)
    off = max(float((a.double().cpu() - b).norm() / b.norm()) for a, b in pairs)
    return None if off < ROUNDING[where.dtype] else f"in a trial it is {off:.1e} off"


ROUNDING = {torch.float32: 5e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""How far a trial may be off, relative: the products' operands are rounded (fp32: to TF32)."""


def _with_gradients(kernel: LayerKernel, drawn: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Return x + h of a layer and the gradients of half its squares' sum, x in a precision."""
    inputs = [tensor.clone().requires_grad_() for tensor in drawn]
    total, _ = kernel(inputs[0].to(dtype), LayerWeights(*inputs[1:], None, None, 3))
    return [total.detach(), *torch.autograd.grad(total.float().square().sum() / 2, inputs)]


def compiled(x_BCT: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """Return (x + h, h): the convolution by PyTorch, all that follows it in one pass; compiled at the first call.

    A convolution is not fused with anything, but would be compiled anew for every dilation.
    """
    both = products(x_BCT, weights)
    return _compiled_gated()(x_BCT, both, weights.projection, weights.projection_bias)


@functools.cache
def _compiled_gated():
    return torch.compile(gated, dynamic=True)
