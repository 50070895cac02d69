"""What a rank hears in its rounds, as digests, and corpora of all kinds of blocks to hear, for tests of the order."""

import hashlib
import itertools
from pathlib import Path

import kinds
import tiny

from mtl_dist.audio.clips import Background, Row
from mtl_dist.data.batches import MicroBatch, prepare, read_crops


def heard(stream, number: int, workers: int = 0) -> list[dict]:
    """Return of each of the next rounds {task: [[clip, digest of its tensors]]} and the positions after it, of one rank."""
    told, rounds = [], stream.rounds(workers, pin_memory=False)
    for round_ in itertools.islice(rounds, number):
        assert (round_.bad, round_.failure) == ([], None)
        clips = {
            task: [
                [clip, hashlib.blake2b(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()]
                for micro in every
                for clip, *tensors in zip(micro.ids, *micro.batch, strict=True)
            ]
            for task, every in round_.micro_batches.items()
        }
        positions = {
            s: {str(n): list(p) for n, p in own.items()} for s, own in round_.positions.items()
        }
        told.append({"clips": clips, "positions": positions})
    rounds.close()
    return told


def joined(ranks: list[list[dict]]) -> list[dict]:
    """Put the shares of all ranks together, round by round."""
    rounds = []
    for shares in zip(*ranks, strict=True):
        clips = {
            t: [clip for share in shares for clip in share["clips"][t]] for t in shares[0]["clips"]
        }
        positions: dict[str, dict] = {}
        for share in shares:
            for name, own in share["positions"].items():
                positions.setdefault(name, {}).update(own)
        rounds.append({"clips": clips, "positions": positions})
    return rounds


def numbered(positions: dict[str, dict[str, list]]) -> dict[str, dict[int, tuple]]:
    """Return positions as a stream takes them, of those that JSON has kept."""
    return {s: {int(n): tuple(p) for n, p in own.items()} for s, own in positions.items()}


def ids(rounds: list[dict], task: str) -> list[list[str]]:
    """Return the clips of each round."""
    return [[clip for clip, _ in round_["clips"][task]] for round_ in rounds]


def training_rows(experiment, task: str, epochs: int = 1) -> list[tuple[int, Row]]:
    """Return (epoch, row) of all that a task hears in its first epochs, lane after lane, with the noise beside."""
    (stream,) = (s for s in experiment.streams() if task in s.tasks)
    seed, found = experiment.config.run.seed, []
    for number in range(stream.lanes):
        beside, lane = stream.noise_lanes(number, seed, {}), stream.lane(number, seed, {})
        for epoch, row in itertools.takewhile(lambda pair: pair[0] < epochs, lane):
            recordings = {corpus: next(own)[1] for corpus, own in beside.items()}
            row.backgrounds = {
                c: Background(r, experiment.reader.rate) for c, r in recordings.items()
            }
            found.append((epoch, row))
    return found


def batch_of(
    experiment, task: str, rows: list[tuple[int, Row]], seed: int = 0, bad: int | None = 0
) -> MicroBatch:
    """Return a batch of (epoch, row) pairs, of which `bad` cannot be used; None for any number."""
    own, messages = experiment.tasks[task], []
    crops = [
        (epoch, read_crops(row, epoch, [own], experiment.reader, seed, messages)[task])
        for epoch, row in rows
    ]
    batch = prepare(own, crops, seed, messages)
    assert bad is None or len(messages) == bad
    return batch


def mixed(corpora: Path, folder: Path) -> list[str]:
    """Write corpora of every kind of blocks, and return the words that hear them, 12 clips a step.

    Tagging: listed rows of a folder, and Parquet whose row groups hold clips of several splits. The others, too: Parquet and
    tars without labels. Noise: Parquet of which some recordings are left out. No two files have as many rows.
    """
    labelled = kinds.clips(23, labels=tiny.CLASSES)
    kinds.parquet(folder / "tagged" / "train-0.parquet", labelled[:11], group=3)
    kinds.parquet(folder / "tagged" / "train-1.parquet", labelled[11:], group=5)
    plain = [row | {"label": None} for row in kinds.clips(47, first=100)]
    kinds.parquet(folder / "plain-0.parquet", plain[:17], group=4)
    kinds.parquet(folder / "plain-1.parquet", plain[17:24], group=7)
    kinds.tars(folder / "tars", plain[24:], size=5)
    places = ("BUS", "CAF", "PED", "STR")
    noise = [
        row | {"id": f"BGD_{n:06d}_010_{places[n % 4]}", "label": None}
        for n, row in enumerate(kinds.clips(14, first=200))
    ]
    kinds.parquet(folder / "noise.parquet", noise, group=3)
    fsd = f"[{{path: {corpora / 'FSDKaggle2018'}}}, {{path: '{folder}/tagged/*.parquet'}}]"
    speech = f"[{{path: '{folder}/plain-*.parquet'}}, {{path: '{folder}/tars/*.tar'}}]"
    augment = "--tasks.audio_tagging.augment"
    return [
        *("--config", str(tiny.REPOSITORY / "tests" / "tiny.yaml"), "--train.global_batch", "12"),
        *("--corpora.fsdkaggle2018.sources", fsd, "--corpora.librispeech.sources", speech),
        *("--corpora.chime3.sources", f"[{{path: {folder}/noise.parquet}}]"),
        *("--corpora.chime3.environments", "[BUS,PED]"),
        *(f"{augment}.noise_snr_db", "[0,10]", f"{augment}.noise", "chime3"),
        *(f"{augment}.gain_db", "[-12,0]", f"{augment}.shift_seconds", "[-0.02,0.02]"),
    ]
