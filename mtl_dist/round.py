"""One optimizer step: a round of micro-batches of every task, on every rank.

The gradient is that of sum_i weight_i S_i / N_i, where S_i is the sum of task i's losses and N_i its number of terms, both
over all ranks and micro-batches: the same for any split of the same clips and for both schedules.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping
from functools import partial

import torch
from accelerate import Accelerator

from mtl_dist.data.batches import MicroBatch, Read, Round
from mtl_dist.data.faults import DataError
from mtl_dist.engines import Engine
from mtl_dist.phases import Phases
from mtl_dist.runtime import collect, sum_over_ranks
from mtl_dist.tasks.base import Task, TaskBatch


@dataclasses.dataclass(kw_only=True)
class RoundReport:
    """What happened in a round, over all ranks. `losses` are means per term; `total` is their weighted sum.

    `read` says what was heard of each corpus, `waited` for how many seconds the rank that waited longest had no data,
    `ahead` how many rounds the rank that had fewest had ready: a round waits for them.
    """

    losses: dict[str, float]
    counts: dict[str, float]
    total: float
    grad_norm: float
    clips: float
    audio_seconds: float
    bad: list[str]
    stop: bool
    read: dict[str, Read] = dataclasses.field(default_factory=dict)
    waited: float = 0.0
    ahead: float = 0.0
    nonfinite: list[str] = dataclasses.field(default_factory=list)
    """"task: clip, clip" for every task whose loss is not finite, or the gradient that is not."""


def fail_together(accelerator: Accelerator, failure: str | None) -> None:
    """Raise DataError on all ranks where any has a failure, with the first of them; every rank calls it."""
    failures = collect(accelerator, [failure] if failure else [])
    if failures:
        others = f" (and {len(failures) - 1} other ranks have failed, too)" * (len(failures) > 1)
        raise DataError(failures[0] + others)


def micro_steps(round_: Round, schedule: str) -> list[dict[str, MicroBatch]]:
    """Split a round into forwards: one task each (round_robin), or all tasks together (joint)."""
    accumulation = len(next(iter(round_.micro_batches.values())))
    steps = []
    for i in range(accumulation):
        together = {name: batches[i] for name, batches in round_.micro_batches.items()}
        steps += [together] if schedule == "joint" else [{n: b} for n, b in together.items()]
    return steps


def run_round(
    engine: Engine,
    tasks: Mapping[str, Task],
    round_: Round,
    *,
    schedule: str,
    stop: Callable[[], bool] = lambda: False,
    phases: Phases | None = None,
) -> RoundReport:
    """Forward, backward, clip and step; all ranks call it, and skip the step together if a loss is not finite.

    `stop` is asked at the end of the round whether this rank was told to stop; one that was stops all. `phases` is told
    what this rank is doing.

    Raises:
        DataError: on all ranks, before anything is done, where one of them has no audio for the round.
    """
    names, accelerator = list(tasks), engine.accelerator
    phases = phases or Phases()
    counts = [sum(tasks[n].count(m.batch) for m in round_.micro_batches[n]) for n in names]
    extra = [round_.failure is not None, round_.clips, round_.audio_seconds, len(round_.bad)]
    extra += [number for read in round_.read.values() for number in read]
    waits = torch.zeros(accelerator.num_processes, 2, dtype=torch.float64)
    waits[accelerator.process_index] = torch.tensor([round_.waited, round_.ahead])
    own = torch.cat([torch.tensor([*counts, *extra], dtype=torch.float64), waits.flatten()])
    phases.enter("collective")
    facts, waits = sum_over_ranks(accelerator, own).split([len(own) - waits.numel(), waits.numel()])
    waited, ahead = waits.view(-1, 2).T
    failed, clips, audio_seconds, bad, *read = facts[len(names) :].tolist()
    count_of = dict(zip(names, facts.tolist(), strict=False))
    if failed:
        fail_together(accelerator, round_.failure)

    phases.enter("forward/backward")
    sums = dict.fromkeys(names, 0.0)
    steps = micro_steps(round_, schedule)
    with engine.accumulating():
        for i, step in enumerate(steps):
            batches = {name: micro.batch.to(accelerator.device) for name, micro in step.items()}
            with engine.micro_batch(last=i == len(steps) - 1):
                with engine.autocast():
                    losses = engine.model(batches)
                loss = _scaled(losses, tasks, count_of, accelerator.num_processes)
                _after_own_backward(loss, partial(_add, losses, sums))
                if i == len(steps) - 1:
                    _after_own_backward(loss, partial(phases.enter, "collective"))
                engine.backward(loss)
        ends = torch.tensor([*(sums[n] for n in names), float(stop())], dtype=torch.float64)
        *totals, stops = sum_over_ranks(accelerator, ends).tolist()
        finite = all(map(math.isfinite, totals))
        if not finite:
            engine.spoil()

    phases.enter("optimizer")
    grad_norm, nonfinite = float("nan"), []
    if finite:
        grad_norm, fault = engine.step()
        if fault:
            nonfinite = [f"gradient of {', '.join(names)}: finite losses, but its norm is not"]
    else:
        engine.forget()
        found = _name_clips(engine, round_, sums)
        nonfinite = collect(accelerator, found)
    means = {n: t / max(count_of[n], 1.0) for n, t in zip(names, totals, strict=True)}
    return RoundReport(
        losses=means,
        counts=count_of,
        total=sum(tasks[n].config.weight * mean for n, mean in means.items()),
        grad_norm=grad_norm,
        clips=clips,
        audio_seconds=audio_seconds,
        bad=collect(accelerator, round_.bad) if bad else [],
        stop=stops > 0,
        read=dict(
            zip(round_.read, map(Read._make, zip(*[iter(read)] * 2, strict=True)), strict=True)
        ),
        waited=float(waited.max()),
        ahead=float(ahead.min()),
        nonfinite=nonfinite,
    )


def _add(losses, sums: dict) -> None:
    """Add a micro-batch's sums of losses; on a GPU this waits until its forward and backward are done."""
    for name, (total, _) in losses.items():
        sums[name] += total.detach().double().cpu()


def _after_own_backward(loss: torch.Tensor, call: Callable[[], None]) -> None:
    """Call when this rank has its gradient of a loss, before DDP waits in the same backward for those of the others."""
    engine = torch.autograd.Variable._execution_engine
    loss.register_hook(lambda _: engine.queue_callback(call))


def _scaled(losses, tasks: Mapping[str, Task], count_of: Mapping[str, float], ranks: int):
    """Weighted sum of S / N with the global N; times the ranks, because data-parallel gradients are averaged."""
    return sum(
        tasks[name].config.weight * ranks / max(count_of[name], 1.0) * total
        for name, (total, _) in losses.items()
    )


@torch.no_grad()
def _name_clips(engine: Engine, round_: Round, sums: Mapping[str, float]) -> list[str]:
    """Return "task: clips" of this rank's micro-batches with a non-finite loss, judged clip by clip."""
    found, model = [], engine.plain_model()
    for name, total in sums.items():
        if torch.isfinite(torch.as_tensor(total)):
            continue
        guilty = []
        for micro in round_.micro_batches[name]:
            for i, clip in enumerate(micro.ids):
                one = TaskBatch(*(tensor[i : i + 1] for tensor in micro.batch)).to(
                    engine.accelerator.device
                )
                with engine.autocast():
                    loss, _ = model({name: one})[name]
                if not loss.isfinite():
                    guilty.append(clip)
        found.append(f"{name}: {', '.join(guilty) or 'no single clip'}")
    return found
