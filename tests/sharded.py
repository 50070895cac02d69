"""Tiny corpora in shards, and what a rank hears of them, for tests of streams."""

import hashlib
import itertools
from pathlib import Path

from mtl_dist import cli
from mtl_dist.corpora.base import SPLITS

LAYOUTS = {"fsdkaggle2018": "FSDKaggle2018", "librispeech": "LibriSpeech", "chime3": "CHiME3"}


def prepare(corpora: Path, out: Path) -> Path:
    """Prepare all three corpora below `out`, with uneven shards and blocks."""
    for kind, folder in LAYOUTS.items():
        small = ["--rows_per_group", "3", "--shard_mb", "0.02", "--workers", "1"]
        cli.main(["prepare", kind, str(corpora / folder), str(out / folder), *small])
    return out


def heard(experiment, world, rounds: int, workers: int, first: int = 0) -> list[dict]:
    """Return for each round {task: [(clip, digest of inputs, targets and length)]} of a rank, in order of places."""
    batch = experiment.config.train.global_batch
    positions = dict.fromkeys(experiment.tasks, first * batch)
    stream = experiment.rounds(world, 1, first, positions).rounds(workers, pin_memory=False)
    told = []
    for round_ in itertools.islice(stream, rounds):
        assert round_.bad == []
        told.append({})
        for task, (micro,) in round_.micro_batches.items():
            told[-1][task] = [
                [clip, hashlib.blake2b(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()]
                for clip, *tensors in zip(micro.ids, *micro.batch, strict=True)
            ]
    stream.close()
    return told


def joined(ranks: list[list[dict]]) -> list[dict]:
    """Put the shares of all ranks together, round by round."""
    return [
        {task: [clip for share in shares for clip in share[task]] for task in shares[0]}
        for shares in zip(*ranks, strict=True)
    ]


def splits_of(corpus) -> dict[str, list]:
    return {
        s: sorted(zip(corpus.splits[s]["id"], corpus.splits[s]["label"], strict=True))
        for s in SPLITS
    }
