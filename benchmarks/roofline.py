"""Operations and bytes of a clip's way through the paper's trunk, by variant; on a GPU, each one's share of the roofline.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --batch 48

Variants of PyTorch's operations are followed on tensors without numbers: an operation reads each of its inputs once and
writes its output once, as if it had no cache. The kernels' counts are sums, written out in KERNELS. On a GPU the ceilings
(copying, products) and all variants are timed in the same run, in turns, by the median. How the variants compare with
torch.compile and on a CPU is measured by trunk.py. Prints the tables of README.md.
"""

import argparse
import dataclasses
import statistics
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from mtl_dist.activations import pretended
from mtl_dist.models import triton_layer
from mtl_dist.models.layer import eager
from mtl_dist.models.wavenet import WaveNetTrunk

BLOCKS, LAYERS, CHANNELS, SAMPLES = 3, 6, 64, 32_000
"""The paper's trunk and clip (Table 3, section 4.2)."""
TILE = 1_024
"""Samples of a clip that a kernel of a block of layers would keep on the chip."""
TURNS = 9


@dataclasses.dataclass(frozen=True)
class Count:
    """FLOP and bytes of a pass of one clip."""

    flop: float
    moved: float

    def __add__(self, other: "Count") -> "Count":
        return Count(self.flop + other.flop, self.moved + other.moved)

    def seconds(self, rate: float, bandwidth: float) -> float:
        """Return the least time under both ceilings, FLOP/s and bytes/s."""
        return max(self.flop / rate, self.moved / bandwidth)


class Plain(nn.Module):
    """A WaveNet as one would write it: two nn.Conv1d a layer."""

    def __init__(self):
        super().__init__()
        self.input = nn.Conv1d(1, CHANNELS, 1)
        self.dilations = [2**layer for _ in range(BLOCKS) for layer in range(LAYERS)]
        self.layers = nn.ModuleList(
            nn.ModuleList(nn.Conv1d(CHANNELS, CHANNELS, 2, dilation=d) for _ in range(2))
            for d in self.dilations
        )

    def forward(self, wave_BT):
        """Map (B, T) to (B, C, T)."""
        x = self.input(wave_BT.unsqueeze(1))
        for dilation, (filter_, gate) in zip(self.dilations, self.layers, strict=True):
            past = functional.pad(x, (dilation, 0))
            x = x + torch.tanh(filter_(past)) * torch.sigmoid(gate(past))
        return x


def recomputed(x, weights):
    """Return (x + h, h) and keep nothing but x."""
    return checkpoint(eager, x, weights, use_reentrant=False)


def total_alone(x, weights):
    """Return (x + h, None) by the Triton kernels."""
    return triton_layer.triton_layer(x, weights, with_hidden=False)


def trunk(layer) -> Callable[[], nn.Module]:
    """Return a maker of the paper's trunk with a kernel."""
    return lambda: WaveNetTrunk(BLOCKS, LAYERS, CHANNELS, kernel=layer)


OPERATIONS = {"two Conv1d": Plain, "eager": trunk(eager), "recompute": trunk(recomputed)}
"""Variants whose operations are PyTorch's, and how they are made."""
PRODUCT = 8
"""FLOP x C^2 of a layer and sample: filter and gate, two taps, multiply and add. So much for each factor's gradient too."""
HALO = 2**LAYERS - 1
FEWEST = "least"
KERNELS = {
    # name: (products of the forward, of the backward, tensors moved by the forward, by the backward), a layer
    "layer, two launches": (
        1,
        5,
        2,
        5,
    ),  # triton_layer.py: recomputes at t, at t + dilation, and for the weights
    "layer, one launch": (
        1,
        4,
        2,
        3,
    ),  # triton_layer.py with one launch: recomputes at t and at t + dilation
    "layer, in a cache": (
        1,
        3,
        2,
        3,
    ),  # each recomputed once, its gradient kept until t - dilation is done
    "block of layers": (1 + HALO / TILE, 3 * (1 + 2 * HALO / TILE), 2 / LAYERS, 3 / LAYERS),
    FEWEST: (1, 2, 2 / BLOCKS / LAYERS, 3 / BLOCKS / LAYERS),  # nothing twice, one pass over memory
}


class Moved(TorchDispatchMode):
    """Adds up the bytes that operations read and write; those that make a view, or no tensor, move nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(out))
        if made and not any(r.alias_info for r in func._schema.returns):
            tensors = [t for t in tree_leaves((args, kwargs, out)) if isinstance(t, torch.Tensor)]
            self.bytes += sum(t.numel() * t.element_size() for t in tensors)
        return out


def follow(make: Callable[[], nn.Module], half: bool) -> tuple[Count, Count]:
    """Return what forward and backward of PyTorch's operations count, without computing."""
    counts = []
    with pretended():
        model, wave = make(), torch.empty(1, SAMPLES)
        with Moved() as moved, FlopCounterMode(display=False) as flop:
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                features = model(wave)
        counts.append(Count(flop.get_total_flops(), moved.bytes))
        gradient = torch.empty_like(features)
        with Moved() as moved, FlopCounterMode(display=False) as flop:
            features.backward(gradient)
        counts.append(Count(flop.get_total_flops(), moved.bytes))
    return counts[0], counts[1]


