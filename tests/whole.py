"""Whole clips of the tiny corpora, and the truth about them: each alone, in plain torch and float64.

Nothing of the truth is in a batch with others, and nothing is padded but by zeros that a clip's own loss looks at.
"""

import copy
import itertools
import os
import shutil
from pathlib import Path

import big_batch
import hearing
import numpy as np
import soundfile
import tiny
import torch

from mtl_dist.config import load_config
from mtl_dist.data.batches import MicroBatch, Round
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.runtime import World

LONGEST = 0.12
"""Seconds: most clips of 0.04 to 0.5 s are longer."""
BATCH = 16
ZEROS = 100
"""More than any loss looks at after the end of a clip."""
TAIL = {"audio_tagging": 0, "next_step": 0, "noise_reduction": 17, "upsampling": 17}
"""Zeros after a clip: a delay of 7 and two filters of width 11, which look 5 ahead each."""
ALONE = World()


def words(corpora: Path, *more: str) -> list[str]:
    """Words of a tiny run of all four tasks, all on whole clips."""
    every = [f"--tasks.{name}.crop_seconds=null" for name in big_batch.NAMES]
    every += [f"--tasks.{name}.longest_seconds={LONGEST}" for name in big_batch.NAMES]
    every += [*big_batch.weight_words(), "--train.global_batch", str(BATCH)]
    return tiny.tiny_words(corpora, *every, "--data.max_bad_share", "0.5", *more)


def write_uneven(corpora: Path, root: Path) -> Path:
    """Copy the corpora to `root`; of the clips that tagging hears first, one is empty, others have 1 sample, 0.01 s, 1 s."""
    for name in ("LibriSpeech", "CHiME3"):
        os.symlink(corpora / name, root / name)
    shutil.copytree(corpora / "FSDKaggle2018", root / "FSDKaggle2018")
    rng, rate = np.random.default_rng(0), tiny.FSD_RATE
    rows = hearing.training_rows(build(root), "audio_tagging")
    paths = {row.id: row.audio["path"] for _, row in rows}
    first = rounds(build(root), 1)[0].micro_batches["audio_tagging"][0].ids
    for clip, samples in zip(first, (0, 1, rate // 100, rate), strict=False):
        soundfile.write(paths[clip], rng.uniform(-0.5, 0.5, samples), rate, "PCM_16")
    return root


def build(root: Path, *more: str) -> Experiment:
    return build_experiment(load_config(words(root, *more)))


def rounds(
    experiment, number: int, world=ALONE, workers: int = 0, accumulation: int = 1
) -> list[Round]:
    """A rank's rounds from the real stream."""
    found = experiment.rounds(world, accumulation, 0, {}).rounds(workers, pin_memory=False)
    listed = list(itertools.islice(found, number))
    found.close()
    return listed


def alone(experiment, name: str, ids: list[str]) -> list[MicroBatch]:
    """Training clips of the first epoch, each in a batch of its own."""
    rows = {row.id: row for _, row in hearing.training_rows(experiment, name)}
    return [hearing.batch_of(experiment, name, [(0, rows[clip])], bad=None) for clip in ids]


def true_gradients(model, experiment, ids: dict[str, list[str]]) -> dict[str, torch.Tensor]:
    """Return the gradient of sum_i w_i S_i / N_i by parameter name, of the sums over clips that are each alone."""
    twin = copy.deepcopy(model).double()
    delay, total = (twin.trunk.receptive_field - 1) // 2, 0.0
    for name, clips in ids.items():
        terms = []
        for micro in alone(experiment, name, clips):
            batch = micro.batch
            length = int(batch.valid)
            if length > (name == "next_step"):
                batch = batch.with_samples(length + ZEROS * (name != "audio_tagging"))
                hidden = twin.trunk(batch.inputs.double())
                outputs = twin.heads.heads[name](hidden, batch.valid)
                terms.append(big_batch.terms(name, outputs, batch, delay))
        total = total + big_batch.WEIGHTS[name] * torch.cat(terms).mean()
    total.backward()
    return {name: p.grad for name, p in twin.named_parameters()}
