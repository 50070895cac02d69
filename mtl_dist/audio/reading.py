"""Read audio as stretches: mono float32 at the wanted rate, never more of a file than is needed.

A file is a mapping {"path": str | None, "bytes": bytes | None}, as Hugging Face `datasets` stores audio: bytes, or a path
or URL. libsndfile reads them all. Positions in a file are frames at the file's own rate; what is returned is at the wanted
rate. Tested by tests/test_audio.py.
"""

import contextlib
import io
import math
import re
from collections.abc import Iterator
from pathlib import Path

import fsspec
import numpy as np
import soundfile
import soxr

EDGE_BLOCK_SECONDS = 1.0
"""Frames of loudness are counted from the start of every such block of a file."""

FRAME_SECONDS = 0.02
"""Loudness is judged over frames of 20 ms, the usual frame of speech analysis."""

EDGE_FRAMES = 10
"""How many of these frames are read at a time while looking for the first and the last sound of a file."""

MARGIN_SECONDS = 0.02
"""Context read on both sides of a stretch, so that resampling it equals resampling the whole file."""

CUT_SHORT = re.compile(r"^data : (\d+) \(should be (\d+)\)", re.MULTILINE)
"""libsndfile's note on a WAV file whose header announces another number of bytes than there are."""

PCM_16_STEP = np.float32(1 / 32768)
"""libsndfile's, too."""

HEADER_BYTES = 44
"""Many recorders count the header as sound: so much too large a size says nothing."""

FAR_BLOCK_BYTES = 1 << 17
"""What a file at a URL is asked for at a time: a header, or 2 s of 16-bit sound at 16 kHz twice."""

UNKNOWN_LENGTH_BYTES = 0x7FFF_0000
"""Programs that write WAV to a pipe announce about 2 or 4 GiB; so large a number says nothing."""


