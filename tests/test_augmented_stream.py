"""Augmentation on the stream: its draws hang on the clip's key alone, and evaluation has none."""

import itertools

import hearing
import numpy as np
import pytest
import soundfile
import tiny
import torch
from waves import RANGES, RATE, sine

from mtl_dist.audio.augment import (
    Augmentation,
    AugmentConfig,
)
from mtl_dist.audio.clips import Background, Clip
from mtl_dist.config import load_config
from mtl_dist.data.batches import keyed_generators
from mtl_dist.data.keys import generator
from mtl_dist.evaluation import evaluation_batches, evaluation_rows
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World

ALONE = World()


def words(root, task: str, *more: str) -> list[str]:
    on = [
        *("noise_snr_db", "[0, 10]", "noise", "chime3", "pitch_semitones", "[-3, 3]"),
        *("gain_db", "[-12, 0]", "shift_seconds", "[-0.02, 0.02]"),
    ]
    pairs = zip(on[::2], on[1::2], strict=True)
    return tiny.tiny_words(
        root, *[w for n, v in pairs for w in (f"--tasks.{task}.augment.{n}", v)], *more
    )


@pytest.fixture(scope="module")
def augmented(corpora_root):
    """All four tasks, tagging with all four kinds of augmentation."""
    return build_experiment(load_config(words(corpora_root, "audio_tagging")))


def rounds_of(experiment, number: int) -> list:
    stream = experiment.rounds(ALONE, 1, 0, {})
    return list(itertools.islice(stream.rounds(0, pin_memory=False), number))


def batches(round_, task: str):
    return torch.cat([m.batch.inputs for m in round_.micro_batches[task]])


def test_augmenting_one_task_leaves_the_other_tasks_bit_for_bit(augmented, tiny_experiment):
    for ours, plain in zip(rounds_of(augmented, 4), rounds_of(tiny_experiment, 4), strict=True):
        for task in augmented.tasks:
            same = torch.equal(batches(ours, task), batches(plain, task))
            assert same == (task != "audio_tagging")


def test_clips_that_every_kind_spares_are_bit_for_bit_what_they_were(augmented, tiny_experiment):
    """So the crops are drawn as without augmentation; half of the clips are spared by each of the four kinds."""
    rows = hearing.training_rows(augmented, "audio_tagging", epochs=6)
    ours, plain = (
        hearing.batch_of(e, "audio_tagging", rows).batch for e in (augmented, tiny_experiment)
    )
    assert torch.equal(ours.valid, plain.valid)
    assert torch.equal(ours.targets, plain.targets)
    spared = [
        all(generator(0, "audio_tagging", e, r.id, f"augment {k}").random() >= 0.5 for k in RANGES)
        for e, r in rows
    ]
    assert any(spared)
    assert [torch.equal(a, b) for a, b in zip(ours.inputs, plain.inputs, strict=True)] == spared


@pytest.mark.parametrize("task", ["noise_reduction", "upsampling", "next_step"])
def test_the_augmented_crop_is_the_clean_target_of_a_self_supervised_task(
    corpora_root, tiny_experiment, task
):
    """Its crops have their peak at 1; at -6 dB neither target nor input has another shape, and noise the same SNR."""
    gain = [f"--tasks.{task}.augment.gain_db", "[-6,-6]"]
    gain += [f"--tasks.{task}.augment.gain_probability", "1"]
    quieter = build_experiment(load_config(tiny.tiny_words(corpora_root, *gain)))
    rows = hearing.training_rows(quieter, task)
    ours, plain = (hearing.batch_of(e, task, rows).batch for e in (quieter, tiny_experiment))
    half = 10 ** (-6 / 20)
    peaks = plain.targets.abs().amax(dim=1, keepdim=True)  # below 1 where noise asked for it
    torch.testing.assert_close(ours.targets, half * plain.targets / peaks, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.inputs, half * plain.inputs / peaks, rtol=1e-4, atol=1e-6)


def test_evaluation_hears_the_clips_as_they_are(augmented, tiny_experiment):
    for split in ("validation", "test"):
        heard = []
        for experiment in (augmented, tiny_experiment):
            rows = evaluation_rows(experiment, "audio_tagging", split, 2, ALONE)
            task = experiment.tasks["audio_tagging"]
            heard.append(list(evaluation_batches(experiment, task, rows, [])))
        for (_, ours), (_, plain) in zip(*heard, strict=True):
            assert torch.equal(ours[0].inputs, plain[0].inputs)


def test_background_noise_is_that_of_the_named_corpus(corpora_root):
    """The corpus is loaded for it alone, and what is added to a clip is found there."""
    only = ["--train.tasks", "[audio_tagging]", "--tasks.audio_tagging.augment.noise_probability"]
    config = load_config(words(corpora_root, "audio_tagging", *only, "1"))
    assert config.corpora_heard() == ["fsdkaggle2018", "chime3"]
    assert load_config(tiny.tiny_words(corpora_root, *only[:2])).corpora_heard() == [
        "fsdkaggle2018"
    ]
    experiment = build_experiment(config)
    _, recording = next(experiment.streams()[0].noise_lanes(0, 0, {})["chime3"])
    wave, keyed = sine(440, 400), keyed_generators(0, "audio_tagging", 0)
    clip = Clip(id="a", wave=wave, backgrounds={"chime3": Background(recording, RATE)})
    loud = AugmentConfig(noise_snr_db=(0.0, 0.0), noise="chime3", noise_probability=1.0)
    found = Augmentation(loud, RATE)(clip, keyed).wave.astype(np.float64)
    tone = wave.astype(np.float64) / np.linalg.norm(wave)
    whole, _ = soundfile.read(recording.audio["path"])
    stretches = np.lib.stride_tricks.sliding_window_view(whole[: int(0.8 * len(whole))], 400)
    rest, *others = (w - (w @ tone)[..., None] * tone for w in (found, stretches))
    cosines = others[0] @ rest / np.linalg.norm(others[0], axis=1) / np.linalg.norm(rest)
    assert cosines.max() > 0.99999


def test_every_recipe_is_without_augmentation():
    for recipe in ("paper", "demo", "sample", "large"):
        for task in load_config(["--config", recipe]).tasks.values():
            assert task.augment == AugmentConfig()
    assert Augmentation(AugmentConfig(), RATE).kinds == {}
