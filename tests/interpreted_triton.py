"""The Triton layer against the eager one in float64, on any device that it runs on.

    TRITON_INTERPRET=1 python -m pytest tests/interpreted_triton.py

test_triton.py runs it, in a process of its own: the variable must be set before triton is imported.
"""

import pytest
import torch
from torch import Tensor

from mtl_dist.activations import pretended
from mtl_dist.models import triton_kernels
from mtl_dist.models.layer import LayerWeights, eager
from mtl_dist.models.triton_layer import can_run, triton_layer
from mtl_dist.models.wavenet import WaveNetTrunk

DEVICE = "cpu" if triton_kernels.interpreted() else "cuda"
SHAPES = [
    (1, 4, 1, 1),
    (2, 13, 7, 2),
    (1, 13, 7, 32),
    (3, 4, 33, 4),
    (2, 64, 190, 16),
    (1, 5, 257, 32),
    (1, 64, 129, 1),
]
"""(B, C, T, dilation): no multiples of anything, and dilations of more than a tile and than the clip."""


def made(clips, channels, samples, dilation, project=False):
    """x, weights and gradients of x + h and of h, float64 on the CPU."""
    torch.manual_seed(samples)

    def normal(*shape, scale=1.0):
        return (scale * torch.randn(*shape, dtype=torch.float64)).float().double()

    square = channels**-0.5
    projection = (None, None)
    if project:
        projection = normal(channels, channels, 1, scale=square), normal(channels)
    weights = LayerWeights(
        normal(2 * channels, channels, 2, scale=square), normal(2 * channels), *projection, dilation
    )
    x, *gradients = (normal(clips, channels, samples) for _ in range(3))
    return x, weights, gradients


def run(layer, x: Tensor, weights: LayerWeights, gradients, dtype, which=(True, True)):
    """Outputs and gradients of x and every parameter, by `layer` on `dtype`; `which` outputs have a gradient."""
    device = "cpu" if dtype == torch.float64 else DEVICE
    tensors = [x, *(w for w in weights[:4] if w is not None)]
    tensors = [t.to(device, dtype).requires_grad_() for t in tensors]
    outputs = layer(tensors[0], LayerWeights(*[*tensors[1:], None, None][:4], weights.dilation))
    chosen = [(o, g) for o, g, w in zip(outputs, gradients, which, strict=True) if w]
    outputs, gradients = zip(*chosen, strict=True)
    gradients = [g.to(o.device, o.dtype) for g, o in zip(gradients, outputs, strict=True)]
    return [*outputs, *torch.autograd.grad(outputs, tensors, gradients)]


def check_equal(found: list[Tensor], truth: list[Tensor], bound: float):
    """Every tensor's error, relative to the largest magnitude of its truth, is within the bound."""
    assert len(found) == len(truth)
    for number, (one, other) in enumerate(zip(found, truth, strict=True)):
        error = (one.double().cpu() - other).abs().max() / other.abs().max()
        assert one.shape == other.shape
        assert error <= bound, (number, error)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_outputs_and_gradients_in_fp32(shape):
    case = made(*shape)
    check_equal(run(triton_layer, *case, torch.float32), run(eager, *case, torch.float64), 1e-5)


@pytest.mark.parametrize("which", [(True, False), (False, True)], ids=["x + h", "h"])
def test_an_output_without_a_gradient_adds_none(which):
    case = made(2, 6, 70, 8)
    truth = run(eager, *case, torch.float64, which)
    check_equal(run(triton_layer, *case, torch.float32, which), truth, 1e-5)


def test_x_plus_h_without_h():
    case = made(2, 6, 70, 8)

    def total_alone(x, weights):
        total, hidden = triton_layer(x, weights, with_hidden=False)
        assert hidden is None
        return total, None

    truth = run(eager, *case, torch.float64, (True, False))
    check_equal(run(total_alone, *case, torch.float32, (True, False)), truth, 1e-5)


def test_a_projection():
    case = made(2, 6, 70, 8, project=True)
    check_equal(run(triton_layer, *case, torch.float32), run(eager, *case, torch.float64), 1e-5)


