"""Another rank: functions that tests call in a process which has received what rank 0 opened."""

import multiprocessing
import pickle

import numpy as np

from mtl_dist.audio.clips import Background, Row
from mtl_dist.data.lanes import Blocks
from mtl_dist.data.noise import read_bounded


def read(sent: bytes, split: str, blocks: list[int]) -> list[dict[str, bytes]]:
    """Return {id: FLAC} of blocks of a corpus."""
    return rows_of(Blocks(pickle.loads(sent).parts[split], 3, 60), blocks)


def rows_of(blocks: Blocks, numbers: list[int]) -> list[dict[str, bytes]]:
    """Return {id: bytes} of some blocks."""
    told = []
    for number in numbers:
        rows = [row for _, row in blocks.rows(number, ("key",))]
        told.append({row.id.split("/")[1]: row.audio["bytes"] for row in rows})
    return told


def cut(sent: bytes, samples: int) -> list[np.ndarray]:
    """Return a stretch of each recording of a corpus of noise."""
    blocks, draw = Blocks(pickle.loads(sent).noise("train"), 3, 60), np.random.default_rng(0)
    rows = [row for number in range(len(blocks)) for _, row in blocks.rows(number, ("key",))]
    return [Background(row, 16_000).cut(samples, draw) for row in rows]


def stretch(row: Row, samples: int, patience_seconds: float = 60) -> np.ndarray:
    """Return a stretch of a recording, as a loader's worker of rank 5 reads it."""
    background, draw = Background(row, 16_000), np.random.default_rng(0)
    return read_bounded(lambda: background.cut(samples, draw), row, 5, patience_seconds)


def in_a_new_process(function, *arguments):
    """Call a function in a process that shares nothing with this one."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply_async(function, arguments).get(120)


def in_a_fork(function, *arguments):
    """Call a function in a process as a loader's worker is one."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply_async(function, arguments).get(60)
