"""Forward and backward of the paper's trunk (3 x 6 layers, 64 channels), by every kernel and by a plain PyTorch WaveNet.

    OMP_NUM_THREADS=1 python benchmarks/trunk.py                     on a CPU, one thread; about 5 minutes
    OMP_NUM_THREADS=2 python benchmarks/trunk.py
    OMP_NUM_THREADS=1 python benchmarks/trunk.py --seconds 0.125 --batch 4       a slice of time at once
    python benchmarks/trunk.py --precisions bf16 fp32 --batch 8 16 32 64 128     on a GPU, until memory ends

`plain` has two nn.Conv1d a layer, as WaveNets are mostly written; `plain compiled` is torch.compile of it. Contenders take
turns within one process; ratios are of two in the same turn: median and middle half. Products are counted from shapes: two
taps of 2C x C a sample and layer, and twice that for the backward; what a kernel computes again is not counted as done. GEMM
is a square matrix product in the same precision, timed in the same turns. Kept is what the forward leaves for the backward,
peak what it and the backward make at most, both beside parameters, gradients and the wave; on a GPU as its allocator says.
"""

import argparse
import contextlib
import functools
import gc
import statistics
import sys
import time

import torch
from torch import nn
from torch.nn import functional

from mtl_dist.activations import LiveBytes
from mtl_dist.models.kernels import Where, choose_kernel
from mtl_dist.models.layer import eager
from mtl_dist.models.storage import recomputed
from mtl_dist.models.wavenet import WaveNetTrunk

BLOCKS, LAYERS, CHANNELS, RATE = 3, 6, 64, 16_000
SQUARE = {"cpu": 1024, "cuda": 8192}


