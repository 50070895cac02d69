"""Which kernel computes the trunk's layers: chosen once, at the start. Tested by tests/test_kernels.py."""

import functools
import importlib
import logging
from typing import NamedTuple

import torch
from torch import Tensor

from mtl_dist.models.cpu_layer import cpu_layer, cpu_layer_alone
from mtl_dist.models.layer import LayerKernel, LayerWeights, eager, gated, products

log = logging.getLogger("mtl_dist")


class Choice(NamedTuple):
    """A kernel by its name in model.kernel, and whether it keeps no more than a layer's input by itself."""

    name: str
    kernel: LayerKernel
    recomputes: bool


REFERENCE = Choice("eager", eager, False)


@functools.cache
def choose_kernel(asked: str, device: torch.device, alone: bool) -> Choice:
    """Return the kernel that is in force, with one line of warning, once a process, where it is not the one `asked` for.

    Args:
        asked: a value of model.kernel.
        device: where the layers will be computed.
        alone: only x + h is needed, and there are no projections.
    """
    name = asked
    if asked == "auto":
        name = "cpu" if device.type == "cpu" else "triton"
        if name == "triton" and why_not(name, device):
            name = "eager"
    elif reason := why_not(asked, device):
        log.warning("model.kernel: %s cannot run here (%s); eager is used", asked, reason)
        name = "eager"
    if name == "triton":
        return Choice(
            name, importlib.import_module("mtl_dist.models.triton_layer").triton_layer, True
        )
    if name == "cpu":
        return Choice(name, cpu_layer_alone if alone else cpu_layer, True)
    return Choice(name, compiled, False) if name == "compile" else REFERENCE


def why_not(name: str, device: torch.device) -> str | None:
    """Return why a kernel cannot run on a device, or None if it can."""
    if name == "cpu" and device.type != "cpu":
        return f"the device is {device.type}"
    if name == "compile":
        return _why_not_compile(device)
    if name == "triton":
        try:  # a GPU's build of PyTorch brings the package triton, others need not
            return importlib.import_module("mtl_dist.models.triton_layer").can_run(device)
        except ImportError as error:
            return str(error)
    return None


def _why_not_compile(device: torch.device) -> str | None:
    """Compile something small: whether there is a compiler, and one that works, only a trial shows."""
    try:
        torch.compile(_trial)(torch.zeros(3, device=device))
    except (torch._dynamo.exc.TorchDynamoException, RuntimeError) as error:
        return f"torch.compile fails: {str(error).strip().splitlines()[0]}"
    return None


def _trial(x: Tensor) -> Tensor:
    return torch.tanh(x) + 1.0


def compiled(x_BCT: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """Return (x + h, h): the convolution by PyTorch, all that follows it in one pass; compiled at the first call.

    A convolution is not fused with anything, but would be compiled anew for every dilation.
    """
    both = products(x_BCT, weights)
    return _compiled_gated()(x_BCT, both, weights.projection, weights.projection_bias)


@functools.cache
def _compiled_gated():
    return torch.compile(gated, dynamic=True)
