"""The trunk: a causal, dilated WaveNet without its output stack (paper section 3.2, Table 3).

Shapes: B clips, C channels, T samples. Tested by tests/test_model.py.
"""

import contextlib

import torch
from torch import Tensor, nn

from mtl_dist.models.layer import LayerKernel, LayerWeights, eager
from mtl_dist.models.storage import kept_in_bf16, recomputed


def receptive_field(blocks: int, layers: int) -> int:
    """Number of input samples that an output sample depends on: tau = 1 + N (2^S - 1) (paper section 3.2)."""
    return 1 + blocks * (2**layers - 1)


class ResidualLayer(nn.Module):
    """One layer's parameters; `kernel` computes it (layer.py).

    Filter and gate are one convolution with twice the channels. `project`: a 1x1 convolution of h in the residual path,
    as in the original WaveNet (van den Oord et al. 2016, section 2.4); the paper's formula has none.
    """

    def __init__(self, channels: int, dilation: int, project: bool, kernel: LayerKernel):
        super().__init__()
        self.dilation, self.kernel = dilation, kernel
        self.filter_gate = nn.Conv1d(channels, 2 * channels, kernel_size=2, dilation=dilation)
        self.projection = nn.Conv1d(channels, channels, 1) if project else None

    def forward(self, x_BCT: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return (x + h, h); for h see LayerKernel."""
        projection = (None, None)
        if self.projection is not None:
            projection = self.projection.weight, self.projection.bias
        filter_gate = self.filter_gate.weight, self.filter_gate.bias
        return self.kernel(x_BCT, LayerWeights(*filter_gate, *projection, self.dilation))


class WaveNetTrunk(nn.Module):
    """1x1 convolution (1 -> C), then N blocks of S residual layers, dilation 1, 2, 4, ... restarted in each block.

    `skip_outputs` returns the sum of all h instead of the last x, as the original WaveNet feeds its output stack.
    `input_gain` multiplies the first convolution's initial weights: with PyTorch's default (1.0) a quiet wave hardly
    reaches the curved part of tanh and sigmoid, and training starts slowly.
    `recompute_blocks`: of a block, only its input is kept for the backward. `bf16_storage`: see models/storage.py.
    """

    def __init__(
        self,
        blocks: int = 3,
        layers: int = 6,
        channels: int = 64,
        residual_projection: bool = False,
        skip_outputs: bool = False,
        input_gain: float = 1.0,
        kernel: LayerKernel = eager,
        recompute_blocks: bool = False,
        bf16_storage: bool = False,
    ):
        super().__init__()
        self.channels, self.layers_per_block = channels, layers
        self.recompute_blocks, self.bf16_storage = recompute_blocks, bf16_storage
        self.receptive_field = receptive_field(blocks, layers)
        self.skip_outputs = skip_outputs
        self.input = nn.Conv1d(1, channels, 1)
        with torch.no_grad():
            self.input.weight.mul_(input_gain)
        self.layers = nn.ModuleList(
            ResidualLayer(channels, 2**layer, residual_projection, kernel)
            for _ in range(blocks)
            for layer in range(layers)
        )

    def forward(self, wave_BT: Tensor) -> Tensor:
        """Map waves (B, T) in [-1, 1] to features (B, C, T); output t depends on inputs t - tau + 1 .. t."""
        with kept_in_bf16() if self.bf16_storage else contextlib.nullcontext():
            x, skips = self.input(wave_BT.unsqueeze(1)), None
            for first in range(0, len(self.layers), self.layers_per_block):
                if self.recompute_blocks:
                    x, skips = recomputed(self._block, first, x, skips)
                else:
                    x, skips = self._block(first, x, skips)
        return x if skips is None else skips

    def _block(self, first: int, x: Tensor, skips: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return x after a block, and with skip_outputs the sum of all h so far."""
        for layer in self.layers[first : first + self.layers_per_block]:
            x, hidden = layer(x)
            if self.skip_outputs:
                skips = hidden if skips is None else skips + hidden
        return x, skips
