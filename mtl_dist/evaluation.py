"""Evaluation: every clip exactly once, each rank its own slice, sums and counts added up at the end."""

import dataclasses
import logging
from collections.abc import Iterable, Iterator

import torch
from accelerate import Accelerator

from mtl_dist.audio.clips import Row
from mtl_dist.audio.reading import BadClipError
from mtl_dist.data.batches import keyed_generators
from mtl_dist.data.faults import DataError
from mtl_dist.data.lanes import Lane
from mtl_dist.data.noise import Beside, read_bounded
from mtl_dist.experiment import Experiment
from mtl_dist.metrics import Sums
from mtl_dist.phases import Phases
from mtl_dist.round import fail_together
from mtl_dist.runtime import World, collect, world_of
from mtl_dist.tasks.base import Task, TaskBatch

log = logging.getLogger("mtl_dist")
LEAST_CLIPS_JUDGED = 200
"""The share of bad clips is judged as of so many clips at least: one bad file among the first ten is no verdict."""


@dataclasses.dataclass(kw_only=True)
class Evaluation:
    """Means over all clips of all ranks: {task: {metric: tensor}}, how many clips each, and what was skipped.

    `predictions` is {task with classes: {"id"} and Task.predict of each clip, by id}.
    """

    metrics: dict[str, dict[str, torch.Tensor]]
    clips: dict[str, int]
    bad: list[str]
    predictions: dict[str, list[dict]] = dataclasses.field(default_factory=dict)

    def too_many_bad(self, share: float) -> str | None:
        """Return what is wrong if more than `share` of the clips could not be used."""
        return too_many_bad(
            self.bad, len(self.bad), len(self.bad) + sum(self.clips.values()), share
        )

    def numbers(self) -> dict[str, dict[str, float]]:
        """Return the scalar metrics, as results.json and TensorBoard have them."""
        return {
            task: {name: float(value) for name, value in metrics.items() if value.ndim == 0}
            | {"clips": self.clips[task]}
            for task, metrics in self.metrics.items()
        }

    def confusion(self, task: str) -> torch.Tensor:
        """Return how often each class (row) was taken for each class (column): (K, K)."""
        return (self.metrics[task]["confusion"] * self.clips[task]).round()


def too_many_bad(names: list[str], bad: int, clips: int, share: float) -> str | None:
    """Return a message if `bad` of `clips` is more than data.max_bad_share; `names` says "file: reason"."""
    if bad <= share * max(clips, LEAST_CLIPS_JUDGED):
        return None
    return (
        f"{bad} of {clips} clips could not be used, more than data.max_bad_share {share}; the last: "
        f"{names[-1] if names else 'see metrics.jsonl'}. Mend the corpus or allow more"
    )


def evaluation_rows(
    experiment: Experiment, task: str, split: str, limit: int | None, world: World
) -> Iterator[Row]:
    """Yield a rank's rows of a split, always the same for all ranks together: all, or `limit` of them, if there are any.

    Blocks come in an order by data.split_seed, and beside each a lane of noise. Without a limit a rank reads its own blocks;
    with one, all ranks read those of the first `limit` rows, and each takes its own of them.
    """
    source = experiment.tasks[task].config.sources[0]
    if not experiment.corpora[source].parts[split]:
        return
    blocks, noise = experiment.evaluation_blocks(task, split)
    seed, rate = experiment.config.data.split_seed, experiment.reader.rate
    bound = experiment.rank, experiment.config.patience()
    order, found = blocks.order(seed, "evaluation").tolist(), 0
    for place, block in enumerate(order):
        if limit is None and place % world.size != world.rank:
            continue
        beside = {
            corpus: Lane(recordings, len(blocks), place, (seed, "evaluation", corpus))
            for corpus, recordings in noise.items()
        }
        for _, row in blocks.rows(block, (seed, "evaluation")):
            recordings = {corpus: next(lane)[1] for corpus, lane in beside.items()}
            if limit is None or found % world.size == world.rank:
                row.backgrounds = {c: Beside(r, rate, bound) for c, r in recordings.items()}
                yield row
            found += 1
            if found == limit:
                return


