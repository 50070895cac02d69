"""The truth that the step is held against: one big batch on one process, in plain torch and float64.

Nothing here calls a task's loss, the model's forward or run_round. Used by test_round.py and workers/round_worker.py.
"""

import copy
import itertools

import torch
from accelerate import Accelerator
from torch.nn import functional

from mtl_dist.data.batches import MicroBatch, Round
from mtl_dist.engines import make_engine
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.tasks import TaskBatch

GLOBAL_BATCH = 8
NAMES = ("audio_tagging", "next_step", "noise_reduction", "upsampling")
SUBSETS = [c for n in range(1, 5) for c in itertools.combinations(NAMES, n)]
WEIGHTS = {"audio_tagging": 0.7, "next_step": 2.0, "noise_reduction": 1.5, "upsampling": 0.4}
SAMPLES = {"audio_tagging": 60, "next_step": 40, "noise_reduction": 40, "upsampling": 50}


def accumulations(subset: tuple[str, ...]) -> tuple[int, ...]:
    """Return the micro-batches a rank and round on which an engine is tested: two, and one for all tasks together."""
    return (1, 2) if subset == NAMES else (2,)


SLICE_SAMPLES = 11
"""Shorter than the receptive field and no divisor of any clip."""


def slice_words() -> list[str]:
    """Command-line words that ask for slices of time, of a trunk so wide that ZeRO-3 puts its layers in shards."""
    return ["--memory.slice_seconds", str(SLICE_SAMPLES / 16_000), "--model.channels", "160"]


def weight_words() -> list[str]:
    """Command-line words that give every task a weight of its own."""
    return [f"--tasks.{name}.weight={weight}" for name, weight in WEIGHTS.items()]


def big_batches() -> dict[str, TaskBatch]:
    """8 clips a task: unequal lengths with zero padding, one of 1 sample, one absent."""
    rng = torch.Generator().manual_seed(7)
    batches = {}
    for place, name in enumerate(NAMES):
        samples = SAMPLES[name]
        valid = [samples, 33, 0, 21, samples, 1, 38, 17]
        lengths = torch.tensor(valid[place:] + valid[:place])
        mask = torch.arange(samples) < lengths[:, None]
        inputs, targets = (torch.randn(2, 8, samples, generator=rng) * mask).unbind()
        if name == "audio_tagging":
            targets = torch.randint(0, 3, (8,), generator=rng) * (lengths > 0)
        batches[name] = TaskBatch(inputs, inputs if name == "next_step" else targets, lengths)
    return batches


def terms(name: str, outputs: torch.Tensor, batch: TaskBatch, delay: int) -> torch.Tensor:
    """All terms of a task's loss, one after another."""
    found = []
    for y, x, length in zip(outputs, batch.targets, batch.valid.tolist(), strict=True):
        if name == "audio_tagging" and length:
            found.append(-functional.log_softmax(y, dim=0)[x, None])
        elif name == "next_step" and length > 1:
            found.append((y[: length - 1] - x[1:length]) ** 2)
        elif name in ("noise_reduction", "upsampling"):
            frames = min(length, len(x) - delay)
            error = (y[delay : delay + frames] - x[:frames]).abs()
            found.append(torch.where(error < 1, error**2 / 2, error - 0.5))
    return torch.cat(found)


def true_gradients(
    model: MultitaskModel, subset: tuple[str, ...]
) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """Return the gradient of sum_i w_i S_i / N_i in float64 by parameter name, and {task: S_i / N_i}."""
    twin = copy.deepcopy(model).double()
    twin.zero_grad()
    total, means = 0.0, {}
    for name in subset:
        batch = big_batches()[name]
        batch = batch._replace(inputs=batch.inputs.double())
        hidden = twin.trunk(batch.inputs)
        outputs = twin.heads.heads[name](hidden, batch.valid)
        mean = terms(name, outputs, batch, delay=(model.trunk.receptive_field - 1) // 2).mean()
        total, means[name] = total + WEIGHTS[name] * mean, mean.item()
    total.backward()
    return {name: p.grad for name, p in twin.named_parameters()}, means


def share_of_round(
    subset: tuple[str, ...], rank: int, ranks: int, accumulation: int, poison: str | None = None
) -> Round:
    """Return one rank's round of the big batches; `poison` names a task whose clip 6 holds a NaN."""
    size = GLOBAL_BATCH // ranks // accumulation
    micro_batches: dict[str, list[MicroBatch]] = {}
    for name in subset:
        batch = big_batches()[name]
        if name == poison:
            batch.inputs[6, 3] = float("nan")
        first = rank * GLOBAL_BATCH // ranks
        starts = range(first, first + GLOBAL_BATCH // ranks, size)
        micro_batches[name] = [
            MicroBatch(
                batch=TaskBatch(*(tensor[s : s + size] for tensor in batch)),
                ids=[f"clip {i}" for i in range(s, s + size)],
            )
            for s in starts
        ]
    clips = len(subset) * GLOBAL_BATCH // ranks
    return Round(number=0, micro_batches=micro_batches, clips=clips)


RATE = 1e4
"""Learning rate of one step of SGD that shows the gradient: so large that the weights before it do not blur it."""


def engine(accelerator: Accelerator, experiment, subset: tuple[str, ...], clip: float | None):
    """The launched engine on a subset's model, with SGD."""
    return make_engine(
        accelerator,
        lambda: build(experiment, subset),
        lambda model: torch.optim.SGD(model.parameters(), lr=RATE),
        clip_norm=clip,
    )


def initial_weights(experiment, subset: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """What a new engine starts with."""
    return build(experiment, subset).state_dict()


def build(experiment, subset: tuple[str, ...]) -> MultitaskModel:
    """The subset's model: its trunk and the subset's heads only."""
    model = experiment.build_model()
    tasks = {name: experiment.tasks[name] for name in subset}
    return MultitaskModel(model.trunk, tasks, model.slice_samples)


def worst_error(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor]) -> float:
    """Largest relative error over the parameters: |g - truth| / |truth|, in the Euclidean norm."""
    assert set(found) == set(truth)
    return max(
        float((found[n].double() - truth[n]).norm() / truth[n].norm().clamp(min=1e-12))
        for n in truth
    )


def cpu_accelerator() -> Accelerator:
    """An Accelerator on the CPU, of one process or of those that were launched."""
    return Accelerator(cpu=True)