def test_quiet_inputs_keep_their_digits():
    """tanh(x) near 0 is x to the last digit, not the difference of two numbers near 1."""
    x, weights, gradients = made(1, 4, 33, 2)
    weights = weights._replace(bias=torch.zeros_like(weights.bias))
    case = (1e-3 * x).float().double(), weights, gradients
    check_equal(run(triton_layer, *case, torch.float32), run(eager, *case, torch.float64), 1e-6)


def test_loud_inputs_are_finite():
    """Gates saturate: what is left of their gradients is a few small numbers, whose last digits differ by processor."""
    x, weights, gradients = made(1, 4, 33, 2)
    case = 300 * x, weights, gradients
    check_equal(run(triton_layer, *case, torch.float32), run(eager, *case, torch.float64), 1e-4)


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("first", [True, False], ids=["x in fp32", "x in half"])
def test_half_precision_under_autocast(half, first):
    """Types are eager's. Only operands and results are rounded, sums are not: a bound of a few eps for any length."""
    x, weights, gradients = made(2, 13, 150, 4)
    x = x.to(half).double()

    def autocast(layer):
        def cast(x, weights):
            with torch.autocast(x.device.type, half):
                return layer(x if first else x.to(half), weights)

        return cast

    found = run(autocast(triton_layer), x, weights, gradients, torch.float32)
    reference = run(autocast(eager), x, weights, gradients, torch.float32)
    assert [f.dtype for f in found] == [r.dtype for r in reference]
    bound = 4 * torch.finfo(half).eps
    check_equal(found, run(eager, x, weights, gradients, torch.float64), bound)


def test_strided_inputs_and_gradients():
    """A sum over time hands back one number for all times, a tensor of stride 0."""
    x, weights, gradients = made(2, 6, 40, 2)
    case = x, weights, [g[..., 0] for g in gradients]

    def summed(layer):
        def strided(x, weights):
            outputs = layer(x.transpose(0, 2).contiguous().transpose(0, 2), weights)
            return [o.sum(-1) for o in outputs]

        return strided

    truth = run(summed(eager), *case, torch.float64)
    check_equal(run(summed(triton_layer), *case, torch.float32), truth, 1e-5)


@pytest.mark.parametrize("variant", [{}, {"residual_projection": True}, {"skip_outputs": True}])
def test_a_trunk_with_parameters_from_elsewhere(variant):
    torch.manual_seed(0)
    trunks = [WaveNetTrunk(1, 3, 6, **variant, kernel=k) for k in (triton_layer, eager)]
    wave = torch.randn(2, 70)
    results = []
    for trunk, dtype in zip(trunks, (torch.float32, torch.float64), strict=True):
        device = "cpu" if dtype == torch.float64 else DEVICE
        state = {n: p.detach().to(device, dtype) for n, p in trunks[0].named_parameters()}
        state = {n: p.requires_grad_() for n, p in state.items()}
        features = torch.func.functional_call(trunk, state, (wave.to(device, dtype),))
        gradients = torch.autograd.grad(features.square().sum(), list(state.values()))
        results.append([features, *gradients])
    check_equal(*results, 1e-5)


def test_gradients_are_equal_bit_for_bit_from_run_to_run():
    case = made(1, 13, 200, 4)
    one, two = (run(triton_layer, *case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_tensors_without_numbers_launch_nothing(monkeypatch):
    monkeypatch.setattr(triton_kernels, "forward_kernel", None)
    monkeypatch.setattr(triton_kernels, "backward_kernel", None)
    with pretended():
        trunk = WaveNetTrunk(1, 3, 8, kernel=triton_layer)
        with torch.autocast("cpu", torch.bfloat16):
            features = trunk(torch.empty(2, 50))
        assert (features.shape, features.dtype) == ((2, 8, 50), torch.bfloat16)
        features.sum().backward()
        assert all(p.grad.shape == p.shape for p in trunk.parameters())


@pytest.mark.parametrize(("channels", "dtype"), [(65, torch.float32), (4, torch.float64)])
def test_what_it_cannot_compute_is_computed_by_eager(channels, dtype):
    assert can_run(torch.device(DEVICE), channels, dtype) is not None
    x, weights, _ = made(1, channels, 9, 2)
    weights = LayerWeights(*(w if w is None else w.to(dtype) for w in weights[:4]), 2)
    for one, other in zip(*(f(x.to(dtype), weights) for f in (triton_layer, eager)), strict=True):
        assert torch.equal(one, other)
