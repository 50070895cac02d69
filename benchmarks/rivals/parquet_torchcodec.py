"""`datasets` streaming from Parquet shards, Audio() decoded by torchcodec, a shuffle buffer.

Kinder to it than `row["audio"]["array"]`, which decodes the whole file: the decoder is asked for the crop alone.
"""

from collections.abc import Iterator
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from torch.utils.data import DataLoader

from rivals import common

NAME = "datasets streaming, torchcodec, shuffle buffer"
ROW_GROUP = 100
"""Rows of a row group: what `datasets` writes for audio, and so what is on the Hub."""


def write(work: Path) -> None:
    """Write the utterances as Parquet shards, as `datasets` stores audio."""
    folder = work / "parquet"
    folder.mkdir()
    for number, paths in enumerate(common.shards_of(common.utterances(work))):
        audio = [{"bytes": path.read_bytes(), "path": path.name} for path in paths]
        table = pa.table({"id": [path.stem for path in paths], "audio": audio})
        pq.write_table(table, folder / f"train-{number:05d}.parquet", row_group_size=ROW_GROUP)


def collate(noise: common.Backgrounds, rows: list[dict]) -> common.Batch:
    """Decode a random crop of every row, and make the batch."""
    crops = []
    for row in rows:
        decoder = row["audio"]
        seconds = decoder.metadata.duration_seconds_from_header
        start = common.random_start(int(seconds * common.RATE)) / common.RATE
        stop = min(seconds, start + common.SAMPLES / common.RATE)
        samples = decoder.get_samples_played_in_range(start, stop).data
        crops.append(common.finish(np.asarray(samples[0]), noise))
    return common.collate(crops)


def batches(work: Path, workers: int) -> Iterator[common.Batch]:
    """Yield batches; workers share the files."""
    stream = datasets.load_dataset(
        "parquet",
        data_files=[str(path) for path in sorted((work / "parquet").iterdir())],
        split="train",
        streaming=True,
    )
    stream = stream.cast_column("audio", datasets.Audio(sampling_rate=common.RATE))
    stream = stream.repeat(None).shuffle(seed=0, buffer_size=common.SHUFFLE_BUFFER)
    return iter(
        DataLoader(
            stream,
            common.BATCH,
            num_workers=workers,
            collate_fn=partial(collate, common.Backgrounds(work)),
        )
    )
