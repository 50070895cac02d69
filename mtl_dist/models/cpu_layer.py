"""A residual layer on a CPU: filter and gate as one product, in tiles of time that stay in a core's cache.

For the backward the layer's input is kept, and the gates too if so asked: computing them again takes a fifth more time.
Within the kernel, channels lie next to each other (B, T, C): so a tap's shift by the dilation is a shift of rows, and all
products, also those of the backward, are of plain row-major matrices. x and what is returned are (B, C, T) as everywhere, as
views of that memory: layers copy nothing.

sigmoid(b) = (1 + tanh(b / 2)) / 2, so that one tanh does for filter and gate. With f = tanh(a), g = tanh(b / 2) and e the
gradient at h = f (1 + g) / 2: the gradients at a and at b / 2 are (e + e g) (1 - f^2) / 2 and e f (1 - g^2) / 2.
Shapes: B clips, C channels, T samples, n samples of a tile. Tested by tests/test_kernels.py, timed by benchmarks/trunk.py.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from mtl_dist.models.layer import LayerWeights

TILE_BYTES = 4 * 2**20
"""What a tile's rows take for a thread: seven of C numbers (twice both products, x, two gradients). Measured: the best of
0.9 to 14 MB where a core has 2 MiB of its own cache."""
FEWEST_ROWS = 256
"""Products of fewer rows are slow, whatever fits."""

_tanh_backward = torch.ops.aten.tanh_backward.grad_input


def cpu_layer(
    x_BCT: Tensor, weights: LayerWeights, keep_gates: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (x + h, h), in float32 or float64; under autocast to a half precision, in float32."""
    x_BTC = x_BCT.transpose(1, 2).contiguous()
    hidden = _Layer.apply(x_BTC, *weights[:2], weights.dilation, False, keep_gates)
    if weights.projection is not None:
        hidden = functional.linear(hidden, weights.projection.squeeze(2), weights.projection_bias)
    return (x_BTC + hidden).transpose(1, 2), hidden.transpose(1, 2)


def cpu_layer_alone(
    x_BCT: Tensor, weights: LayerWeights, keep_gates: bool = False
) -> tuple[Tensor, None]:
    """Return (x + h, None) for trunks that do without projections and h, as the paper's: h is never in memory."""
    x_BTC = x_BCT.transpose(1, 2).contiguous()
    out_BTC = _Layer.apply(x_BTC, *weights[:2], weights.dilation, True, keep_gates)
    return out_BTC.transpose(1, 2), None


class _Layer(torch.autograd.Function):
    """x + h if `residual`, else h, (B, T, C), of x (B, T, C)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.float32)
    def forward(ctx, x_BTC, filter_gate, bias, dilation, residual, keep_gates):
        ctx.dilation, ctx.residual = dilation, residual
        past, now, halved = _halved_gate(filter_gate, bias)
        out_BTC = torch.empty_like(x_BTC)
        tiles = _Tiles(x_BTC, dilation, keep_gates)
        ctx.save_for_backward(x_BTC, filter_gate, bias, tiles.kept)
        for clip, rows, before, late in tiles:
            both = tiles.gates(clip, rows, before, late, past, now, halved)
            filtered, gate = both.chunk(2, dim=1)
            out = out_BTC[clip, rows]
            if residual:
                torch.addcmul(x_BTC[clip, rows], filtered, gate, value=0.5, out=out)
                out.add_(filtered, alpha=0.5)
            else:
                torch.addcmul(filtered, filtered, gate, out=out).mul_(0.5)
        return out_BTC

    @staticmethod
    @once_differentiable
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx, grad_BTC):
        x_BTC, filter_gate, bias, kept = ctx.saved_tensors
        past, now, halved = _halved_gate(filter_gate, bias)
        channels, grad_BTC = x_BTC.shape[2], grad_BTC.contiguous()
        wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
        factors = filter_gate.new_tensor([0.5, 0.25]).repeat_interleave(channels)
        to_past, to_now = (filter_gate * factors[:, None, None]).permute(2, 0, 1).contiguous()
        grad_x = torch.empty_like(x_BTC) if wants_x else None
        grad_taps = filter_gate.new_zeros(2, channels, 2 * channels)
        grad_bias = torch.zeros_like(bias)
        tiles = _Tiles(x_BTC, ctx.dilation)
        slopes = torch.empty_like(tiles.products)
        for clip, rows, before, late in tiles:
            if kept is None:
                both = tiles.gates(clip, rows, before, late, past, now, halved)
            else:
                both = kept[clip, rows]
            filtered, gate = both.chunk(2, dim=1)
            grad, slope = grad_BTC[clip, rows], slopes[: len(both)]
            torch.addcmul(grad, grad, gate, out=slope[:, :channels])
            torch.mul(grad, filtered, out=slope[:, channels:])
            _tanh_backward(slope, both, grad_input=slope)
            if wants_weight:
                grad_taps[0].addmm_(x_BTC[clip, before].t(), slope[late:])
                grad_taps[1].addmm_(x_BTC[clip, rows].t(), slope)
            if wants_bias:
                grad_bias += slope.sum(0)
            if wants_x:  # what lies before this tile has been written by those before it
                beside = float(ctx.residual)
                torch.addmm(grad, slope, to_now, beta=beside, out=grad_x[clip, rows])
                grad_x[clip, before].addmm_(slope[late:], to_past)
        grad_taps *= factors
        return grad_x, grad_taps.permute(2, 1, 0), grad_bias * factors, None, None, None


def _halved_gate(filter_gate: Tensor, bias: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the taps on the past and on now, (C, 2C) each, and the bias (2C,), with the gate's columns halved."""
    halves = bias.new_tensor([1.0, 0.5]).repeat_interleave(len(bias) // 2)
    past, now = (filter_gate * halves[:, None, None]).permute(2, 1, 0).contiguous()
    return past, now, bias * halves


class _Tiles:
    """The tiles of all clips, and room for one tile's products, or for all."""

    def __init__(self, x_BTC: Tensor, dilation: int, keep_gates: bool = False):
        self.x_BTC, self.dilation = x_BTC, dilation
        self.clips, self.samples, channels = x_BTC.shape
        row = 7 * channels * x_BTC.element_size()
        fit = max(FEWEST_ROWS, torch.get_num_threads() * TILE_BYTES // row)
        self.length = -(-self.samples // -(-self.samples // fit))
        self.products = x_BTC.new_empty(self.length, 2 * channels)
        self.kept = x_BTC.new_empty(*x_BTC.shape[:2], 2 * channels) if keep_gates else None

    def __iter__(self) -> Iterator[tuple[int, slice, slice, int]]:
        """Yield (clip, rows, before, late): row `late` of the tile is the first with a past, which are rows `before`.

        Of tensors without numbers there is nothing to compute.
        """
        if isinstance(self.products, FakeTensor):
            return
        for clip in range(self.clips):
            for start in range(0, self.samples, self.length):
                end = min(start + self.length, self.samples)
                late = min(max(self.dilation - start, 0), end - start)
                first = start + late - self.dilation if late < end - start else 0
                yield clip, slice(start, end), slice(first, max(first, end - self.dilation)), late

    def gates(self, clip, rows, before, late, past, now, bias) -> Tensor:
        """Return [tanh(a), tanh(b / 2)] of a tile, (n, 2C): a part of what is kept, or good until the next one."""
        x_TC = self.x_BTC[clip]
        both = self.products[: rows.stop - rows.start]
        if self.kept is not None:
            both = self.kept[clip, rows]
        torch.addmm(bias, x_TC[rows], now, out=both)
        both[late:].addmm_(x_TC[before], past)
        return both.tanh_()
