"""Augmentation on the stream: its draws hang on the clip's key alone, and evaluation has none."""

import itertools

import numpy as np
import pytest
import tiny
import torch
from waves import RANGES, RATE, sine

from mtl_dist.audio.augment import (
    Augmentation,
    AugmentConfig,
)
from mtl_dist.audio.clips import Clip
from mtl_dist.config import load_config
from mtl_dist.evaluation import evaluation_batches
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World
from mtl_dist.streams.batches import keyed_generators, prepare
from mtl_dist.streams.keys import generator

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


def rounds_of(experiment, number: int, world=ALONE, workers: int = 0, start: int = 0) -> list:
    positions = dict.fromkeys(experiment.tasks, start * experiment.config.train.global_batch)
    stream = experiment.rounds(world, 1, start, positions)
    return list(itertools.islice(stream.rounds(workers, pin_memory=False), number))


def batches(round_, task: str):
    return torch.cat([m.batch.inputs for m in round_.micro_batches[task]])


def test_ranks_workers_and_restarts_change_nothing_in_an_augmented_stream(augmented):
    truth = rounds_of(augmented, 5)
    shares = [rounds_of(augmented, 3, World(rank, 2), workers=2, start=2) for rank in (0, 1)]
    for alone, *parts in zip(truth[2:], *shares, strict=True):
        for task in augmented.tasks:
            joined = torch.cat([batches(part, task) for part in parts])
            assert torch.equal(joined, batches(alone, task))


def test_augmenting_one_task_leaves_the_other_tasks_bit_for_bit(augmented, tiny_experiment):
    for ours, plain in zip(rounds_of(augmented, 4), rounds_of(tiny_experiment, 4), strict=True):
        for task in augmented.tasks:
            same = torch.equal(batches(ours, task), batches(plain, task))
            assert same == (task != "audio_tagging")


def test_clips_that_every_kind_spares_are_bit_for_bit_what_they_were(augmented, tiny_experiment):
    """So the crops are drawn as without augmentation; half of the clips are spared by each of the four kinds."""
    rows = [(epoch, row) for epoch in range(6) for row in augmented.table("audio_tagging")]
    ours, plain = (
        prepare(e.tasks["audio_tagging"], rows, e.reader, 0)[0].batch
        for e in (augmented, tiny_experiment)
    )
    assert torch.equal(ours.valid, plain.valid)
    assert torch.equal(ours.targets, plain.targets)
    spared = [
        all(
            generator(0, "audio_tagging", e, r["id"], f"augment {k}").random() >= 0.5
            for k in RANGES
        )
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
    rows = [(0, row) for row in quieter.table(task)]
    ours, plain = (
        prepare(e.tasks[task], rows, e.reader, 0)[0].batch for e in (quieter, tiny_experiment)
    )
    half = 10 ** (-6 / 20)
    peaks = plain.targets.abs().amax(dim=1, keepdim=True)  # below 1 where noise asked for it
    torch.testing.assert_close(ours.targets, half * plain.targets / peaks, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours.inputs, half * plain.inputs / peaks, rtol=1e-4, atol=1e-6)


def test_evaluation_hears_the_clips_as_they_are(augmented, tiny_experiment):
    for split in ("validation", "test"):
        heard = []
        for experiment in (augmented, tiny_experiment):
            table = experiment.evaluation_table("audio_tagging", split)
            task = experiment.tasks["audio_tagging"]
            heard.append(list(evaluation_batches(experiment, task, table, [0, 1], [])))
        for ours, plain in zip(*heard, strict=True):
            assert torch.equal(ours[0].inputs, plain[0].inputs)


def test_background_noise_is_that_of_the_named_corpus(corpora_root):
    """The corpus is loaded for it alone, and what is added to a clip is found there."""
    only = ["--train.tasks", "[audio_tagging]", "--tasks.audio_tagging.augment.noise_probability"]
    config = load_config(words(corpora_root, "audio_tagging", *only, "1"))
    assert config.corpora_heard() == ["fsdkaggle2018", "chime3"]
    assert load_config(tiny.tiny_words(corpora_root, *only[:2])).corpora_heard() == [
        "fsdkaggle2018"
    ]
    augment = build_experiment(config).tasks["audio_tagging"].augment
    wave, keyed = sine(440, 400), keyed_generators(0, "audio_tagging", 0)
    found = Augmentation(
        AugmentConfig(noise_snr_db=(0.0, 0.0), noise="chime3", noise_probability=1.0),
        RATE,
        augment.background,
    )(Clip(id="a", wave=wave), keyed).wave.astype(np.float64)
    draw = keyed("a", "augment noise")
    draw.random(), draw.uniform()
    background = augment.background(400, "train", draw).astype(np.float64)
    parts = np.stack([wave.astype(np.float64), background], axis=1)
    weights, rest, *_ = np.linalg.lstsq(parts, found, rcond=None)
    assert rest[0] < 1e-9
    assert (weights > 0.1).all()


def test_every_recipe_is_without_augmentation():
    for recipe in ("paper", "demo", "sample", "large"):
        for task in load_config(["--config", recipe]).tasks.values():
            assert task.augment == AugmentConfig()
    assert Augmentation(AugmentConfig(), RATE).kinds == {}
