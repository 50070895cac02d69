"""WebDataset: tars with FLAC members, shards drawn without end, a shuffle buffer, whole members decoded by soundfile."""

import io
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import soundfile
import webdataset

from rivals import common

NAME = "WebDataset: tars, whole members by soundfile"


def write(work: Path) -> None:
    """Write the utterances as tars."""
    folder = work / "webdataset"
    folder.mkdir()
    for number, paths in enumerate(common.shards_of(common.utterances(work))):
        with webdataset.TarWriter(str(folder / f"train-{number:05d}.tar")) as tar:
            for path in paths:
                tar.write({"__key__": path.stem, "flac": path.read_bytes()})


def crop(noise: common.Backgrounds, sample: dict) -> common.Crop:
    """Decode a member and cut a crop out of it."""
    wave, _ = soundfile.read(io.BytesIO(sample["flac"]), dtype="float32")
    start = common.random_start(len(wave))
    return common.finish(wave[start : start + common.SAMPLES], noise)


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches; workers draw shards of their own."""
    urls = [str(path) for path in sorted((work / "webdataset").iterdir())]
    samples = webdataset.WebDataset(urls, resampled=True, shardshuffle=False)
    crops = samples.shuffle(common.SHUFFLE_BUFFER).map(partial(crop, common.Backgrounds(work)))
    batched = crops.batched(common.BATCH, collation_fn=common.collate)
    return iter(webdataset.WebLoader(batched, batch_size=None, num_workers=workers))