def evaluation_batches(
    experiment: Experiment, task: Task, rows: Iterable[Row], bad: list[str], crops: int = 1
) -> Iterator[tuple[str, list[TaskBatch]]]:
    """Yield each readable row's id and batches, with draws that never change; note the others in `bad`.

    One batch, or `crops` of them where the task is scored by crops: each a crop with draws of its own.
    """
    seed = experiment.config.data.split_seed
    draws = [f"evaluation {n}" if n else "evaluation" for n in range(crops)]
    keyed = [keyed_generators(seed, task.name, d) for d in draws[: crops if task.by_crops else 1]]
    bound = experiment.rank, experiment.config.patience()
    for row in rows:
        try:
            windows = read_bounded(
                lambda row=row: [task.evaluation_clips(row, experiment.reader, k) for k in keyed],
                row,
                *bound,
            )
            batches = [task.prepare(own, key) for own, key in zip(windows, keyed, strict=True)]
        except BadClipError as error:
            bad.append(str(error))
        else:
            yield row.id, batches


def forward(
    accelerator: Accelerator, model, name: str, batch: TaskBatch, clips: int
) -> torch.Tensor:
    """Return a task's outputs for a batch, so many clips at a time; whole ones, which differ in length, one by one."""
    task, parts = model.tasks[name], []
    batch, size = batch.to(accelerator.device), 1 if task.whole else clips
    for first in range(0, len(batch.inputs), size):
        part = task.trimmed(TaskBatch(*(tensor[first : first + size] for tensor in batch)))
        with accelerator.autocast():
            parts.append(model.outputs({name: part})[0][name])
    return torch.cat(parts)


@torch.no_grad()
def evaluate(
    accelerator: Accelerator,
    model: torch.nn.Module,
    experiment: Experiment,
    split: str,
    phases: Phases | None = None,
) -> Evaluation:
    """Evaluate an unwrapped model on every task's clips of a split; all ranks call it and get the same result.

    Raises:
        DataError: on all ranks, where one of them cannot read a shard.
    """
    phases = phases or Phases()
    limit = experiment.config.evaluation.max_clips
    model.eval()
    result = Evaluation(metrics={}, clips={}, bad=[])
    for name, task in experiment.tasks.items():
        phases.enter(split)
        sums, bad, predicted, done, failure = Sums(), [], [], 0, None
        crops = experiment.config.evaluation.crops
        try:
            rows = evaluation_rows(experiment, name, split, limit, world_of(accelerator))
            for clip, batches in evaluation_batches(experiment, task, rows, bad, crops):
                for batch in batches:
                    outputs = forward(accelerator, model, name, batch, experiment.clips_per_forward)
                    sums.add(task.metrics(outputs, batch.to(accelerator.device)))
                if found := task.predict(outputs, batch):
                    predicted.append({"id": clip} | found)
                done += 1
        except DataError as error:
            failure = str(error)
        phases.enter("collective")
        fail_together(accelerator, failure)
        parts = collect(accelerator, [(sums.sums, done, bad, predicted)])
        total = Sums()
        for part, clips, bad_there, predicted_there in parts:
            result.predictions.setdefault(name, []).extend(predicted_there)
            total.add(part)
            result.clips[name] = result.clips.get(name, 0) + clips
            result.bad += bad_there
        result.metrics[name] = total.means()
        result.predictions[name].sort(key=lambda row: row["id"])
    model.train()
    for problem in result.bad if accelerator.is_main_process else []:
        log.warning("evaluation skips a bad file: %s", problem)
    return result


@torch.no_grad()
def examples(accelerator: Accelerator, model, experiment: Experiment, split: str, number: int):
    """Yield (task, place, {what it is: wave (T,)}) of the first `number` fixed clips of every task that shows some."""
    model.eval()
    try:
        for name, task in experiment.tasks.items():
            if not number:
                continue
            rows = evaluation_rows(experiment, name, split, number, World())
            for place, (_, (batch,)) in enumerate(evaluation_batches(experiment, task, rows, [])):
                outputs = forward(accelerator, model, name, batch, experiment.clips_per_forward)
                waves = task.showcase(outputs, batch.to(accelerator.device))
                if waves:
                    yield name, place, {what: wave.float().cpu() for what, wave in waves.items()}
    finally:
        model.train()