class PlainLayer(nn.Module):
    """A residual layer of two convolutions."""

    def __init__(self, channels: int, dilation: int):
        super().__init__()
        self.dilation = dilation
        self.filter = nn.Conv1d(channels, channels, 2, dilation=dilation)
        self.gate = nn.Conv1d(channels, channels, 2, dilation=dilation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x + h."""
        past = functional.pad(x, (self.dilation, 0))
        return x + torch.tanh(self.filter(past)) * torch.sigmoid(self.gate(past))


class PlainWaveNet(nn.Module):
    """The paper's trunk as a tutorial would write it."""

    def __init__(self):
        super().__init__()
        dilations = [2**layer for _ in range(BLOCKS) for layer in range(LAYERS)]
        layers = [PlainLayer(CHANNELS, dilation) for dilation in dilations]
        self.layers = nn.Sequential(nn.Conv1d(1, CHANNELS, 1), *layers)

    def forward(self, wave: torch.Tensor) -> torch.Tensor:
        """Map waves (B, T) to features (B, C, T)."""
        return self.layers(wave.unsqueeze(1))


def contenders(device: torch.device, names: list[str]) -> dict[str, nn.Module]:
    """Return the models that can run here; the first is what the others are held against."""
    kernels = {}
    for name in ("eager", "compile", "cpu", "triton"):
        if name == (chosen := choose_kernel(name, Where(device, CHANNELS), True)).name:
            kernels[f"ours {name}"] = chosen.kernel
    if "ours cpu" in kernels:
        again = choose_kernel("cpu", Where(device, CHANNELS), True, keeps=False)
        kernels["ours cpu, layer recomputed"] = again.kernel
    kernels["ours eager, layer recomputed"] = functools.partial(recomputed, eager)
    plain = PlainWaveNet()
    models = {"plain": plain}
    if "ours compile" in kernels:
        models["plain compiled"] = torch.compile(PlainWaveNet())
    models |= {n: WaveNetTrunk(BLOCKS, LAYERS, CHANNELS, kernel=k) for n, k in kernels.items()}
    kept = {n: m for n, m in models.items() if n == "plain" or not names or n in names}
    return {name: model.to(device) for name, model in kept.items()}


def step(model: nn.Module, wave: torch.Tensor, autocast) -> None:
    """Forward and backward."""
    model.zero_grad(set_to_none=True)
    with autocast():
        features = model(wave)
    features.backward(torch.ones_like(features).div_(features.numel()))


def seconds_of(act, device: torch.device) -> float:
    """Wall time of a call."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    act()
    wait()
    return time.perf_counter() - began


def memory_of(model: nn.Module, wave: torch.Tensor, autocast) -> tuple[float, float]:
    """Return (kept, peak) in MB."""
    step(model, wave, autocast)
    gc.collect()
    if wave.device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        with autocast():
            features = model(wave)
        kept = torch.cuda.memory_allocated() - before
        features.sum().backward()
        return kept / 1e6, (torch.cuda.max_memory_allocated() - before) / 1e6
    known = [*model.parameters(), *(p.grad for p in model.parameters()), wave]
    with LiveBytes(known) as live:
        features = model(wave)
        kept = live.now
        features.sum().backward()
    return kept / 1e6, live.peak / 1e6


def turns_of(models, wave, autocast, square, turns: int) -> dict[str, list[float]]:
    """Return {contender: seconds of every turn}, with those of the matrix product among them."""
    acts = {n: functools.partial(step, m, wave, autocast) for n, m in models.items()}
    acts["GEMM"] = functools.partial(torch.mm, square, square)
    seconds: dict[str, list[float]] = {name: [] for name in acts}
    for act in acts.values():  # what is compiled is compiled now
        act()
        act()
    for _ in range(turns):
        for name, act in acts.items():
            seconds[name].append(seconds_of(act, wave.device))
    return seconds


def measure(models: dict[str, nn.Module], wave, precision: str, turns: int) -> None:
    """Print a row for every contender."""
    device = wave.device
    autocast = contextlib.nullcontext
    if precision == "bf16":
        autocast = functools.partial(torch.autocast, device.type, dtype=torch.bfloat16)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    square = torch.randn(SQUARE[device.type], SQUARE[device.type], device=device, dtype=dtype)
    seconds = turns_of(models, wave, autocast, square, turns)
    peak_rate = 2 * len(square) ** 3 / statistics.median(seconds.pop("GEMM")) / 1e9
    taps = 3 * wave.numel() * BLOCKS * LAYERS * 2 * (2 * 2 * CHANNELS * CHANNELS) / 1e9
    clips, samples = wave.shape
    print(
        f"\n{clips} x {samples / RATE:g} s, {precision}, {taps:.1f} GFLOP; GEMM {peak_rate:.0f} GFLOP/s; "
        f"medians of {turns}\n"
    )
    print("| contender | ms | plain / it | middle half | share of GEMM | kept, MB | peak, MB |")
    print("|---|---|---|---|---|---|---|")
    for name, model in models.items():
        ratios = [a / b for a, b in zip(seconds["plain"], seconds[name], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        median = statistics.median(seconds[name])
        kept = ["", ""]
        if name != "plain compiled" or device.type == "cuda":  # compiled code hides from a count
            kept = [f"{size:.0f}" for size in memory_of(model, wave, autocast)]
        row = [name, f"{1e3 * median:.0f}", f"{middle:.2f}", f"{low:.2f} to {high:.2f}"]
        row += [f"{taps / median / peak_rate:.0%}", *kept]
        print("| " + " | ".join(row) + " |", flush=True)


def main() -> None:
    """Measure every precision and batch."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=1.0, help="length of a clip")
    parser.add_argument("--batch", type=int, nargs="+", default=[2])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16"], default=["fp32"])
    parser.add_argument("--only", nargs="*", default=[], help="names of contenders beside plain")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{torch.get_num_threads()} threads"
    )
    print(f"{device.type}, {name}, PyTorch {torch.__version__}")
    models = contenders(device, options.only)
    for precision in options.precisions:
        for clips in options.batch:
            wave = 0.1 * torch.randn(clips, round(options.seconds * RATE), device=device)
            try:
                measure(models, wave, precision, options.turns)
            except torch.OutOfMemoryError:
                print(f"\n{clips} clips, {precision}: a contender runs out of memory")
                break


if __name__ == "__main__":
    sys.exit(main())
