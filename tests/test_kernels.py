"""Every kernel against the reference in float64: x + h, h and their gradients, in awkward shapes; and which is chosen."""

import copy
import functools
import pickle
import re

import pytest
import tiny
import torch
import worlds
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.models import cpu_layer as cpu
from mtl_dist.models import kernels
from mtl_dist.models.layer import LayerWeights, eager
from mtl_dist.models.wavenet import WaveNetTrunk

HERE = kernels.Where(torch.device("cpu"), 4)
CUDA = kernels.Where(torch.device("cuda"), 4)
LAW = {torch.float64: 1e-12, torch.float32: 1e-5}
KEEPS = [False, True]
AWKWARD = [(1, 4, 9, 4), (2, 3, 5, 8), (3, 5, 1, 1), (2, 1, 37, 5), (1, 4, 16, 16)]
"""Clips, channels, samples, dilation: shorter than the dilation, one sample, one channel, tiles that come out even."""


@pytest.fixture
def small_tiles(monkeypatch):
    monkeypatch.setattr(cpu, "FEWEST_ROWS", 7)
    monkeypatch.setattr(cpu, "TILE_BYTES", 1)


def draw(clips, channels, samples, project=False):
    """(x, weights but for the dilation, gradients at x + h and h), float64."""
    rng = torch.Generator().manual_seed(clips + 10 * channels + 100 * samples)
    shapes = [(2 * channels, channels, 2), (2 * channels,)]
    shapes += [(channels, channels, 1), (channels,)] if project else []
    weights = [torch.randn(s, generator=rng, dtype=torch.float64) for s in shapes]
    x, *grads = torch.randn(3, clips, channels, samples, generator=rng, dtype=torch.float64)
    return x, weights, grads


def found(kernel, drawn, dilation, dtype, with_h=True):
    """[x + h, h, gradients of x and of the weights]."""
    x, weights, grads = drawn
    inputs = [t.to(dtype).requires_grad_() for t in (x, *weights)]
    padded = [*inputs[1:], *[None] * (5 - len(inputs))]
    outputs = [o for o in kernel(inputs[0], LayerWeights(*padded, dilation)) if o is not None]
    outputs = outputs if with_h else outputs[:1]
    total = sum((o * g.to(dtype)).sum() for o, g in zip(outputs, grads, strict=False))
    return [*outputs, *torch.autograd.grad(total, inputs)]


def worst(ours, truth):
    pairs = zip(ours, truth, strict=True)
    return max(
        float((a.detach().double() - b.detach()).norm() / b.norm().clamp(min=1e-30))
        for a, b in pairs
    )


@pytest.mark.parametrize("keep", KEEPS, ids=["again", "kept"])
@pytest.mark.parametrize("dtype", LAW)
@pytest.mark.parametrize("shape", AWKWARD, ids=str)
@pytest.mark.parametrize("project", [False, True], ids=["plain", "projection"])
def test_the_cpu_kernel_has_the_references_numbers_and_gradients(
    shape, dtype, project, keep, small_tiles
):
    layer, alone = (
        functools.partial(k, keep_gates=keep) for k in (cpu.cpu_layer, cpu.cpu_layer_alone)
    )
    *sizes, dilation = shape
    drawn = draw(*sizes, project)
    truth = found(eager, drawn, dilation, torch.float64)
    assert worst(found(layer, drawn, dilation, dtype), truth) < LAW[dtype]
    if not project:
        truth = found(eager, drawn, dilation, torch.float64, with_h=False)
        assert worst(found(alone, drawn, dilation, dtype), truth) < LAW[dtype]


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 60),
    st.integers(1, 70),
    st.integers(1, 20),
    st.booleans(),
)
def test_the_cpu_kernel_is_right_for_any_tile(clips, channels, samples, dilation, tile, keep):
    drawn = draw(clips, channels, samples)
    truth = found(eager, drawn, dilation, torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu, "FEWEST_ROWS", tile)
        patch.setattr(cpu, "TILE_BYTES", 1)
        layer = functools.partial(cpu.cpu_layer, keep_gates=keep)
        assert worst(found(layer, drawn, dilation, torch.float64), truth) < 1e-12


def test_gradients_are_made_of_what_asks_for_them_alone(small_tiles):
    x, weights, _ = draw(2, 3, 20)
    inputs = [x, *weights]
    truth = [t.clone().requires_grad_() for t in inputs]
    eager(truth[0], LayerWeights(*truth[1:], None, None, 4))[0].square().sum().backward()
    for place in range(3):
        ours = [t.clone().requires_grad_(i == place) for i, t in enumerate(inputs)]
        out, _ = cpu.cpu_layer_alone(ours[0], LayerWeights(*ours[1:], None, None, 4))
        out.square().sum().backward()
        assert [t.grad is not None for t in ours] == [i == place for i in range(3)]
        torch.testing.assert_close(ours[place].grad, truth[place].grad, rtol=1e-12, atol=1e-12)


