"""Each task's inputs and loss against a literal reading of the paper (sections 3.2.1 to 3.2.4, equation 1)."""

import dataclasses
import math

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.audio.clips import Background, Clip
from mtl_dist.data.batches import keyed_generators
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.tasks import TASKS, TaskBatch, TaskContext

REGRESSION = ["next_step", "noise_reduction", "upsampling"]
PAPER_FIELD, PAPER_DELAY = 190, 94
T = 40  # samples of the small batches here; the receptive field of the tiny model is 15, its delay 7


def squared_error(y: float, x: float) -> float:
    return (y - x) ** 2


def smooth_l1(y: float, x: float) -> float:
    """Equation 1."""
    return 0.5 * abs(y - x) ** 2 if abs(y - x) < 1 else abs(y - x) - 0.5


def literal(name: str, outputs, targets, valid, delay: int) -> tuple[float, int]:
    """Sum over clips and frames, written out: y(t + delay) stands for x(t); for next_step y(t) for x(t + 1)."""
    total, count = 0.0, 0
    for y, x, length in zip(outputs.tolist(), targets.tolist(), valid.tolist(), strict=True):
        for t in range(length):
            if name == "next_step" and t + 1 < length:
                total, count = total + squared_error(y[t], x[t + 1]), count + 1
            if name != "next_step" and t + delay < len(y):
                total, count = total + smooth_l1(y[t + delay], x[t]), count + 1
    return total, count


