"""The trunk and the heads against the paper's arithmetic (section 3.2, Table 3)."""

import pytest
import torch

from mtl_dist.models.heads import ConvHead, PooledClassifier
from mtl_dist.models.multitask import Heads
from mtl_dist.models.wavenet import WaveNetTrunk, receptive_field
from mtl_dist.tasks import TASKS, TaskBatch, TaskContext

VARIANTS = [{}, {"residual_projection": True}, {"skip_outputs": True}]


def heads_of_the_paper(channels: int) -> dict:
    """Table 3's heads, 41 classes."""
    return {
        "audio_tagging": PooledClassifier(channels, [512], 41),
        "next_step": ConvHead(channels, [128], 1),
        "noise_reduction": ConvHead(channels, [128], 11),
        "upsampling": ConvHead(channels, [128], 11),
    }


def size(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def changed_outputs(trunk: WaveNetTrunk, samples: int, at: int) -> list[int]:
    """Time steps whose features change when input sample `at` does."""
    for parameter in trunk.parameters():  # loud enough that the far end is not lost in rounding
        parameter.data.mul_(2.0)
    wave = 0.1 * torch.randn(1, samples, dtype=torch.float64)
    other = wave.clone()
    other[0, at] += 0.5
    with torch.no_grad():
        difference = (trunk(wave) - trunk(other)).abs().amax(dim=(0, 1))
    return difference.nonzero().flatten().tolist()


@pytest.mark.parametrize("variant", VARIANTS, ids=["paper", "projection", "skip"])
@pytest.mark.parametrize(("blocks", "layers"), [(1, 1), (1, 4), (2, 3), (3, 2), (3, 6)])
def test_an_impulse_answers_on_exactly_tau_samples(blocks, layers, variant):
    torch.manual_seed(0)
    tau = 1 + blocks * (2**layers - 1)
    trunk = WaveNetTrunk(blocks, layers, 4, input_gain=4.0, **variant).double()
    assert trunk.receptive_field == receptive_field(blocks, layers) == tau
    at, samples = 5, 5 + tau + 20
    assert changed_outputs(trunk, samples, at) == list(range(at, at + tau))


def test_the_papers_trunk_sees_190_samples():
    assert receptive_field(blocks=3, layers=6) == 190


def test_features_have_no_gradient_from_the_future():
    torch.manual_seed(0)
    trunk = WaveNetTrunk(2, 3, 4, input_gain=4.0).double()
    wave = torch.randn(1, 60, dtype=torch.float64, requires_grad=True)
    trunk(wave)[0, :, 30].sum().backward()
    reached = wave.grad[0].nonzero().flatten().tolist()
    assert reached == list(range(30 - trunk.receptive_field + 1, 31))


def test_parameter_counts_of_the_paper():
    trunk, heads = WaveNetTrunk(3, 6, 64), heads_of_the_paper(64)
    first = 1 * 64 + 64
    layer = 2 * (2 * 64 * 64 + 64)  # filter and gate, kernel 2
    assert size(trunk) == first + 18 * layer == 297_344
    assert size(heads["next_step"]) == (64 * 128 + 128) + (128 + 1) == 8_449
    wide = (11 * 64 * 128 + 128) + (11 * 128 + 1)
    assert size(heads["noise_reduction"]) == size(heads["upsampling"]) == wide == 91_649
    assert size(heads["audio_tagging"]) == (64 * 512 + 512) + (512 * 41 + 41) == 54_313


def test_a_projection_adds_one_square_matrix_a_layer():
    plain, projected = WaveNetTrunk(2, 3, 8), WaveNetTrunk(2, 3, 8, residual_projection=True)
    assert size(projected) - size(plain) == 6 * (8 * 8 + 8)


def test_one_layer_is_the_papers_formula():
    """x + sigmoid(W_gate * x) . tanh(W_filter * x), written out with matrices."""
    torch.manual_seed(0)
    layer = WaveNetTrunk(1, 3, 4).double().layers[2]
    x = torch.randn(1, 4, 9, dtype=torch.float64)
    weight, bias = layer.filter_gate.weight, layer.filter_gate.bias
    for t in range(9):
        past = x[0, :, t - 4] if t >= 4 else torch.zeros(4, dtype=torch.float64)
        both = weight[:, :, 0] @ past + weight[:, :, 1] @ x[0, :, t] + bias
        wanted = x[0, :, t] + torch.sigmoid(both[4:]) * torch.tanh(both[:4])
        torch.testing.assert_close(layer(x)[0][0, :, t], wanted)


def test_skip_outputs_are_the_sum_of_all_layers_answers():
    torch.manual_seed(0)
    plain = WaveNetTrunk(2, 3, 4)
    torch.manual_seed(0)
    skip = WaveNetTrunk(2, 3, 4, skip_outputs=True)
    wave = torch.randn(2, 50)
    # without projections x_last = x_first + sum of all h
    torch.testing.assert_close(skip(wave), plain(wave) - plain.input(wave[:, None]))


@pytest.mark.parametrize("hidden", [[], [64], [64, 48]])
def test_a_conv_head_looks_evenly_to_both_sides(hidden):
    torch.manual_seed(0)
    head = ConvHead(3, hidden, 11).double()
    features = torch.randn(1, 3, 60, dtype=torch.float64, requires_grad=True)
    head(features, torch.tensor([60]))[0, 30].backward()
    reached = features.grad[0].abs().sum(0).nonzero().flatten().tolist()
    assert head.reach == 5 * (len(hidden) + 1)
    assert reached == list(range(30 - head.reach, 30 + head.reach + 1))


def test_padding_does_not_change_a_clips_logits():
    torch.manual_seed(0)
    trunk, head = WaveNetTrunk(2, 3, 4, input_gain=4.0), PooledClassifier(4, [8], 5)
    wave = torch.randn(1, 70)
    padded = torch.nn.functional.pad(wave, (0, 50))
    logits = head(trunk(wave), torch.tensor([70]))
    torch.testing.assert_close(head(trunk(padded), torch.tensor([70])), logits)
    by_hand = head.layers(trunk(wave).mean(dim=2))
    torch.testing.assert_close(logits, by_hand)


def test_logits_of_an_absent_clip_are_finite():
    head = PooledClassifier(4, [8], 5)
    assert head(torch.randn(1, 4, 20), torch.tensor([0])).isfinite().all()


def test_idle_heads_get_zero_gradients_and_not_none():
    torch.manual_seed(0)
    heads = Heads(heads_of_the_paper(4))
    outputs, zero = heads(
        {"next_step": torch.randn(2, 4, 30)}, {"next_step": torch.tensor([30] * 2)}
    )
    assert zero.item() == 0.0
    (outputs["next_step"].square().sum() + zero).backward()
    for name, head in heads.heads.items():
        gradients = [p.grad for p in head.parameters()]
        assert all(g is not None for g in gradients), name
        assert any(bool(g.any()) for g in gradients) == (name == "next_step")


def test_tasks_of_equal_length_in_one_pass_equal_separate_passes(tiny_experiment):
    model = tiny_experiment.build_model().double()
    rate = tiny_experiment.reader.rate
    batches = {}
    for name, task in tiny_experiment.tasks.items():
        wave = torch.randn(3, task.crop_samples, dtype=torch.float64)
        label = torch.tensor([0, 1, 2]) if name == "audio_tagging" else wave
        batches[name] = TaskBatch(wave, label, torch.tensor([task.crop_samples, rate // 50, 0]))
    together, _ = model.outputs(batches)
    for name, batch in batches.items():
        alone, _ = model.outputs({name: batch})
        torch.testing.assert_close(together[name], alone[name])


def test_an_even_filter_width_is_refused():
    with pytest.raises(ValueError, match="filter_width: 10"):
        ConvHead(4, [8], 10)


def test_every_conv_task_of_the_paper_has_its_head():
    context = TaskContext(classes={}, rate=16_000, crop_samples=32_000, receptive_field=190)
    config = TASKS["next_step"].Config(sources=["any"])
    head = TASKS["next_step"](config, context).build_head(64)
    assert size(head) == 8_449
    settings = TASKS["upsampling"].Config(sources=["any"])
    assert size(TASKS["upsampling"](settings, context).build_head(64)) == 91_649


@pytest.mark.parametrize("precision", [torch.float16, torch.bfloat16])
def test_the_mean_over_time_is_taken_in_fp32_whatever_the_precision(precision):
    head = PooledClassifier(channels=2, hidden=[4], classes=3)
    hidden = torch.full((1, 2, 80_000), 3.0)  # their sum is beyond fp16's 65,504
    valid = torch.tensor([79_999])
    wanted = head(hidden, valid)
    with torch.autocast("cpu", dtype=precision):
        found = head(hidden.to(precision), valid)
    torch.testing.assert_close(found.float(), wanted, rtol=0.05, atol=0.02)
