"""memory.recompute and memory.storage: the reference's gradients, and the bytes that are kept, counted."""

import functools
import itertools

import big_batch
import pytest
import tiny
import torch
import worlds
from safetensors.torch import load_file
from test_engines import FILES, marked
from test_round import LAW

from mtl_dist.activations import LiveBytes
from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.models.cpu_layer import cpu_layer, cpu_layer_alone
from mtl_dist.models.layer import eager
from mtl_dist.models.storage import recomputed
from mtl_dist.models.wavenet import WaveNetTrunk

KERNELS = {
    "eager": eager,
    "layer": functools.partial(recomputed, eager),
    "cpu": cpu_layer,
    "cpu, gates kept": functools.partial(cpu_layer, keep_gates=True),
}
VARIANTS = [{}, {"residual_projection": True}, {"skip_outputs": True}]


def kept_bytes(trunk: WaveNetTrunk, wave: torch.Tensor) -> int:
    """What a forward keeps for its backward, every storage once, beside parameters and the wave."""
    storages = {}
    known = {t.untyped_storage().data_ptr() for t in (wave, *trunk.parameters())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = trunk(wave)
    assert out.requires_grad
    return sum(size for place, size in storages.items() if place not in known)


def gradients(trunk: WaveNetTrunk, wave: torch.Tensor) -> torch.Tensor:
    """All of them in one vector, float64."""
    parts = torch.autograd.grad(trunk(wave).square().mean(), list(trunk.parameters()))
    return torch.cat([part.flatten().double() for part in parts])


@pytest.mark.parametrize("variant", VARIANTS, ids=["paper", "projection", "skip"])
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("blocks", [False, True], ids=["no", "block"])
def test_gradients_are_those_of_plain_autograd(kernel, blocks, variant):
    wave = torch.randn(2, 50, generator=torch.Generator().manual_seed(1)).double()
    found = []
    for settings in ({}, {"kernel": KERNELS[kernel], "recompute_blocks": blocks}):
        torch.manual_seed(0)
        found.append(gradients(WaveNetTrunk(2, 3, 4, **variant, **settings).double(), wave))
    truth, ours = found
    assert (ours - truth).norm() < 1e-12 * truth.norm()


def test_the_papers_trunk_keeps_a_layers_input_a_block_s_input_or_everything():
    """One second: a layer keeps x (4 MB), padded, and both gates; recomputing x alone, and a block of six its first x."""
    wave = torch.randn(1, 16_000)
    one = 64 * 16_000 * 4
    trunk = functools.partial(WaveNetTrunk, 3, 6, 64)
    assert kept_bytes(trunk(kernel=KERNELS["layer"]), wave) == pytest.approx(18 * one, rel=0.01)
    assert kept_bytes(trunk(kernel=cpu_layer_alone), wave) == pytest.approx(18 * one, rel=0.01)
    gates = functools.partial(cpu_layer_alone, keep_gates=True)
    assert kept_bytes(trunk(kernel=gates), wave) == pytest.approx(3 * 18 * one, rel=0.01)
    assert kept_bytes(trunk(recompute_blocks=True), wave) == pytest.approx(3 * one, rel=0.01)
    assert kept_bytes(trunk(kernel=eager), wave) == pytest.approx(3 * 18 * one, rel=0.01)


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_storage_turns_the_gradient_by_less_than_a_percent(kernel):
    wave = torch.randn(1, 400, generator=torch.Generator().manual_seed(1))
    found = []
    for bf16 in (False, True):
        torch.manual_seed(0)
        trunk = WaveNetTrunk(3, 6, 16, kernel=KERNELS[kernel], bf16_storage=bf16, input_gain=4.0)
        found.append(gradients(trunk, wave))
    truth, ours = found
    assert torch.nn.functional.cosine_similarity(ours, truth, dim=0) > 0.9999
    assert 1e-6 < (ours - truth).norm() / truth.norm() < 0.01


@pytest.mark.parametrize("kernel", KERNELS)
def test_bf16_storage_keeps_half_the_bytes(kernel):
    """By the bytes that are alive after the forward: what the trunk's own hooks keep, hooks around it do not see."""
    kept = []
    for bf16 in (False, True):
        trunk = WaveNetTrunk(1, 6, 16, kernel=KERNELS[kernel], bf16_storage=bf16)
        kept.append(alive_after(trunk, torch.randn(1, 4_000)))
    assert kept[1] < 0.55 * kept[0]


def alive_after(trunk: WaveNetTrunk, wave: torch.Tensor) -> int:
    """Bytes that a forward's operations have made and its graph still holds, but for the features."""
    with LiveBytes(trunk.parameters()) as live:
        out = trunk(wave)
    return live.now - out.untyped_storage().nbytes()


def test_bf16_storage_leaves_float64_and_weights_alone():
    torch.manual_seed(0)
    trunk = WaveNetTrunk(2, 3, 4, bf16_storage=True).double()
    wave = torch.randn(1, 60, dtype=torch.float64)
    ours = gradients(trunk, wave)
    trunk.bf16_storage = False
    assert torch.equal(ours, gradients(trunk, wave))


SLICES = str(big_batch.SLICE_SAMPLES / 16_000)
MODES = [
    ("cpu", "none", "full", "null"),
    ("cpu", "layer", "full", "null"),
    ("eager", "layer", "full", "null"),
    ("cpu", "block", "full", "null"),
    ("eager", "block", "full", "null"),
    ("eager", "none", "bf16", "null"),
    ("cpu", "none", "bf16", "null"),
    ("cpu", "block", "bf16", "null"),
    ("cpu", "none", "full", SLICES),
    ("eager", "layer", "full", SLICES),
    ("cpu", "block", "bf16", SLICES),
]


@pytest.mark.parametrize("name", [marked(name) for name in FILES])
def test_every_engine_has_the_gradient_of_one_big_batch_in_every_mode(name, corpora_root, tmp_path):
    if "ZeRO" in name:
        pytest.importorskip("deepspeed")
    script = ["tests/workers/recompute_worker.py", str(corpora_root), str(tmp_path)]
    modes = [",".join(mode) for mode in MODES]
    done = worlds.launch(FILES[name], *script, *modes, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    found = load_file(tmp_path / "gradients.safetensors")
    configured = load_config(tiny.tiny_words(corpora_root, *big_batch.weight_words()))
    experiment = build_experiment(configured)
    truth, _ = big_batch.true_gradients(
        big_batch.build(experiment, big_batch.NAMES), big_batch.NAMES
    )
    for mode, schedule in itertools.product(modes, ("round_robin", "joint")):
        ours = {n: found[f"{mode}/{schedule}/{n}"] for n in truth}
        limit = 0.02 if "bf16" in mode else LAW
        assert big_batch.worst_error(ours, truth) < limit, (mode, schedule)
