"""From files to 16 kHz FLAC or WAV, in several processes; the results come back in the order of what was asked for."""

import collections
import dataclasses
import io
import itertools
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures import wait as wait_for
from multiprocessing.connection import wait

import numpy as np
import soundfile

from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import BadClipError, open_clip, read_stretch, sounding_span
from mtl_dist.corpora.base import SOUND
from mtl_dist.preparing.pieces import RATE, Piece

STRETCH_SECONDS = 60
"""A file is read, resampled and encoded in stretches of about so much: the memory that a long one takes."""

CHUNK_ROWS, CHUNK_SECONDS = 8, 120
"""How much a process is handed at a time: so many pieces, or what makes up so many seconds."""

LOOK_SECONDS = 1.0
"""How often it is seen to that all processes live."""

AHEAD = 4
"""Chunks per process that are handed out before the first of them is back."""

FULL_SCALE = 32_768


@dataclasses.dataclass(frozen=True, slots=True)
class Encoded:
    """A piece as a row of a shard, or the reason why it cannot be one."""

    row: dict | None
    clipped: int = 0
    """Samples that were beyond full scale after downmixing and resampling."""
    name: str = ""
    reason: str = ""


def measure(paths: list[str]) -> list[tuple[int, int, int] | str]:
    """Return (frames, rate, bytes) of every file by its header, or why it cannot be used."""
    found = []
    for path in paths:
        try:
            with open_clip({"path": path, "bytes": None}) as file:
                found.append((file.frames, file.samplerate, os.path.getsize(path)))
        except BadClipError as error:
            found.append(error.reason)
    return found


def encode(piece: Piece) -> tuple[bytes, int, int]:
    """Return (a FLAC or WAV file of 16 kHz, mono, 16 bit; its samples; how many of them were clipped).

    Raises:
        BadClipError: missing, truncated, NaN or Inf, or otherwise not to be read.
    """
    samples = clipped = 0
    buffer = io.BytesIO()
    with (
        open_clip({"path": piece.path, "bytes": None}) as file,
        soundfile.SoundFile(buffer, "w", RATE, 1, "PCM_16", format=piece.encoding) as out,
    ):
        for start, frames in _stretches(piece):
            wave = read_stretch(file, start, frames, RATE)
            clipped += int((np.abs(wave) > 1).sum())
            samples += len(wave)
            whole = np.rint(wave * FULL_SCALE)
            out.write(whole.clip(-FULL_SCALE, FULL_SCALE - 1).astype(np.int16))
    return buffer.getvalue(), samples, clipped


def sound(audio: dict) -> dict:
    """Return the columns that say where the sound begins and ends, as training would hear it."""
    with open_clip(audio) as file:
        start, stop = sounding_span(file, ClipReader.silence_db)
    return dict(zip(SOUND, (ClipReader.silence_db, start, stop), strict=True))


def _stretches(piece: Piece) -> Iterator[tuple[int, int]]:
    """Yield (start, frames) of whole seconds, so that every stretch begins on a sample of both rates."""
    frames = STRETCH_SECONDS * piece.rate
    count = max(1, int(piece.frames / frames + 0.5))
    for n in range(count):
        yield piece.start + n * frames, frames if n + 1 < count else piece.frames - n * frames


def encode_chunk(pieces: list[Piece]) -> list[Encoded]:
    """Encode some pieces; a bad one gives a reason in its place."""
    done = []
    for piece in pieces:
        try:
            data, samples, clipped = encode(piece)
        except BadClipError as error:
            done.append(Encoded(row=None, name=piece.name, reason=error.reason))
            continue
        audio = {"bytes": data, "path": f"{piece.id}.{piece.encoding}"}
        row = {
            "id": piece.id,
            "audio": audio,
            "label": piece.label,
            "speaker": piece.speaker,
            "split": piece.split,
            "seconds": samples / RATE,
            **sound(audio),
        }
        done.append(Encoded(row=row, clipped=clipped))
    return done


def chunks(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Cut a list of pieces into what processes are handed at a time."""
    chunk: list[Piece] = []
    for piece in pieces:
        chunk.append(piece)
        if len(chunk) == CHUNK_ROWS or sum(p.seconds for p in chunk) >= CHUNK_SECONDS:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


class Workers:
    """Processes that do the work; they end with this one, however it ends."""

    def __init__(self, count: int):
        self.count = count
        context = multiprocessing.get_context("fork")
        self.pool = ProcessPoolExecutor(count, context, initializer=_end_with_parent)
        others = multiprocessing.active_children()
        self.pool.submit(os.getpid).result()  # all of them fork here, before there are threads
        self.processes = [p for p in multiprocessing.active_children() if p not in others]
        self.pool._result_queue._writer.close()  # or half a result of the last one that died would be waited for

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown(cancel_futures=True)

    def in_order(self, function: Callable, tasks: Iterable) -> Iterator:
        """Yield function(task) in the tasks' order, a bounded number of them ahead of what has been taken.

        Raises:
            concurrent.futures.process.BrokenProcessPool: a process died.
        """
        tasks, waiting = iter(tasks), collections.deque()
        for task in itertools.islice(tasks, AHEAD * self.count):
            waiting.append(self.pool.submit(function, task))
        while waiting:
            result = self._result(waiting.popleft())
            for task in itertools.islice(tasks, 1):
                waiting.append(self.pool.submit(function, task))
            yield result

    def _result(self, future: Future):
        """Wait for a result. A process that is killed while it sends one would leave the pool waiting for the rest of it."""
        while not wait_for([future], LOOK_SECONDS).done:
            if not all(process.is_alive() for process in self.processes):
                for process in self.processes:
                    process.kill()  # and now the pool sees its pipe end
        return future.result()


def _end_with_parent() -> None:
    """Of a process: leave Ctrl-C to the parent, and do not outlive it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process().sentinel

    def watch() -> None:
        wait([parent])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
