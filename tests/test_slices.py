"""Training in slices of time: losses and gradients are those of whole clips; what is not used is not computed."""

import copy

import pytest
import torch
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.slices import Slicer, passes
from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.tasks import TaskBatch
from mtl_dist.tasks.base import Task

NAMES = ("audio_tagging", "next_step", "noise_reduction", "upsampling")
T, FIELD = 70, 15
VALID = [T, 33, 0, 1, T - 1, 52]
LENGTHS = (1, 2, 5, 13, 14, 35, 69, 70, 71, 1000)
"""Of a slice: with and without remainder, shorter than the receptive field, near a clip's own length, longer than all clips."""


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
    return MultitaskModel(trunk, tasks, slice_samples).to(dtype)


def losses_and_gradients(model: MultitaskModel, given_: dict, joint: bool = True):
    """Sums by task, and the gradients of a sum with a weight for each task, by schedule."""
    groups = [given] if joint else [{name: batch} for name, batch in given.items()]
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
    given = batches(dtype=torch.float32)
    truth = losses_and_gradients(model_of(tiny_experiment), batches())
    wanted = losses_and_gradients(model_of(tiny_experiment, dtype=torch.float32), given)
    found = losses_and_gradients(model_of(tiny_experiment, samples, torch.float32), given)
    assert_equal(found, wanted, 1e-5)
    assert found[0]["next_step"].dtype == torch.float32
    assert truth  # the float64 truth is of other random numbers
