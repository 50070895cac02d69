"""What is drawn for a clip hangs on (seed, task, epoch, clip) alone, and a clip that cannot be read changes no other."""

import itertools

import hearing
import kinds
import numpy as np
import pytest
import tiny
import torch

from mtl_dist.config import load_config
from mtl_dist.data.keys import generator
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World


def rounds_of(experiment, number: int, world=World()) -> list:  # noqa: B008
    rounds = experiment.rounds(world, 1, 0, {}).rounds(0, pin_memory=False)
    return list(itertools.islice(rounds, number))


def inputs(experiment, task: str, epoch: int = 0, seed: int = 0) -> torch.Tensor:
    rows = [(epoch, row) for _, row in hearing.training_rows(experiment, task)]
    return hearing.batch_of(experiment, task, rows, seed).batch.inputs


def test_draws_differ_between_epochs_and_seeds_and_are_the_same_for_equal_ones(tiny_experiment):
    base = inputs(tiny_experiment, "noise_reduction")
    assert torch.equal(base, inputs(tiny_experiment, "noise_reduction"))
    for other in ({"epoch": 1}, {"seed": 1}):
        found = inputs(tiny_experiment, "noise_reduction", **other)
        assert not any(torch.equal(a, b) for a, b in zip(base, found, strict=True))


def test_tasks_crop_the_same_clip_at_places_of_their_own(tiny_experiment):
    rows = hearing.training_rows(tiny_experiment, "next_step")
    crops = [
        hearing.batch_of(tiny_experiment, t, rows).batch.targets
        for t in ("next_step", "upsampling")
    ]
    assert sum(not torch.equal(a, b) for a, b in zip(*crops, strict=True)) > len(rows) / 2


def test_a_corpus_smaller_than_a_round_comes_again_with_fresh_crops(corpora_root):
    words = tiny.tiny_words(corpora_root, "--train.global_batch", "42")  # of 21 clips
    (round_,) = rounds_of(build_experiment(load_config(words)), 1)
    (micro,) = round_.micro_batches["audio_tagging"]
    twice: dict[str, list] = {}
    for clip, wave in zip(micro.ids, micro.batch.inputs, strict=True):
        twice.setdefault(clip, []).append(wave)
    assert [len(crops) for crops in twice.values()] == [2] * 21
    assert sum(not torch.equal(a, b) for a, b in twice.values()) > 7


def test_clips_and_seconds_of_the_ranks_add_up(tiny_experiment):
    (whole,), *shares = (
        rounds_of(tiny_experiment, 1, w) for w in (World(), World(0, 2), World(1, 2))
    )
    assert sum(share.clips for (share,) in shares) == whole.clips == 4 * 4
    heard = (
        sum(int(m.batch.valid.sum()) for ms in whole.micro_batches.values() for m in ms) / 16_000
    )
    for found in (whole.audio_seconds, sum(share.audio_seconds for (share,) in shares)):
        assert found == pytest.approx(heard)
    for corpus, read in whole.read.items():
        assert sum(share.read[corpus].clips for (share,) in shares) == read.clips
    assert sum(read.clips for read in whole.read.values()) == 2 * 4  # by two streams


def test_a_bad_file_keeps_its_place_and_changes_no_other_clip(tmp_path):
    experiment = build_experiment(load_config(tiny.tiny_words(tiny.write_corpora(tmp_path))))
    before = rounds_of(experiment, 3)
    rows = {row.id: row.audio["path"] for _, row in hearing.training_rows(experiment, "next_step")}
    heard = [clip for r in before for clip in r.micro_batches["next_step"][0].ids]
    victim = next(clip for clip in heard if clip.startswith("librispeech"))
    tiny.Path(rows[victim]).write_bytes(b"no audio")
    broken, missing = rounds_of(experiment, 3), 0
    assert sum(rows[victim] in message for r in broken for message in r.bad) >= 3
    for name in experiment.tasks:
        for found, wanted in zip(broken, before, strict=True):
            (ours,), (theirs,) = found.micro_batches[name], wanted.micro_batches[name]
            assert ours.ids == theirs.ids
            for place, clip in enumerate(ours.ids):
                if clip == victim:
                    missing += 1
                    assert int(ours.batch.valid[place]) == 0
                    assert not ours.batch.inputs[place].any()
                else:
                    assert torch.equal(ours.batch.inputs[place], theirs.batch.inputs[place])
    assert missing >= 3


def test_rows_without_ids_are_called_by_their_place_in_every_epoch(tmp_path):
    rows = [row | {"id": None, "label": None} for row in kinds.clips(23)]
    kinds.parquet(tmp_path / "a.parquet", rows, group=4)
    source = f"[{{path: {tmp_path}/a.parquet}}]"
    words = ["--train.tasks", "[next_step]", "--train.main_task", "next_step"]
    words += ["--tasks.next_step.sources", "[librispeech]", "--corpora.librispeech.sources", source]
    found = hearing.training_rows(build_experiment(load_config(words)), "next_step", epochs=3)
    audio: dict[str, set] = {}
    for _, row in found:
        audio.setdefault(row.id, set()).add(row.audio["bytes"])
    assert len(found) == 3 * len(audio)
    assert all(len(heard) == 1 for heard in audio.values())


def test_equal_keys_draw_equally_and_others_do_not():
    assert generator(1, "a").integers(2**62) == generator(1, "a").integers(2**62)
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "a", ""), ("1a",), (1, "a", 0), (11, ""), (1, 1)]
    assert len({int(generator(*key).integers(2**62)) for key in keys}) == len(keys)


def test_draws_of_different_keys_are_not_correlated():
    first, second = (generator(0, "clip", i).normal(size=20_000) for i in (1, 2))
    assert abs(np.corrcoef(first, second)[0, 1]) < 5 / np.sqrt(20_000)
    starts = np.array([generator(0, "clip", i).uniform() for i in range(2_000)])
    counts, _ = np.histogram(starts, bins=10, range=(0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-square of 9 degrees, 1 in 10,000
