"""What a residual layer computes, by one of several kernels that give the same numbers; eager is the reference.

h = sigmoid(W_gate * x) . tanh(W_filter * x); x + h (paper section 3.2), kernel 2, causal.
Shapes: B clips, C channels, T samples. Tested by tests/test_model.py.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class LayerWeights(NamedTuple):
    """A layer's parameters. Rows 0 .. C-1 of filter_gate are the filter, rows C .. 2C-1 the gate; [..., 0] is the tap on the
    past x[t - dilation], [..., 1] that on x[t]. The projection, (C, C, 1) and (C,), is None where the paper has none.
    """

    filter_gate: Tensor
    """(2C, C, 2)."""
    bias: Tensor
    """(2C,)."""
    projection: Tensor | None
    projection_bias: Tensor | None
    dilation: int


LayerKernel = Callable[[Tensor, LayerWeights], tuple[Tensor, Tensor | None]]
"""kernel(x (B, C, T), weights) -> (x + h, h), both (B, C, T), with gradients for x and the weights. A kernel for trunks
that do without h may return None for it."""


def eager(x_BCT: Tensor, weights: LayerWeights) -> tuple[Tensor, Tensor]:
    """Return (x + h, h) by PyTorch's own operations."""
    return gated(x_BCT, products(x_BCT, weights), weights.projection, weights.projection_bias)


def products(x_BCT: Tensor, weights: LayerWeights) -> Tensor:
    """Return what filter and gate are computed of, (B, 2C, T)."""
    past = functional.pad(x_BCT, (weights.dilation, 0))
    return functional.conv1d(past, weights.filter_gate, weights.bias, dilation=weights.dilation)


def gated(
    x_BCT: Tensor, both: Tensor, projection: Tensor | None, projection_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return (x + h, h) of x and the products for filter and gate."""
    filtered, gate = both.chunk(2, dim=1)
    hidden = torch.sigmoid(gate) * torch.tanh(filtered)
    if projection is not None:
        hidden = functional.conv1d(hidden, projection, projection_bias)
    return x_BCT + hidden, hidden
