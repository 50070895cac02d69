"""Runs compared clip by clip: scores of the predictions, intervals by bootstrap, and how many clips would show a difference.

Shapes: S seeds, C test clips. Tested by tests/test_report.py.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch

from mtl_dist.metrics import average_precision_at_3

RESAMPLES = 10_000
LEVEL, POWER = 0.95, 0.8
BATCH = 500
"""Resamples at a time: 500 of 1,600 clips take 6 MB."""


@dataclasses.dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float

    def decided(self) -> bool:
        """Return whether 0 lies outside."""
        return self.low > 0 or self.high < 0


def clip_scores(run: Path, task: str, metric: str, split: str = "test") -> dict[str, float]:
    """Return {clip id: score} of a run's predictions; the mean is the metric in results.json.

    `metric` is map@3 or accuracy, by windows, or with _single_crop.

    Raises:
        ValueError: there are no predictions, none of the task, or the metric is not one of a single clip.
    """
    path = run / "predictions" / f"{split}.parquet"
    if not path.is_file():
        raise ValueError(
            f"{path} is not there; write it with: mtl-dist evaluate {run} --split {split}"
        )
    table = pq.read_table(path, filters=[("task", "=", task)])
    name = metric.removesuffix("_single_crop")
    if name not in ("map@3", "accuracy"):
        raise ValueError(f"metric: {metric!r} is no score of a clip; use map@3 or accuracy")
    if not len(table):
        raise ValueError(f"{path} has no predictions of the task {task}")
    classes = json.loads(table.schema.metadata[b"classes"])[task]
    column = "probabilities" + metric.removeprefix(name)
    scores = torch.tensor(table[column].to_pylist())
    labels = torch.tensor([classes.index(label) for label in table["label"].to_pylist()])
    values = (
        average_precision_at_3(scores, labels)
        if name == "map@3"
        else (scores.argmax(dim=1) == labels).float()
    )
    return dict(zip(table["id"].to_pylist(), values.double().tolist(), strict=True))


def aligned(runs: Mapping[Path, Mapping[str, float]]) -> np.ndarray:
    """Return the scores of runs, (S, C), clip by clip. Raises ValueError if they were scored on other clips."""
    (first, wanted), *others = runs.items()
    for path, scores in others:
        differing = sorted(scores.keys() ^ wanted.keys())
        if differing:
            raise ValueError(
                f"{path} was scored on other clips than {first}: {len(differing)} differ, such as {differing[0]}; they are "
                "not compared"
            )
    clips = sorted(wanted)
    return np.array([[scores[clip] for clip in clips] for scores in runs.values()])


def interval(scores_SC: np.ndarray) -> Interval:
    """Return the mean with the percentile interval of a bootstrap over clips and, where there are several, over seeds.

    Clips and seeds are drawn anew independently, so that both kinds of chance count (Efron and Tibshirani 1993, chapter 13;
    scipy.stats.bootstrap). Differences of two runs go in as one array, which pairs them.
    """
    from scipy import stats  # takes a second, which every other command would wait for

    seeds, clips = scores_SC.shape
    if clips < 2:
        raise ValueError(f"{clips} clips are too few for an interval")

    def mean_of_clips(chosen: np.ndarray, axis: int) -> np.ndarray:
        return scores_SC[0][chosen].mean(axis=axis)

    def mean_of_both(clips_: np.ndarray, seeds_: np.ndarray, axis: int) -> np.ndarray:
        counts = (seeds_[..., None] == np.arange(seeds)).sum(axis=-2)
        of_clips = counts @ scores_SC / seeds
        return np.take_along_axis(of_clips, clips_, axis=-1).mean(axis=axis)

    data = (np.arange(clips),) if seeds == 1 else (np.arange(clips), np.arange(seeds))
    found = stats.bootstrap(
        data,
        mean_of_clips if seeds == 1 else mean_of_both,
        n_resamples=RESAMPLES,
        batch=BATCH,
        vectorized=True,
        method="percentile",
        confidence_level=LEVEL,
        random_state=np.random.default_rng(0),
    ).confidence_interval
    return Interval(float(scores_SC.mean()), float(found.low), float(found.high))


def clips_needed(differences_SC: np.ndarray, wanted: float) -> int:
    """Return how many test clips would show a difference of `wanted` with 80 % power at a two-sided level of 5 %.

    By the deviation of the clips' differences, averaged over seeds as they were here: n = ((z(0.975) + z(0.8)) sd /
    wanted)^2, the normal approximation of the paired test (Cohen 1988, chapter 2).
    """
    from scipy import stats

    deviation = differences_SC.mean(axis=0).std(ddof=1)
    both = stats.norm.ppf((1 + LEVEL) / 2) + stats.norm.ppf(POWER)
    return int(np.ceil((both * deviation / wanted) ** 2))


def paired(
    ours: Mapping[int, Path], base: Mapping[int, Path], task: str, metric: str
) -> tuple[Sequence[int], np.ndarray] | None:
    """Return (seeds that both have, differences (S, C) of their scores), or None where there are none.

    Raises:
        ValueError: they were scored on other clips, or have no predictions.
    """
    seeds = sorted(ours.keys() & base.keys())
    if not seeds:
        return None
    paths = [ours[seed] for seed in seeds] + [base[seed] for seed in seeds]
    scores = aligned({path: clip_scores(path, task, metric) for path in paths})
    return seeds, scores[: len(seeds)] - scores[len(seeds) :]
