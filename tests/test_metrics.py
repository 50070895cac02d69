"""The metrics against brute force, numpy, librosa and scikit-learn."""

import librosa
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import (
    accuracy_score,
    label_ranking_average_precision_score,
    top_k_accuracy_score,
)

from mtl_dist.metrics import Sums, average_precision_at_3, log_spectral_distance, si_sdr
from mtl_dist.tasks import TaskBatch

RNG = np.random.default_rng(0)


def brute_map_at_3(scores: np.ndarray, labels: np.ndarray) -> float:
    """Kaggle's definition, written out; of equal scores the lower index ranks first."""
    total = 0.0
    for row, label in zip(scores, labels, strict=True):
        ranked = sorted(range(len(row)), key=lambda k: (-row[k], k))
        for place in range(min(3, len(row))):
            if ranked[place] == label:
                total += 1 / (place + 1)
    return total / len(labels)


@given(seed=st.integers(0, 10**6), clips=st.integers(1, 20), classes=st.integers(2, 8))
@settings(max_examples=40, deadline=None)
def test_map_at_3_is_the_brute_force_with_ties(seed, clips, classes):
    rng = np.random.default_rng(seed)
    scores = rng.integers(0, 4, (clips, classes)).astype(np.float32)
    labels = rng.integers(0, classes, clips)
    found = average_precision_at_3(torch.tensor(scores), torch.tensor(labels)).mean().item()
    assert found == pytest.approx(brute_map_at_3(scores, labels))


def test_map_at_3_is_scikit_learns_ranking_precision_cut_at_rank_3():
    scores, labels = RNG.normal(size=(300, 41)), RNG.integers(0, 41, 300)
    one_hot = np.eye(41)[labels]
    ranks = np.array(
        [
            label_ranking_average_precision_score(t[None], s[None])
            for t, s in zip(one_hot, scores, strict=True)
        ]
    )  # 1 / rank of the one label
    wanted = np.where(ranks >= 1 / 3 - 1e-12, ranks, 0.0)
    found = average_precision_at_3(torch.tensor(scores), torch.tensor(labels))
    np.testing.assert_allclose(found.numpy(), wanted, rtol=1e-6)
    hits = top_k_accuracy_score(labels, scores, k=3, labels=range(41))
    assert (found > 0).double().mean().item() == pytest.approx(hits)


def test_tagging_averages_probabilities_over_windows_and_scores_the_last_crop_apart(
    tiny_experiment,
):
    task, sums = tiny_experiment.tasks["audio_tagging"], Sums()
    labels, averaged, single = [], [], []
    for windows in [1, 3, 2, 5] * 10:
        logits = 2 * RNG.normal(size=(windows + 1, 3))
        label = int(RNG.integers(0, 3))
        targets = torch.full((windows + 1,), label)
        batch = TaskBatch(torch.zeros(windows + 1, 9), targets, torch.full((windows + 1,), 9))
        sums.add(task.metrics(torch.tensor(logits, dtype=torch.float32), batch))
        p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        labels.append(label)
        averaged.append(p[:-1].mean(axis=0))
        single.append(p[-1])
    means, labels = sums.means(), np.array(labels)
    for scores, suffix in ((np.array(averaged), ""), (np.array(single), "_single_crop")):
        wanted = brute_map_at_3(scores, labels)
        assert means[f"map@3{suffix}"].item() == pytest.approx(wanted, rel=1e-6)
        accuracy = accuracy_score(labels, scores.argmax(axis=1))
        assert means[f"accuracy{suffix}"].item() == pytest.approx(accuracy, rel=1e-6)
    loss = -np.log(np.array(averaged)[np.arange(40), labels]).mean()
    assert means["loss"].item() == pytest.approx(loss, rel=1e-5)
    for label in range(3):
        own = labels == label
        wanted = brute_map_at_3(np.array(averaged)[own], labels[own])
        assert means["map@3_per_class"][label].item() == pytest.approx(wanted, rel=1e-6)
    counts = np.zeros((3, 3))
    np.add.at(counts, (labels, np.array(averaged).argmax(axis=1)), 1)
    np.testing.assert_allclose(means["confusion"].numpy() * 40, counts, rtol=1e-9)