def of_kernel(name: str, half: bool) -> tuple[Count, Count]:
    """Return what forward and backward of a kernel count, by KERNELS."""
    forward, backward, moved_forward, moved_backward = KERNELS[name]
    layers = BLOCKS * LAYERS
    product = PRODUCT * CHANNELS**2 * SAMPLES * layers
    tensor = CHANNELS * SAMPLES * (2 if half else 4) * layers
    return Count(forward * product, moved_forward * tensor), Count(
        backward * product, moved_backward * tensor
    )


def counted(half: bool) -> dict[str, tuple[Count, Count]]:
    """Return {variant: (forward, backward)} of one clip."""
    followed = {name: follow(make, half) for name, make in OPERATIONS.items()}
    return followed | {name: of_kernel(name, half) for name in KERNELS}


def print_row(*cells: str) -> None:
    """Print a row of a table in Markdown."""
    print("|", " | ".join(cells), "|", flush=True)


def print_counts() -> None:
    """Print GFLOP and MB of a clip by variant."""
    print(f"{BLOCKS} x {LAYERS} layers, {CHANNELS} channels, a clip of {SAMPLES} samples:\n")
    heads = ["variant", "GFLOP forward", "GFLOP backward", "MB forward, fp32", "MB backward, fp32"]
    print_row(*heads, "MB both, bf16", "FLOP a byte, bf16")
    print_row(*["---"] * 7)
    in_bf16 = counted(half=True)
    for name, passes in counted(half=False).items():
        both = in_bf16[name][0] + in_bf16[name][1]
        cells = [f"{count.flop / 1e9:.1f}" for count in passes]
        cells += [f"{count.moved / 1e6:,.0f}" for count in passes]
        print_row(name, *cells, f"{both.moved / 1e6:,.0f}", f"{both.flop / both.moved:,.0f}")


def seconds(work: Callable[[], None]) -> float:
    """Return the GPU's time for `work`."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    work()
    ended.record()
    torch.cuda.synchronize()
    return began.elapsed_time(ended) / 1e3


def in_turns(works: dict[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Return each work's times, after two turns to warm up."""
    times = {name: [] for name in works}
    for turn in range(TURNS + 2):
        for name, work in works.items():
            taken = seconds(work)
            if turn >= 2:
                times[name].append(taken)
    return times


def ceilings(dtype: torch.dtype) -> tuple[float, float]:
    """Return (FLOP/s of a large product, bytes/s of a large copy) of this GPU."""
    side = 8_192
    one, other = (torch.randn(side, side, device="cuda", dtype=dtype) for _ in range(2))
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    works = {"product": lambda: one @ other, "copy": lambda: target.copy_(source)}
    times = {name: statistics.median(taken) for name, taken in in_turns(works).items()}
    return 2 * side**3 / times["product"], 2 * source.numel() / times["copy"]


def backward_in(launches: tuple, layer) -> Callable:
    """Return the layer with its backward in these launches; they are looked up when the backward runs."""

    def chosen(x, weights):
        triton_layer.LAUNCHES = launches
        return layer(x, weights)

    return chosen


def print_shares(batch: int, half: bool) -> None:
    """Time forward and backward of all variants that run here, and print their shares of the roofline."""
    two, one = ((True, False), (False, True)), ((True, True),)
    makers = OPERATIONS | {
        "layer, two launches": trunk(backward_in(two, total_alone)),
        "layer, one launch": trunk(backward_in(one, total_alone)),
    }
    wave = torch.randn(batch, SAMPLES, device="cuda")

    def work(model: nn.Module, backward: bool) -> Callable[[], None]:
        def run():
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                features = model(wave)
            if backward:
                features.backward(features.detach())

        return run

    works = {}
    for name, make in makers.items():
        model = make().cuda()
        works |= {(name, backward): work(model, backward) for backward in (False, True)}
    times = in_turns(works)
    rate, bandwidth = ceilings(torch.bfloat16 if half else torch.float32)
    kind = "bf16" if half else "fp32 (TF32)"
    print(f"\n{torch.cuda.get_device_name()}, {kind}, batch {batch}: products {rate / 1e12:.0f} ")
    print(
        f"TFLOP/s, copies {bandwidth / 1e12:.2f} TB/s; least time of its own counts / of `{FEWEST}`:\n"
    )
    print_row("variant", "pass", "ms, median", "ms, range", "own roofline", FEWEST)
    print_row(*["---"] * 6)
    counts = counted(half)
    for (name, backward), taken in times.items():
        own, least = (
            sum((c.seconds(rate, bandwidth) for c in counts[key][: 1 + backward]), 0.0) * batch
            for key in (name, FEWEST)
        )
        median = statistics.median(taken)
        spread = f"{min(taken) * 1e3:.2f} to {max(taken) * 1e3:.2f}"
        shares = [f"{share / median:.0%}" for share in (own, least)]
        both = "forward and backward" if backward else "forward"
        print_row(name, both, f"{median * 1e3:.2f}", spread, *shares)


def main() -> None:
    """Print the counts and, where there is a GPU, the measured shares."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=16, help="clips that are timed at once")
    arguments = parser.parse_args()
    print_counts()
    if not torch.cuda.is_available():
        print("\nNo CUDA GPU here: nothing is timed.")
        return
    torch.backends.cuda.matmul.allow_tf32 = True  # as cuDNN's convolutions are by default
    for half in (True, False):
        print_shares(arguments.batch, half)


if __name__ == "__main__":
    main()