class BadClipError(ValueError):
    """A file that cannot be used; the message names the file and says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(f"{name}: {reason}")
        self.name, self.reason = name, reason


class BadFramesError(ValueError):
    """Frames that cannot be used, before it is known what to call their file."""


class StretchFile(soundfile.SoundFile):
    """A file whose stretches are sought before they are read, and only then.

    soundfile also seeks to where it already is after every read of a file that can seek: in FLAC that decodes a frame anew,
    which is a good part of the time of a short stretch.
    """

    def seekable(self) -> bool:
        """Say no, so that a read is a read."""
        return False


class FarFileError(RuntimeError):
    """A file at a URL cannot be read."""


class FarFile:
    """A file at a URL as libsndfile takes it: no exception passes through its calls, so the first is kept, and it ends."""

    def __init__(self, url: str):
        self.url, self.error = url, None
        try:
            system, path = fsspec.url_to_fs(url)
            self.file = system.open(path, "rb", block_size=FAR_BLOCK_BYTES)
        except Exception as error:  # whatever a transport raises
            raise FarFileError(f"{url}: {type(error).__name__}: {error}") from error
        self.seek, self.tell = self.file.seek, self.file.tell

    def read(self, count: int) -> bytes:
        """Read up to `count` bytes; none once there was an error."""
        try:
            return b"" if self.error else self.file.read(count)
        except Exception as error:
            self.error = error
            return b""

    def end(self) -> None:
        """Close it. Raises FarFileError with the first error."""
        self.file.close()
        if self.error is not None:
            what = f"{self.url}: {type(self.error).__name__}: {self.error}"
            raise FarFileError(what) from self.error


def clip_name(audio: dict) -> str:
    """Return what to call a file in messages."""
    return audio.get("path") or "<bytes without a name>"


def stored_bytes(audio: dict) -> int:
    """Return the size of a clip as it is stored; 0 where it is not there, or lies at a URL."""
    if audio.get("bytes") is not None:
        return len(audio["bytes"])
    path = Path(audio.get("path") or "")
    return path.stat().st_size if path.is_file() else 0


@contextlib.contextmanager
def open_clip(audio: dict):
    """Open {"path", "bytes"} as a soundfile.SoundFile with at least one frame; a path may be a URL.

    Raises:
        BadClipError: missing, empty, not audio, or broken while it is read inside the `with`.
        FarFileError: a file at a URL cannot be read; nothing is said of the audio then.
    """
    name, far = clip_name(audio), None
    if audio.get("bytes") is None and "://" in (audio.get("path") or ""):
        far = FarFile(audio["path"])
    try:
        with _opened(audio, far, name) as file:
            if file.samplerate < 1 or file.channels < 1:
                raise BadClipError(name, f"has a sample rate of {file.samplerate} Hz")
            if file.frames < 1:
                raise BadClipError(name, "holds no samples (zero length)")
            _refuse_cut_short(file, name)
            yield file
    except BadFramesError as error:
        raise BadClipError(name, str(error)) from error
    except (soundfile.LibsndfileError, OSError) as error:
        raise BadClipError(name, f"cannot be read as audio ({error})") from error
    finally:
        if far is not None:
            far.end()


def _opened(audio: dict, far: FarFile | None, name: str) -> soundfile.SoundFile:
    data, path = audio.get("bytes"), audio.get("path")
    if data is None and path is None:
        raise BadClipError(name, "has neither a path nor bytes")
    if data is not None and not data:
        raise BadClipError(name, "holds no bytes")
    try:
        return StretchFile(far or (path if data is None else io.BytesIO(data)))
    except TypeError as error:  # *.raw, of which nothing says the format
        raise BadClipError(name, f"cannot be read as audio ({error})") from error


def _refuse_cut_short(file: soundfile.SoundFile, name: str) -> None:
    """Raise BadClipError for a WAV file that lost more than 1% of its end; libsndfile reads the rest silently."""
    note = CUT_SHORT.search(file.extra_info)
    if note:
        announced, found = int(note[1]), int(note[2])
        short = min(announced - found - HEADER_BYTES, 0.99 * announced - found)
        if announced < UNKNOWN_LENGTH_BYTES and short > 0:
            raise BadClipError(name, f"is truncated: {found} of {announced} bytes are there")


def read_frames(file: soundfile.SoundFile, start: int, frames: int) -> np.ndarray:
    """Read `frames` frames from `start`, downmixed: float32 (frames,).

    Raises:
        BadFramesError: they are not there, or not finite; open_clip turns it into a BadClipError with the file's name.
    """
    if file.tell() != start:
        file.seek(start)
    if file.subtype == "PCM_16" and file.format != "FLAC":  # twice as fast, and the same
        samples = file.read(frames, dtype="int16", always_2d=True) * PCM_16_STEP
    else:
        samples = file.read(frames, dtype="float32", always_2d=True)
    if len(samples) < frames:
        raise BadFramesError(
            f"is truncated: {start + len(samples)} of {file.frames} samples could be read"
        )
    if not math.isfinite(samples.sum()) and not np.isfinite(samples).all():
        raise BadFramesError(f"has NaN or Inf among samples {start} to {start + frames}")
    return samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1)


def read_stretch(file: soundfile.SoundFile, start: int, frames: int, rate: int) -> np.ndarray:
    """Read a stretch at `rate` Hz: float32 (round(frames * rate / file rate), at least 1).

    Equal to resampling the whole file and cutting, as far as the resampler's finite context goes: MARGIN_SECONDS are
    read on both sides, in whole periods of the two rates so that the sampling phase is kept.
    """
    if file.samplerate == rate:
        return read_frames(file, start, frames)
    period = file.samplerate // math.gcd(file.samplerate, rate)
    periods = math.ceil(MARGIN_SECONDS * file.samplerate / period)
    lead = min(periods, start // period) * period
    tail = min(periods * period, file.frames - start - frames)
    wave = read_frames(file, start - lead, lead + frames + tail)
    wave = soxr.resample(wave, file.samplerate, rate, quality="HQ")
    first = lead * rate // file.samplerate
    return fix_length(wave[first:], max(1, round(frames * rate / file.samplerate)))


def fix_length(wave: np.ndarray, samples: int) -> np.ndarray:
    """Cut or zero-pad (T,) to exactly (samples,): resampling may be off by one to three samples."""
    wave = wave[:samples]
    return wave if len(wave) == samples else np.pad(wave, (0, samples - len(wave)))


def sounding_span(file: soundfile.SoundFile, silence_db: float) -> tuple[int, int]:
    """Find the part between leading and trailing silence: (start, stop) in frames of the file.

    A frame of 20 ms is silent below `silence_db` dBFS (root mean square). Only the file's ends are read. A file that is
    silent throughout is returned whole: trimming must not empty a clip.
    """
    hop = max(1, round(FRAME_SECONDS * file.samplerate))
    for begin, length in _pieces(file, hop, 1):
        loud = _loud_frames(file, begin, length, hop, silence_db)
        if len(loud):
            start = begin + int(loud[0]) * hop
            break
    else:
        return 0, file.frames
    for begin, length in _pieces(file, hop, -1):
        loud = _loud_frames(file, begin, length, hop, silence_db)
        if len(loud):
            return start, min(begin + length, begin + (int(loud[-1]) + 1) * hop)
    raise AssertionError("a file with a first loud frame has a last one")


def _pieces(file: soundfile.SoundFile, hop: int, step: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, length) of pieces of whole frames of `hop` samples, from the start (step 1) or from the end (-1)."""
    block = max(1, round(EDGE_BLOCK_SECONDS * file.samplerate))
    for first in range(0, file.frames, block)[::step]:
        stop = min(first + block, file.frames)
        for begin in range(first, stop, EDGE_FRAMES * hop)[::step]:
            yield begin, min(EDGE_FRAMES * hop, stop - begin)


def _loud_frames(file, begin: int, length: int, hop: int, silence_db: float) -> np.ndarray:
    """Indices of the frames of `hop` samples in [begin, begin + length) that are not silent."""
    wave = read_frames(file, begin, length)
    frames = np.zeros((-(-length // hop), hop))
    frames.reshape(-1)[:length] = wave
    used = np.full(len(frames), hop)
    used[-1] = length - (len(frames) - 1) * hop
    power = (frames**2).sum(axis=1) / used
    return np.flatnonzero(power > 10.0 ** (silence_db / 10.0))
