"""Training in slices of time: losses and gradients are those of whole clips; what is not used is not computed."""

import copy

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint

from mtl_dist.activations import LiveBytes, Meter
from mtl_dist.models.heads import ConvHead, PooledClassifier
from mtl_dist.models.layer import eager
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.slices import can_be_sliced, passes
from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.tasks import TaskBatch
from mtl_dist.tasks.base import Task

NAMES = ("audio_tagging", "next_step", "noise_reduction", "upsampling")
T, FIELD = 70, 15
VALID = [T, 33, 0, 1, T - 1, 52]
LENGTHS = (4, 13, 14, 35, 69, 70, 71, 1000)
"""Of a slice: with and without remainder, shorter than the receptive field, near a clip's own length, longer."""


def batches(names=NAMES, samples: int = T, valid=VALID, seed: int = 0, dtype=torch.float64):
    """Noise up to each clip's end, zeros behind it."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(valid)
    mask = torch.arange(samples) < lengths[:, None]
    found = {}
    for name in names:
        inputs, targets = torch.randn(2, len(valid), samples, generator=rng, dtype=dtype) * mask
        if name == "audio_tagging":
            targets = torch.randint(0, 3, (len(valid),), generator=rng) * (lengths > 0)
        found[name] = TaskBatch(inputs, inputs if name == "next_step" else targets, lengths)
    return found


def model_of(
    experiment, slice_samples=None, dtype=torch.float64, widths=(), **trunk
) -> MultitaskModel:
    """A tiny model that is the same for every length of a slice."""
    torch.manual_seed(0)
    tasks = {name: copy.copy(experiment.tasks[name]) for name in NAMES}
    for name, width in dict(widths).items():
        config = tasks[name].config
        tasks[name].config = type(config)(**vars(config) | {"filter_width": width})
    trunk = WaveNetTrunk(2, 3, 4, input_gain=8.0, **trunk)
    model = MultitaskModel(trunk, tasks, slice_samples)
    return model.double() if dtype == torch.float64 else model


def losses_and_gradients(model: MultitaskModel, micro_step: dict, joint: bool = True):
    """Sums by task, and the gradients of a sum with a weight for each task, by schedule."""
    groups = [micro_step] if joint else [{name: batch} for name, batch in micro_step.items()]
    sums = {}
    for group in groups:
        losses = {name: total for name, (total, _) in model(group).items()}
        sum((1 + NAMES.index(name)) * total for name, total in losses.items()).backward()
        sums |= {name: total.detach() for name, total in losses.items()}
    return sums, {name: p.grad for name, p in model.named_parameters()}


def assert_equal(found, truth, law: float):
    for one, other in zip(found, truth, strict=True):
        assert set(one) == set(other)
        for name in other:
            error = (one[name] - other[name]).norm() / other[name].norm().clamp(min=1e-12)
            assert error < law, (name, error)


@pytest.mark.parametrize("joint", [True, False], ids=["joint", "round_robin"])
@pytest.mark.parametrize("samples", LENGTHS)
def test_slices_have_the_losses_and_gradients_of_whole_clips(tiny_experiment, samples, joint):
    truth = losses_and_gradients(model_of(tiny_experiment), batches(), joint)
    sliced = model_of(tiny_experiment, samples)
    assert set(sliced.slicers) == set(NAMES)
    assert_equal(losses_and_gradients(sliced, batches(), joint), truth, 1e-12)


@pytest.mark.parametrize("samples", [5, 35])
def test_in_float32_they_differ_by_rounding(tiny_experiment, samples):
    micro_step = batches(dtype=torch.float32)
    wanted = losses_and_gradients(model_of(tiny_experiment, dtype=torch.float32), micro_step)
    found = losses_and_gradients(model_of(tiny_experiment, samples, torch.float32), micro_step)
    assert_equal(found, wanted, 1e-5)
    assert found[0]["next_step"].dtype == torch.float32


@pytest.mark.parametrize("width", [1, 3, 11, 41])
@pytest.mark.parametrize("trunk", [{"residual_projection": True}, {"skip_outputs": True}], ids=str)
def test_any_filter_width_and_trunk(tiny_experiment, width, trunk):
    widths = {"noise_reduction": width, "upsampling": width}
    truth = losses_and_gradients(model_of(tiny_experiment, widths=widths, **trunk), batches())
    for samples in (4, 30):
        sliced = model_of(tiny_experiment, samples, widths=widths, **trunk)
        assert sliced.slicers["upsampling"].reach == width - 1
        assert_equal(losses_and_gradients(sliced, batches()), truth, 1e-12)


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    samples=st.integers(1, 60),
    length=st.integers(8, 60),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=5),
    seed=st.integers(0, 99),
)
def test_any_clips_in_any_slices(tiny_experiment, samples, length, shares, seed):
    some = batches(samples=length, valid=[round(share * length) for share in shares], seed=seed)
    truth = losses_and_gradients(model_of(tiny_experiment), some)
    assert_equal(losses_and_gradients(model_of(tiny_experiment, samples), some), truth, 1e-12)


@given(
    first=st.integers(0, 20),
    stops=st.lists(st.integers(0, 300), min_size=1, max_size=9),
    samples=st.integers(1, 200),
    halo=st.integers(0, 50),
)
def test_passes_hold_every_output_once_and_no_more_than_a_slice(first, stops, samples, halo):
    covered = []
    for one in passes(first, stops, samples, halo):
        assert len(one.clips) * (one.stop - one.start + halo) <= samples + halo
        assert one.stop <= max(stops[clip] for clip in one.clips)
        covered += [(c, t) for c in one.clips for t in range(one.start, min(one.stop, stops[c]))]
    assert sorted(covered) == [(c, t) for c, stop in enumerate(stops) for t in range(first, stop)]


@pytest.mark.parametrize("samples", [5, 35, 1000])
def test_evaluation_has_the_outputs_of_whole_clips(tiny_experiment, samples):
    with torch.no_grad():
        sliced = model_of(tiny_experiment, samples)
        found, zero = sliced.outputs(batches())
        wanted, _ = model_of(tiny_experiment).outputs(batches())
        losses = sliced(batches())
    assert zero == 0
    for name in NAMES:
        torch.testing.assert_close(found[name], wanted[name], rtol=1e-12, atol=1e-12)
        assert not losses[name][0].requires_grad


def test_evaluation_does_not_hold_more_than_slices(tiny_experiment):
    long = batches(["noise_reduction"], samples=4000, valid=[4000] * 8, dtype=torch.float32)
    peaks = {}
    for samples in (None, 100):
        model = model_of(tiny_experiment, samples, torch.float32)
        with torch.no_grad(), LiveBytes([*model.parameters(), *long["noise_reduction"]]) as live:
            model.outputs(long)
        peaks[samples] = live.peak
    assert peaks[100] < 0.2 * peaks[None]


def heard(model: MultitaskModel, micro_step: dict, monkeypatch) -> int:
    """Samples that the trunk hears in a forward and backward."""
    count, forward = [], model.trunk.forward
    monkeypatch.setattr(model.trunk, "forward", lambda x: count.append(x.numel()) or forward(x))
    losses_and_gradients(model, micro_step)
    return sum(count)


@pytest.mark.parametrize("name", NAMES)
def test_padding_is_not_computed(tiny_experiment, monkeypatch, name):
    clips = batches([name], samples=60, valid=[60, 20, 0])[name]
    padded = TaskBatch(*(nn.functional.pad(t, (0, 900)) for t in clips[:2]), clips.valid)
    if name == "audio_tagging":
        padded = padded._replace(targets=clips.targets)
    model = model_of(tiny_experiment, 16)
    without = heard(model, {name: clips}, monkeypatch)
    assert heard(model, {name: padded}, monkeypatch) <= without + 3 * 30  # delay and reach


def peak(model: MultitaskModel, micro_step: dict) -> int:
    """The most bytes that forward and backward hold beside the waves, parameters and their gradients."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    known = [*model.parameters(), *(p.grad for p in model.parameters())]
    with LiveBytes([*known, *(t for batch in micro_step.values() for t in batch)]) as live:
        sum(total for total, _ in model(micro_step).values()).backward()
    return live.peak


