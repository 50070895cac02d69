"""From a corpus row to the clips a task sees: crops and windows out of the sounding part, scaled to [-1, 1]."""

import dataclasses
import math
from collections.abc import Mapping

import numpy as np
import soundfile

from mtl_dist.audio.reading import open_clip, read_stretch, sounding_span
from mtl_dist.audio.transforms import peak_normalise


@dataclasses.dataclass(frozen=True, kw_only=True)
class Clip:
    """A piece of audio ready for a task.

    `wave` is float32 (T,) in [-1, 1] with T <= the crop length; T = 0 stands for a clip that could not be read: it keeps
    its place in the batch and counts for nothing. `label` is an index into the corpus' classes, -1 without a label.
    """

    id: str
    wave: np.ndarray
    label: int = -1
    split: str = "train"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipReader:
    """How rows become clips. `rate` in Hz, `silence_db` in dBFS, `peak`: scale each clip by its largest magnitude.

    `spans` is {corpus: int64 (rows,)}, zeros at first: where the sound of each row lies, once it was heard. In memory that
    is shared it serves a process and the loader workers that it forks.
    """

    rate: int = 16_000
    silence_db: float = -60.0
    peak: bool = True
    spans: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    def crop(self, row: dict, samples: int, generator: np.random.Generator) -> Clip:
        """Cut `samples` samples at a random place of the sounding part, or all of it if that is shorter."""
        with open_clip(row["audio"]) as file:
            start, stop = self._span(row, file)
            frames = math.ceil(samples * file.samplerate / self.rate)
            if stop - start > frames:
                start += int(generator.integers(0, stop - start - frames + 1))
                stop = start + frames
            wave = read_stretch(file, start, stop - start, self.rate)[:samples]
        return self._clip(row, wave)

    def windows(self, row: dict, samples: int) -> list[Clip]:
        """Cut the whole sounding part into windows side by side; the last may be shorter, and is kept if it is the
        only one or at least half a window long."""
        with open_clip(row["audio"]) as file:
            start, stop = self._span(row, file)
            frames = math.ceil(samples * file.samplerate / self.rate)
            count = max(1, int((stop - start) / frames + 0.5))
            begins = [start + i * frames for i in range(count)]
            return [
                self._clip(row, read_stretch(file, b, min(frames, stop - b), self.rate)[:samples])
                for b in begins
            ]

    def absent(self, row: dict) -> Clip:
        """Return the empty clip that keeps a bad file's place."""
        return Clip(id=row["id"], wave=np.zeros(0, np.float32), label=-1, split=row["split"])

    def _span(self, row: dict, file: soundfile.SoundFile) -> tuple[int, int]:
        """Return the sounding part as the row says, if it was found for the same `silence_db`, or as it is heard."""
        if row.get("silence_db") == self.silence_db:
            return row["sound_start"], row["sound_stop"]
        heard = self.spans.get(row.get("corpus"))
        if heard is None:
            return sounding_span(file, self.silence_db)
        if not heard[row["number"]]:
            start, stop = sounding_span(file, self.silence_db)
            heard[row["number"]] = (
                start << 32 | stop
            )  # in one piece: others read while this is written
        return divmod(int(heard[row["number"]]), 1 << 32)

    def _clip(self, row: dict, wave: np.ndarray) -> Clip:
        wave = peak_normalise(wave) if self.peak else np.clip(wave, -1.0, 1.0)
        return Clip(id=row["id"], wave=wave, label=row["label"], split=row["split"])
