"""The building blocks of heads. A head's forward takes (hidden_BCT, valid_B) and returns the task's outputs.

Shapes: B clips, C trunk channels, T samples, K classes; valid_B is the number of real samples of each clip.

A head can be computed in slices of time (slices.py) if it has `reach`, as ConvHead, or `sums` and `classify`, as
PooledClassifier.
"""

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def wide(tensor: Tensor) -> Tensor:
    """Return the tensor in fp32, or as it is where it is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class ConvHead(nn.Module):
    """Convolutions over time, ReLU between: C -> hidden -> 1; one hidden layer in paper section 3.2 and Table 3.

    `hidden` has the units of each hidden layer. `width` is the filter width of all, odd and centred, so that each looks
    (width - 1) / 2 samples to either side and the middle of the trunk's window stays the middle.
    """

    def __init__(self, channels: int, hidden: Sequence[int], width: int):
        super().__init__()
        if width % 2 == 0:
            raise ValueError(f"filter_width: {width} is even; a centred filter needs an odd width")
        self.layers = layered(nn.Conv1d, [channels, *hidden, 1], width, padding=width // 2)

    @property
    def reach(self) -> int:
        """How many features before and after its own an output hangs on; beyond both ends every layer is padded by zeros."""
        return sum(layer.kernel_size[0] // 2 for layer in self.layers[::2])

    def forward(self, hidden_BCT: Tensor, valid_B: Tensor) -> Tensor:
        """Return one predicted sample per time step: (B, T)."""
        return self.layers(hidden_BCT).squeeze(1)


class PooledClassifier(nn.Module):
    """Mean over time, then an MLP: C -> hidden -> K logits; one hidden ReLU layer in paper section 3.2.4.

    `hidden` has the units of each hidden layer; none for a linear classifier. The mean is over the real samples only, so
    that zero padding does not change a clip's logits.
    """

    def __init__(self, channels: int, hidden: Sequence[int], classes: int):
        super().__init__()
        self.layers = layered(nn.Linear, [channels, *hidden, classes])

    def sums(self, hidden_BCT: Tensor, valid_B: Tensor) -> Tensor:
        """Return the features' sum over the real samples (B, C), in fp32 or wider; sums of stretches of time add up."""
        time = torch.arange(hidden_BCT.shape[-1], device=hidden_BCT.device)
        mask_BT = time < valid_B[:, None]
        with torch.autocast(
            hidden_BCT.device.type, enabled=False
        ):  # long sums: fp16 overflows, bf16 drops
            hidden_BCT = wide(hidden_BCT)
            return torch.einsum("bct,bt->bc", hidden_BCT, mask_BT.to(hidden_BCT.dtype))

    def classify(self, sums_BC: Tensor, valid_B: Tensor) -> Tensor:
        """Return logits (B, K) of clips by the sums of all their samples."""
        return self.layers(sums_BC / valid_B.clamp(min=1)[:, None])

    def forward(self, hidden_BCT: Tensor, valid_B: Tensor) -> Tensor:
        """Return logits (B, K)."""
        return self.classify(self.sums(hidden_BCT, valid_B), valid_B)


def layered(layer: type[nn.Module], units: Sequence[int], *more, **named) -> nn.Sequential:
    """Return layers from each number of units to the next, ReLU between."""
    layers = [layer(*pair, *more, **named) for pair in itertools.pairwise(units)]
    return nn.Sequential(*(part for one in layers for part in (one, nn.ReLU())))[:-1]
