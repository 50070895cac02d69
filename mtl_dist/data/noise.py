"""Noise beside clips, and audio that is read within a time limit, as it may lie on a disk or at a URL.

Tested by tests/test_hub_faults.py and tests/test_lanes.py.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import numpy as np

from mtl_dist.audio.clips import Background, Row
from mtl_dist.audio.reading import FarFileError
from mtl_dist.data.faults import DataError, call_with_timeout, rank_label, reason

Result = TypeVar("Result")

NOISE_CUTS = 8
"""How many clips of a lane, one after the other, have noise cut from one recording or piece, each at a place of its own: a
row group of noise is read as seldom as one of clips, and takes a fraction of the memory."""


def read_bounded(
    action: Callable[[], Result], row: Row, rank: int | None, seconds: float
) -> Result:
    """Return `action()`, which reads the audio of a row; where it is not in memory, within so many seconds.

    Raises:
        DataError: it is not there in time, or a file at a URL cannot be read.
    """
    if row.audio.get("bytes") is not None:
        return action()
    who = f"{rank_label(rank)}, corpus {row.corpus}"
    what = f"{who}, {row.audio['path']}"
    try:
        return call_with_timeout(action, seconds, what)
    except FarFileError as error:  # it names its file
        raise DataError(f"{who}, {reason(error).removeprefix('FarFileError: ')}") from error
    except TimeoutError as error:
        raise DataError(f"{what}: {reason(error)}") from error


@dataclasses.dataclass(frozen=True)
class Beside(Background):
    """A recording beside a clip; `bound` is (rank, seconds) of read_bounded."""

    bound: tuple[int | None, float]

    def cut(self, samples: int, generator: np.random.Generator) -> np.ndarray:
        """As Background.cut, within the time. Raises DataError as read_bounded does, too."""
        cut = functools.partial(Background.cut, self, samples, generator)
        return read_bounded(cut, self.row, *self.bound)
