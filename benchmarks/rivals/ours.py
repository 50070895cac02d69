"""mtl_dist's own stream, fed by a task of one crop a clip with both inputs, registered as a user's task is."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch

from mtl_dist.audio.clips import Clip
from mtl_dist.audio.transforms import hold_samples
from mtl_dist.config import load_config
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.runtime import World
from mtl_dist.tasks import TaskBatch, register_task
from mtl_dist.tasks.base import Keyed, pad_waves
from mtl_dist.tasks.noise_reduction import NoiseReduction
from rivals import common


@register_task("both_inputs")
class BothInputs(NoiseReduction):
    """Inputs (B, 2, T): the noisy crop and the crop held at 4 kHz; targets (B, T): the clean crop."""

    @dataclasses.dataclass(kw_only=True)
    class Config(NoiseReduction.Config):
        """The benchmark's task."""

        low_rate: int = common.LOW_RATE
        """Sample rate of the held input in Hz."""

    def prepare(self, clips: list[Clip], generator: Keyed) -> TaskBatch:
        """Mix noise into the crop, and hold it at the low rate."""
        noisy = super().prepare(clips, generator)
        held = [hold_samples(c.wave, self.context.rate, self.config.low_rate) for c in clips]
        inputs = torch.stack((noisy.inputs, pad_waves(held, self.crop_samples)), dim=1)
        return TaskBatch(inputs, noisy.targets, noisy.valid)


def experiment(librispeech: Path, chime3: Path) -> Experiment:
    """Build the experiment of one task on these roots, by the words that a user would write."""
    words = ["--train.tasks", "[both_inputs]", "--train.main_task", "both_inputs"]
    words += ["--tasks.both_inputs.sources", "[librispeech]", "--tasks.both_inputs.noise", "chime3"]
    words += ["--corpora.librispeech.root", str(librispeech), "--corpora.chime3.root", str(chime3)]
    words += ["--train.global_batch", str(common.BATCH)]
    words += ["--data.crop_seconds", str(common.SAMPLES / common.RATE)]
    return build_experiment(load_config(words))


def batches_from(librispeech: Path, chime3: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches of the rounds of one rank."""
    stream = experiment(librispeech, chime3).rounds(World(), 1, 0, {})
    for round_ in stream.rounds(workers, pin_memory=False):
        batch = round_.micro_batches["both_inputs"][0].batch
        yield batch.inputs[:, 0], batch.inputs[:, 1], batch.targets
