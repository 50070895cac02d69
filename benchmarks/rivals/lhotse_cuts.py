"""lhotse: a lazy CutSet from a JSONL manifest, truncated to 2 s and mixed by lhotse, waves read when a batch is made.

lhotse reads the crop alone, as ours does. It has no peak normalisation: the tracks of a mix are fetched apart, scaled and
added. Features are off.
"""

import random
from collections.abc import Iterator
from pathlib import Path

from lhotse import CutSet, Recording, RecordingSet
from lhotse.dataset import DynamicCutSampler
from torch.utils.data import DataLoader, Dataset

from rivals import common

NAME = "lhotse: lazy cuts, truncate, mix"


class Crops(Dataset):
    """A CutSet of a batch's utterances -> (noisy, held, clean)."""

    def __init__(self, noise: CutSet):
        self.noise = noise

    def __getitem__(self, cuts: CutSet) -> common.Batch:
        seconds = common.SAMPLES / common.RATE
        crops = CutSet(
            cut.truncate(offset=random.uniform(0, max(0, cut.duration - seconds)), duration=seconds)
            if cut.duration > seconds
            else cut
            for cut in cuts
        )
        mixed = crops.mix(
            self.noise, snr=common.SNR_DB, random_mix_offset=True, seed="trng", mix_prob=1.0
        )
        return common.collate([self.crop(cut.load_audio(mixed=False)) for cut in mixed])

    @staticmethod
    def crop(tracks) -> common.Crop:
        """Add the tracks (speech, noise at its gain), scaled by the speech's peak."""
        speech, noise = (track.reshape(-1) for track in tracks)
        clean = common.normalise(speech)
        noisy = clean + noise * (1 / max(float(abs(speech).max()), 1e-3))
        noisy, scaled = common.within_one(common.pad(noisy), common.pad(clean))
        return noisy, scaled, common.hold(common.pad(clean))


def write(work: Path) -> None:
    """Write the manifests of utterances and of backgrounds."""
    folder = work / "lhotse"
    folder.mkdir()
    for name, paths in (("cuts", common.utterances(work)), ("noise", common.backgrounds(work))):
        recordings = RecordingSet.from_recordings(map(Recording.from_file, paths))
        CutSet.from_manifests(recordings).to_file(folder / f"{name}.jsonl")


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches; the sampler draws cuts, workers load them."""
    cuts = CutSet.from_jsonl_lazy(work / "lhotse/cuts.jsonl").repeat()
    noise = CutSet.from_jsonl_lazy(work / "lhotse/noise.jsonl").to_eager()
    sampler = DynamicCutSampler(
        cuts, max_cuts=common.BATCH, shuffle=True, shuffle_buffer_size=common.SHUFFLE_BUFFER
    )
    return iter(DataLoader(Crops(noise), sampler=sampler, batch_size=None, num_workers=workers))