def waves(samples: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    target = RNG.normal(size=samples)
    estimate = 0.7 * target + 0.3 * RNG.normal(size=samples)
    return torch.tensor(estimate, dtype=torch.float32), torch.tensor(target, dtype=torch.float32)


def test_si_sdr_is_its_formula():
    for _ in range(5):
        estimate, target = waves()
        e, t = estimate.double().numpy(), target.double().numpy()
        part = (e @ t) / (t @ t) * t
        wanted = 10 * np.log10((part @ part) / ((e - part) @ (e - part)))
        value, count = si_sdr(estimate, target)
        assert count.item() == 1
        assert value.item() == pytest.approx(wanted, abs=1e-3)


def test_si_sdr_is_that_of_torchmetrics():
    from torchmetrics.functional.audio import scale_invariant_signal_distortion_ratio as theirs

    rng = torch.Generator().manual_seed(5)
    for level in (1e-3, 0.1, 1.0):
        target, noise = torch.randn(2, 4000, generator=rng) * level
        for estimate in (target + noise, 0.3 * target, noise, torch.zeros(4000), target):
            wanted = float(theirs(estimate, target))
            assert float(si_sdr(estimate, target)[0]) == pytest.approx(wanted, abs=1e-3)


@pytest.mark.parametrize("scale", [0.05, 0.5, 20.0])
def test_si_sdr_does_not_hear_the_scale_of_the_estimate(scale):
    estimate, target = waves()
    found = si_sdr(scale * estimate, target)[0].item()
    assert found == pytest.approx(si_sdr(estimate, target)[0].item(), abs=1e-3)


@pytest.mark.parametrize("metric", [si_sdr, log_spectral_distance])
def test_a_silent_or_empty_target_is_not_counted(metric):
    for target in (torch.zeros(3000), torch.zeros(0), torch.zeros(1)):
        value, count = metric(torch.ones(len(target)), target)
        assert (value.item(), count.item()) == (0.0, 0.0)


def test_si_sdr_improvement_is_the_difference_of_output_and_input(tiny_experiment):
    task = tiny_experiment.tasks["noise_reduction"]
    clean, noise, output = (torch.randn(1, 200) for _ in range(3))
    batch = TaskBatch(clean + 0.3 * noise, clean, torch.tensor([150]))
    metrics = task.metrics(output, batch)
    estimate, frames = output[0, 7:157], slice(0, 150)  # the delay of the tiny model is 7
    before = si_sdr(batch.inputs[0, frames], clean[0, frames])[0]
    after = si_sdr(estimate, clean[0, frames])[0]
    found = metrics["si_sdr_improvement"][0].item()
    assert found == pytest.approx((after - before).item(), abs=1e-4)


def numpy_distance(estimate: np.ndarray, target: np.ndarray) -> float:
    """Root mean square over frequency, mean over frames, of the difference of log powers in dB, both floored 60 dB
    below the target's loudest point."""
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)

    def power(wave: np.ndarray) -> np.ndarray:
        stft = librosa.stft(wave, n_fft=2048, hop_length=512, window=window, center=False)
        return np.abs(stft) ** 2

    floor = power(target).max() / 1e6
    levels = [10 * np.log10(np.maximum(power(wave), floor)) for wave in (estimate, target)]
    return float(np.sqrt(((levels[0] - levels[1]) ** 2).mean(axis=0)).mean())


@pytest.mark.parametrize("samples", [2048, 5000, 32_000])
def test_log_spectral_distance_is_its_formula_on_librosas_stft(samples):
    estimate, target = waves(samples)
    wanted = numpy_distance(estimate.double().numpy(), target.double().numpy())
    found, count = log_spectral_distance(estimate, target)
    assert count.item() == 1
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_log_spectral_distance_of_a_known_gain_is_that_gain():
    _, target = waves(8000)
    assert log_spectral_distance(10 * target, target)[0].item() == pytest.approx(20.0, abs=1e-3)


@pytest.mark.parametrize("samples", [2, 100, 9000])
def test_log_spectral_distance_of_equal_waves_is_zero(samples):
    _, target = waves(samples)
    value, count = log_spectral_distance(target, target)
    assert (value.item(), count.item()) == (0.0, 1.0)


def test_log_spectral_distance_does_not_hear_frames_of_silence_as_infinite():
    estimate, target = waves(9000)
    target[3000:] = 0.0
    wanted = numpy_distance(estimate.double().numpy(), target.double().numpy())
    found, _ = log_spectral_distance(estimate, target)
    assert found.item() == pytest.approx(wanted, rel=1e-4)


def test_a_clip_of_one_sample_has_no_spectrum_and_is_not_counted():
    value, count = log_spectral_distance(torch.ones(1), torch.ones(1))
    assert (value.item(), count.item()) == (0.0, 0.0)


def test_prediction_gain_is_the_power_ratio_in_db(tiny_experiment):
    task = tiny_experiment.tasks["next_step"]
    wave, output = torch.randn(1, 60), torch.randn(1, 60)
    x, y = wave[0, 1:40].double().numpy(), output[0, :39].double().numpy()
    wanted = 10 * np.log10((x**2).sum() / ((y - x) ** 2).sum())
    metrics = task.metrics(output, TaskBatch(wave, wave, torch.tensor([40])))
    assert metrics["prediction_gain"][0].item() == pytest.approx(wanted, abs=1e-4)
    assert metrics["prediction_gain"][1].item() == 1


@given(seed=st.integers(0, 1000), cut=st.integers(0, 12))
@settings(max_examples=20, deadline=None)
def test_sums_over_two_parts_equal_all_at_once(seed, cut):
    rng = np.random.default_rng(seed)
    clips = [
        {
            "scalar": (torch.tensor(rng.normal()), torch.tensor(float(rng.integers(0, 2)))),
            "vector": (torch.tensor(rng.normal(size=3)), torch.tensor(rng.integers(0, 2, 3))),
        }
        for _ in range(12)
    ]
    whole, left, right, joined = Sums(), Sums(), Sums(), Sums()
    for place, clip in enumerate(clips):
        whole.add(clip)
        (left if place < cut else right).add(clip)
    joined.add(left.sums)
    joined.add(right.sums)
    assert set(joined.means()) == set(whole.means())
    for name, mean in whole.means().items():
        torch.testing.assert_close(joined.means()[name], mean, rtol=1e-12, atol=1e-12)


def test_what_was_never_counted_has_no_mean():
    sums = Sums()
    sums.add({"never": (torch.tensor(0.0), torch.tensor(0.0))})
    assert sums.means() == {}
