"""So many hours of a corpus: whole blocks, in an order by seed. Tested by tests/test_sources.py."""

import io
import logging
import time

import numpy as np
import soundfile

from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Part

log = logging.getLogger("mtl_dist")
SAY_EVERY_SECONDS = 10.0


def take_hours(corpus: Corpus, hours: float, seed: int) -> None:
    """Keep of the training parts the blocks, in an order by seed, whose audio adds up to `hours`.

    Durations are those of the column seconds, else of the audio's headers; unreadable clips count for nothing.

    Raises:
        ValueError: there are fewer hours.
    """
    parts, said = corpus.parts["train"], time.monotonic()
    places = [(n, block) for n, part in enumerate(parts) for block in range(len(part.blocks))]
    order = generator(seed, corpus.name, "hours").permutation(len(places))
    seconds, taken = 0.0, [[] for _ in parts]
    clips = [0 for _ in parts]
    for place in order.tolist():
        if seconds >= hours * 3600:
            break
        number, block = places[place]
        part = parts[number]
        length, count = _length(part, *part.blocks[block].tolist())
        seconds, clips[number] = seconds + length, clips[number] + count
        taken[number].append(block)
        if time.monotonic() - said > SAY_EVERY_SECONDS:
            log.info("corpora.%s.hours: %.2f of %g h found", corpus.name, seconds / 3600, hours)
            said = time.monotonic()
    if seconds < hours * 3600:
        raise ValueError(
            f"corpora.{corpus.name}.hours: {hours:g} h asked for, but the training clips have {seconds / 3600:.2f} h; "
            "add a split, or set null to take all"
        )
    for part, own, count in zip(parts, taken, clips, strict=True):
        part.blocks, part.clips, part.exact = part.blocks[np.sort(own).astype(int)], count, True
    corpus.parts["train"] = [part for part in parts if len(part.blocks)]
    corpus.notes.append(f"{seconds / 3600:.2f} h of training audio taken, by data.split_seed")


def _length(part: Part, file: int, block: int) -> tuple[float, int]:
    """Return (seconds, clips) of a block."""
    total, count = 0.0, 0
    for table in part.files.read_lengths(file, block):
        for seconds, audio in zip(
            table["seconds"].to_pylist(), table["audio"].to_pylist(), strict=True
        ):
            count += 1
            total += _duration(audio) if seconds is None else seconds
    return total, count


def _duration(audio: dict) -> float:
    try:
        data = audio["bytes"]
        return soundfile.info(audio["path"] if data is None else io.BytesIO(data)).duration
    except (soundfile.LibsndfileError, TypeError):
        return 0.0