def random_batch(seed: int, valid: list[int], samples: int = T) -> tuple[TaskBatch, torch.Tensor]:
    """Waves with zero padding, and outputs on both sides of equation 1's bend."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(valid)
    wave = torch.rand(len(valid), samples, generator=rng) * 2 - 1
    wave = wave * (torch.arange(samples) < lengths[:, None])
    outputs = 2 * torch.randn(len(valid), samples, generator=rng)
    return TaskBatch(wave, wave.clone(), lengths), outputs


def regression_task(name: str, field: int = 15, rate: int = 16_000, **settings_):
    """A task as the paper has it, without corpora (noise_reduction: use the experiment's)."""
    context = TaskContext(classes={}, rate=rate, crop_samples=max(T, field), receptive_field=field)
    return TASKS[name](TASKS[name].Config(sources=["any"], **settings_), context)


@pytest.mark.parametrize("name", REGRESSION)
@pytest.mark.parametrize("valid", [[T, 25], [1, 0, T], [8, 7, 34, 33, 2], [0, 0]])
def test_a_regression_loss_is_the_papers_formula(tiny_experiment, name, valid):
    task = tiny_experiment.tasks[name]
    batch, outputs = random_batch(1, valid)
    total, count = task.loss(outputs, batch)
    wanted, terms = literal(name, outputs, batch.targets, batch.valid, delay=7)
    assert count.item() == task.count(batch).item() == terms
    assert total.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", REGRESSION)
@given(
    valid=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    field=st.integers(2, 70),
    samples=st.integers(30, 45),
)
@settings(max_examples=40, deadline=None)
def test_count_is_the_number_of_terms_for_any_lengths(name, valid, field, samples):
    task = regression_task("upsampling" if name == "noise_reduction" else name, field)
    batch, outputs = random_batch(2, valid, samples)
    total, count = task.loss(outputs, batch)
    wanted, terms = literal(name, outputs, batch.targets, batch.valid, (field - 1) // 2)
    assert count.item() == task.count(batch).item() == terms
    assert total.item() == pytest.approx(wanted, rel=1e-5)


def test_tagging_loss_is_the_papers_cross_entropy(tiny_experiment):
    task = tiny_experiment.tasks["audio_tagging"]
    logits = 3 * torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    batch = TaskBatch(torch.zeros(4, T), torch.tensor([2, 0, 1, 0]), torch.tensor([T, 1, 5, 0]))
    wanted = 0.0
    for row, label in zip(logits[:3].tolist(), [2, 0, 1], strict=True):
        for k in range(3):
            p_k = math.exp(row[k]) / sum(math.exp(value) for value in row)
            wanted -= (1.0 if k == label else 0.0) * math.log(p_k)
    total, count = task.loss(logits, batch)
    assert count.item() == task.count(batch).item() == 3
    assert total.item() == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("name", REGRESSION)
def test_an_absent_clip_gives_no_gradient(tiny_experiment, name):
    batch, outputs = random_batch(3, [T, 0])
    outputs.requires_grad_()
    tiny_experiment.tasks[name].loss(outputs, batch)[0].backward()
    assert outputs.grad[0].any()
    assert not outputs.grad[1].any()


@pytest.mark.parametrize("name", ["noise_reduction", "upsampling"])
def test_a_shifted_signal_has_no_loss_at_the_delay_alone(tiny_experiment, name):
    task = tiny_experiment.tasks[name]
    batch, _ = random_batch(4, [T, T])

    def loss_of(delay: int) -> float:
        shifted = torch.zeros_like(batch.targets)
        shifted[:, delay:] = batch.targets[:, : T - delay]
        return task.loss(shifted, batch)[0].item()

    assert task.delay == 7
    assert loss_of(7) == 0.0
    assert loss_of(6) > 0.01
    assert loss_of(8) > 0.01


def test_next_step_has_no_loss_for_the_signal_one_sample_early(tiny_experiment):
    task = tiny_experiment.tasks["next_step"]
    batch, _ = random_batch(5, [T, 12])
    early = batch.targets.roll(-1, dims=1)
    assert task.loss(early, batch)[0].item() == 0.0
    assert task.loss(batch.targets, batch)[0].item() > 0.01


def test_the_papers_delay_is_94_samples():
    assert regression_task("upsampling", PAPER_FIELD).delay == PAPER_DELAY == (190 - 1) // 2


@pytest.mark.parametrize("samples", [1, 2, 3, 5, 799, 801, 3200])
def test_upsampling_hears_librosas_4_khz_with_every_sample_repeated(samples):
    task = regression_task("upsampling", PAPER_FIELD)
    task.crop_samples = samples + 3
    wave = np.random.default_rng(0).uniform(-1, 1, samples).astype(np.float32)
    batch = task.prepare([Clip(id="a", wave=wave)], None)
    low = librosa.resample(wave, orig_sr=16_000, target_sr=4_000)
    wanted = np.zeros(samples + 3, np.float32)
    held = np.repeat(low, 4)[:samples]
    wanted[: len(held)] = held
    np.testing.assert_allclose(batch.inputs[0].numpy(), wanted, atol=1e-6)
    np.testing.assert_array_equal(batch.targets[0, :samples].numpy(), wave)
    assert batch.valid.tolist() == [samples]


def backgrounds(experiment, split: str, number: int) -> list[dict[str, Background]]:
    """What may lie beside so many clips of noise_reduction."""
    corpus = experiment.tasks["noise_reduction"].config.noise
    lane = Lane(Blocks(experiment.corpora[corpus].noise(split)), 1, 0, ("test",))
    return [{corpus: Background(next(lane)[1], experiment.reader.rate)} for _ in range(number)]


class Recorder:
    """A generator that remembers what its `uniform` returned."""

    def __init__(self, wrapped: np.random.Generator):
        self.wrapped, self.uniforms = wrapped, []

    def __getattr__(self, name):
        return getattr(self.wrapped, name)

    def uniform(self, *bounds):
        self.uniforms.append(self.wrapped.uniform(*bounds))
        return self.uniforms[-1]


def test_noise_has_exactly_the_snr_that_was_drawn(tiny_experiment):
    task = tiny_experiment.tasks["noise_reduction"]
    recorders = []

    def keyed(clip, purpose):
        recorders.append(Recorder(generator(0, clip, purpose)))
        return recorders[-1]

    rng = np.random.default_rng(1)
    clips = [
        Clip(id=f"clip {i}", wave=rng.uniform(-a, a, n).astype(np.float32), backgrounds=beside)
        for i, ((n, a), beside) in enumerate(
            zip(
                [(800, 1.0), (300, 1.0), (800, 0.1), (50, 0.02), (1, 0.5)],
                backgrounds(tiny_experiment, "train", 5),
                strict=True,
            )
        )
    ]
    batch = task.prepare(clips, keyed)
    assert batch.inputs.abs().max() <= 1.0
    for i, clip in enumerate(clips):
        samples = len(clip.wave)
        noisy, clean = (w[i, :samples].double() for w in (batch.inputs, batch.targets))
        snr = 10 * math.log10(clean.square().sum() / (noisy - clean).square().sum())
        (drawn,) = recorders[i].uniforms
        assert 10.0 <= drawn <= 15.0
        assert snr == pytest.approx(drawn, abs=1e-3)
        assert not batch.inputs[i, samples:].any()
        # the target is the clip, but for the factor that keeps the sum in [-1, 1]
        ratio = clean.numpy() / clip.wave
        np.testing.assert_allclose(ratio, ratio[0], rtol=1e-5)
    assert len({recorder.uniforms[0] for recorder in recorders}) == len(clips)


def test_a_clip_whose_background_is_silent_is_no_score_of_noise_reduction(tiny_experiment):
    """It has some 90 dB to lose and nothing to gain: one of them would drown the mean of a hundred."""
    task = tiny_experiment.tasks["noise_reduction"]
    wave = torch.sin(torch.arange(800.0))[None]
    noisy = wave + 0.1 * torch.cos(torch.arange(800.0) * 1.7)
    valid = torch.tensor([800])
    outputs = torch.randn(1, 800)
    for inputs, heard in ((wave, 0), (noisy, 1)):
        metrics = task.metrics(outputs, TaskBatch(inputs, wave, valid))
        for name in ("si_sdr_noisy", "si_sdr_denoised", "si_sdr_improvement"):
            assert metrics[name][1] == heard
            assert bool(metrics[name][0] != 0) == bool(heard)


def test_noise_of_a_split_is_not_heard_in_another(tiny_experiment, corpora_root):
    """Training hears the first 80 % of a recording only: the noise must be found there, sample for sample."""
    waves = [librosa.load(path, sr=None)[0] for path in (corpora_root / "CHiME3").rglob("*.wav")]
    shares = {"train": (0.0, 0.8), "validation": (0.8, 0.9), "test": (0.9, 1.0)}
    for split, (low, high) in shares.items():
        for i, beside in enumerate(backgrounds(tiny_experiment, split, 8)):
            noise = beside["chime3"].cut(100, generator(i, split))
            places = [
                (place, len(wave))
                for wave in waves
                for place in np.flatnonzero(np.isclose(wave[:-99], noise[0], atol=1e-7))
                if np.allclose(wave[place : place + 100], noise, atol=1e-7)
            ]
            assert len(places) == 1
            place, length = places[0]
            assert low * length - 1 <= place
            assert place + 100 <= high * length + 1


@pytest.mark.parametrize("name", ["next_step", "noise_reduction", "upsampling", "audio_tagging"])
def test_the_batch_of_a_clip_does_not_depend_on_its_neighbours(tiny_experiment, name):
    task = tiny_experiment.tasks[name]
    keyed = keyed_generators(0, name, 3)
    rng = np.random.default_rng(2)
    clips = [
        Clip(
            id=f"clip {i}",
            wave=rng.uniform(-1, 1, n).astype(np.float32),
            label=i % 3,
            backgrounds=beside,
        )
        for i, (n, beside) in enumerate(
            zip([800, 300, 0, 1], backgrounds(tiny_experiment, "train", 4), strict=True)
        )
    ]
    together = task.prepare(clips, keyed)
    for i, clip in enumerate(clips):
        alone = task.prepare([clip], keyed)
        for part, whole in zip(alone, together, strict=True):
            torch.testing.assert_close(part[0], whole[i], rtol=0, atol=0)


def test_a_crop_no_longer_than_the_delay_is_refused_because_nothing_would_be_compared():
    config = TASKS["upsampling"].Config(sources=["speech"], crop_seconds=PAPER_DELAY / 16_000)
    context = TaskContext(classes={}, rate=16_000, crop_samples=32_000, receptive_field=PAPER_FIELD)
    with pytest.raises(ValueError, match=r"tasks\.upsampling\.crop_seconds: 94 samples"):
        TASKS["upsampling"](config, context)
    one_more = dataclasses.replace(config, crop_seconds=(PAPER_DELAY + 1) / 16_000)
    assert TASKS["upsampling"](one_more, context).delay == PAPER_DELAY
