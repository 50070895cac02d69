"""From a corpus row to the clips a task sees: crops and windows out of the sounding part, scaled to [-1, 1]."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping

import numpy as np
import soundfile

from mtl_dist.audio.reading import open_clip, read_stretch, sounding_span
from mtl_dist.audio.transforms import peak_normalise, tile_to


@dataclasses.dataclass(kw_only=True)
class Row:
    """A clip of a corpus before it is decoded: `audio` is {"path", "bytes"} as `datasets` has it (audio/reading.py)."""

    id: str
    audio: dict
    label: int = -1
    """Index into the corpus' classes, -1 without a label."""
    split: str = "train"
    corpus: str = ""
    number: int = -1
    """Within the corpus, where its rows are listed."""
    silence_db: float | None = None
    """Level in dBFS that the next two were found with, where they are known: the sound's first and last sample."""
    sound_start: int | None = None
    sound_stop: int | None = None
    span: tuple[float, float] = (0.0, 1.0)
    """Share of the recording that may be heard."""
    backgrounds: Mapping[str, "Background"] = dataclasses.field(default_factory=dict)
    """{corpus of noise: the recording beside this clip}."""


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
    backgrounds: Mapping[str, "Background"] = dataclasses.field(default_factory=dict)
    """{corpus of noise: the recording beside this clip}."""


@dataclasses.dataclass(frozen=True)
class Background:
    """A recording to cut noise from, at `rate` Hz, out of its part row.span."""

    row: Row
    rate: int

    def cut(self, samples: int, generator: np.random.Generator) -> np.ndarray:
        """Return (samples,) float32 from a random place; a part shorter than that is repeated.

        Raises:
            BadClipError: the recording cannot be read.
        """
        low, high = self.row.span
        with open_clip(self.row.audio) as file:
            start, stop = int(low * file.frames), max(1, int(high * file.frames))
            start = min(start, stop - 1)
            frames = min(stop - start, -(-samples * file.samplerate // self.rate))
            start += int(generator.integers(0, stop - start - frames + 1))
            return tile_to(read_stretch(file, start, frames, self.rate), samples)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ClipReader:
    """How rows become clips. `rate` in Hz, `silence_db` in dBFS, `peak`: scale each clip by its largest magnitude.

    `spans` is {corpus: int64 (rows,)}, zeros at first: where the sound of each listed row lies, once it was heard. In
    memory that is shared it serves a process and the loader workers that it forks.
    """

    rate: int = 16_000
    silence_db: float = -60.0
    peak: bool = True
    spans: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def open(self, row: Row) -> Iterator["OpenClip"]:
        """Open a row to cut several clips from it; raises BadClipError as audio/reading.py does."""
        with open_clip(row.audio) as file:
            yield OpenClip(self, row, file)

    def crop(self, row: Row, samples: int, generator: np.random.Generator) -> Clip:
        """As OpenClip.crop."""
        with self.open(row) as clip:
            return clip.crop(samples, generator)

    def windows(self, row: Row, samples: int) -> list[Clip]:
        """As OpenClip.windows."""
        with self.open(row) as clip:
            return clip.windows(samples)

    def absent(self, row: Row) -> Clip:
        """Return the empty clip that keeps a bad file's place."""
        return Clip(id=row.id, wave=np.zeros(0, np.float32), label=-1, split=row.split)


class OpenClip:
    """A row whose file is open."""

    def __init__(self, reader: ClipReader, row: Row, file: soundfile.SoundFile):
        self.reader, self.row, self.file = reader, row, file
        self.sound = self._sound()

    def crop(self, samples: int, generator: np.random.Generator) -> Clip:
        """Cut `samples` samples at a random place of the sounding part, or all of it if that is shorter."""
        file, rate, (start, stop) = self.file, self.reader.rate, self.sound
        frames = math.ceil(samples * file.samplerate / rate)
        if stop - start > frames:
            start += int(generator.integers(0, stop - start - frames + 1))
            stop = start + frames
        return self._clip(read_stretch(file, start, stop - start, rate)[:samples])

    def windows(self, samples: int) -> list[Clip]:
        """Cut the whole sounding part into windows side by side; the last may be shorter, and is kept if it is the
        only one or at least half a window long."""
        file, rate, (start, stop) = self.file, self.reader.rate, self.sound
        frames = math.ceil(samples * file.samplerate / rate)
        count = max(1, int((stop - start) / frames + 0.5))
        begins = [start + i * frames for i in range(count)]
        return [
            self._clip(read_stretch(file, b, min(frames, stop - b), rate)[:samples]) for b in begins
        ]

    def _sound(self) -> tuple[int, int]:
        """Return the sounding part as the row says, if it was found for the same `silence_db`, or as it is heard."""
        row, silence_db = self.row, self.reader.silence_db
        if row.silence_db == silence_db:
            return row.sound_start, row.sound_stop
        heard = self.reader.spans.get(row.corpus)
        if heard is None or row.number < 0:
            return sounding_span(self.file, silence_db)
        if not heard[row.number]:
            start, stop = sounding_span(self.file, silence_db)
            heard[row.number] = start << 32 | stop  # at once: others read while this is written
        return divmod(int(heard[row.number]), 1 << 32)

    def _clip(self, wave: np.ndarray) -> Clip:
        row, wave = self.row, peak_normalise(wave) if self.reader.peak else np.clip(wave, -1.0, 1.0)
        return Clip(
            id=row.id, wave=wave, label=row.label, split=row.split, backgrounds=row.backgrounds
        )