@pytest.mark.parametrize("name", NAMES)
def test_memory_does_not_grow_with_clips_or_batch(tiny_experiment, name):
    model = model_of(tiny_experiment, 500, torch.float32)
    peaks = {}
    for clips, samples in [(2, 1000), (2, 30_000), (16, 1000), (16, 400), (16, 100)]:
        some = batches([name], samples=samples, valid=[samples] * clips, dtype=torch.float32)
        peaks[clips, samples] = peak(model, some)
    meter = Meter(lambda: model_of(tiny_experiment, 500, torch.float32), model.tasks, "no")
    limit = meter.of((name,), 16)
    assert limit == meter.of((name,), 1)
    assert max(peaks.values()) <= 1.02 * limit
    assert min(peaks.values()) > 0.5 * limit


class Silent(Task):
    """Says nothing of slices: the largest output of a clip."""

    name = "silent"

    def __init__(self):
        self.config, self.whole = None, False

    def build_head(self, channels):
        return ConvHead(channels, [4], 3)

    def count(self, batch):
        return torch.tensor(float(len(batch.valid)))

    def loss(self, outputs, batch):
        return outputs.amax(dim=1).sum(), self.count(batch)


def test_a_task_that_says_nothing_is_computed_whole_beside_others(tiny_experiment):
    tasks = {"silent": Silent(), "next_step": tiny_experiment.tasks["next_step"]}
    micro_step = batches(["next_step"])
    micro_step["silent"] = batches(["upsampling"], seed=1)["upsampling"]
    grads = []
    for samples in (None, 9):
        torch.manual_seed(0)
        model = MultitaskModel(WaveNetTrunk(2, 3, 4), tasks, samples).double()
        assert model.unsliced() == (["silent"] if samples else [])
        sum(total for total, _ in model(micro_step).values()).backward()
        grads.append({n: p.grad for n, p in model.named_parameters()})
    assert_equal(grads[1:], grads[:1], 1e-12)