def test_strides_of_x_and_of_the_gradient_do_not_matter():
    x, weights, grads = draw(3, 4, 30)
    strided = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    assert not strided.is_contiguous()
    expanded = grads[0][:1, :, :1].expand(3, 4, 30)
    truth = found(eager, (x, weights, [expanded.contiguous()] * 2), 2, torch.float64)
    ours = found(cpu.cpu_layer, (strided, weights, [expanded] * 2), 2, torch.float64)
    assert worst(ours, truth) < 1e-12


def test_under_autocast_the_cpu_kernel_computes_in_float32():
    drawn = draw(2, 4, 30)
    truth = found(eager, drawn, 2, torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        ours = found(cpu.cpu_layer, drawn, 2, torch.float32)
    assert ours[0].dtype == torch.float32
    assert worst(ours, truth) < 1e-5


@pytest.mark.parametrize(
    ("name", "variant"),
    [
        ("cpu", {}),
        ("cpu", {"residual_projection": True}),
        ("cpu", {"skip_outputs": True}),
        pytest.param("compile", {}, marks=pytest.mark.slow),
    ],
)
def test_a_trunk_has_the_references_gradients_under_every_kernel(name, variant):
    ours = kernels.compiled
    if name != "compile":  # whose trial takes as long again
        chosen = kernels.choose_kernel(name, HERE, alone=not variant)
        assert chosen.name == name
        ours = chosen.kernel
    gradients = {}
    for kernel in (eager, ours):
        torch.manual_seed(0)
        trunk = WaveNetTrunk(2, 3, 4, input_gain=8.0, kernel=kernel, **variant).double()
        for samples in (40, 63):
            wave = torch.randn(2, samples, dtype=torch.float64)
            trunk(wave).square().sum().backward()
        gradients[kernel] = [p.grad for p in trunk.parameters() if p.grad is not None]
    assert worst(gradients[ours], gradients[eager]) < 1e-12


def test_a_model_with_any_kernel_can_be_copied_and_pickled():
    for kernel in (eager, kernels.compiled, cpu.cpu_layer, cpu.cpu_layer_alone):
        trunk = WaveNetTrunk(1, 2, 3, kernel=kernel)
        for twin in (copy.deepcopy(trunk), pickle.loads(pickle.dumps(trunk))):
            assert twin.layers[0].kernel is kernel


def test_auto_is_the_cpu_kernel_on_a_cpu_and_triton_on_a_gpu(monkeypatch):
    for alone, layer in ((True, cpu.cpu_layer_alone), (False, cpu.cpu_layer)):
        for keeps in KEEPS:
            chosen = kernels.choose_kernel("auto", HERE, alone, keeps)
            assert (chosen.name, chosen.recomputes) == ("cpu", not keeps)
            assert chosen.kernel.func is layer
            assert chosen.kernel.keywords == {"keep_gates": keeps}
    monkeypatch.setattr(kernels, "why_not", lambda name, where: None)
    for alone in (True, False):
        chosen = kernels.choose_kernel("auto", CUDA, alone)
        assert chosen.name == "triton"
        assert chosen.kernel.func is kernels.triton_layer
        assert chosen.kernel.keywords == {"with_hidden": not alone}


@pytest.mark.parametrize(
    ("name", "where", "reason"),
    [
        ("cpu", CUDA, "the device is cuda"),
        ("triton", HERE, "(the device is cpu|triton is not installed)"),
        ("triton", HERE._replace(channels=65), "65 channels are more than 64"),
        ("compile", HERE, "no working C\\+\\+ compiler"),
    ],
)
def test_a_kernel_that_cannot_run_falls_back_and_says_why(name, where, reason, monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("no working C++ compiler\nand much more")

    monkeypatch.setattr(torch, "compile", no_compiler)
    kernels._compiled_gated.cache_clear()
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    chosen = kernels.choose_kernel(name, where, True)
    assert chosen[:3] == kernels.REFERENCE[:3]
    assert re.fullmatch(
        f"model.kernel: {name} cannot run here \\(.*{reason}.*\\); eager is used", chosen.warning
    )
    kernels._compiled_gated.cache_clear()


def test_all_ranks_take_the_reference_where_one_of_them_must(corpora_root, tmp_path):
    words = tiny.tiny_words(corpora_root, "--run.dir", str(tmp_path / "run"), "--train.rounds", "1")
    done = worlds.launch("two_cpu_processes", "tests/workers/uneven_kernel.py", *words)
    assert done.returncode == 0, done.stderr[-3000:]
    warning = "model.kernel: cpu cannot run here (made up); eager is used (so on "
    assert done.stderr.count(warning) == 1
    assert "kernel eager, " in done.stderr


def test_a_trial_finds_a_kernel_that_computes_something_else():
    def wrong(x, weights):
        total, hidden = eager(x, weights)
        return total + 0.05 * x, hidden

    assert kernels.trial(eager, HERE) is None
    assert kernels.trial(eager, HERE._replace(dtype=torch.bfloat16)) is None
    assert "off" in kernels.trial(wrong, HERE)


def test_a_trial_that_fails_without_a_word_is_a_reason():
    def failing(x, weights):
        raise AssertionError

    assert kernels.trial(failing, HERE) == "a trial fails: AssertionError: "