def test_what_was_derived_and_means_something_else_is_computed_whole(tiny_experiment):
    denoise, tagging = (
        tiny_experiment.tasks["noise_reduction"],
        tiny_experiment.tasks["audio_tagging"],
    )

    class OtherLoss(type(denoise)):
        def loss(self, outputs, batch):
            return outputs.amax(), self.count(batch)

    class OtherTerms(type(denoise)):
        def elementwise(self, estimate, target):
            return (estimate - target).abs()

    class OtherPooling(PooledClassifier):
        def forward(self, hidden, valid):
            return self.layers(hidden.amax(dim=2))

    conv = ConvHead(4, [4], 3)
    assert can_be_sliced(denoise, conv)
    assert can_be_sliced(object.__new__(OtherTerms), conv)
    assert not can_be_sliced(object.__new__(OtherLoss), conv)
    assert can_be_sliced(tagging, PooledClassifier(4, [4], 3))
    assert not can_be_sliced(tagging, OtherPooling(4, [4], 3))
    assert not can_be_sliced(denoise, nn.Conv1d(4, 1, 1))


def checkpointed(x, weights):
    return checkpoint(eager, x, weights, use_reentrant=False)


def test_a_kernel_that_computes_again_in_the_backward_has_the_same_gradient(tiny_experiment):
    truth = losses_and_gradients(model_of(tiny_experiment), batches())
    again = model_of(tiny_experiment, 13, kernel=checkpointed)
    assert_equal(losses_and_gradients(again, batches()), truth, 1e-12)


def test_under_autocast_every_parameter_gets_the_gradient_of_whole_clips(tiny_experiment):
    micro_step = batches(dtype=torch.float32)
    found = []
    for samples in (None, 13):
        model = model_of(tiny_experiment, samples, torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(micro_step)
            assert losses["audio_tagging"][0].dtype == torch.float32
        sum(total for total, _ in losses.values()).backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_equal(found[1:], found[:1], 0.05)
