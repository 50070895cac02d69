"""The step law: any split into micro-batches and schedule has the gradient of one big batch; ranks: test_engines.py."""

import big_batch
import pytest
import tiny
import torch

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.round import micro_steps, run_round

SCHEDULES = ("round_robin", "joint")
LAW = 1e-5


@pytest.fixture(scope="module")
def experiment(corpora_root):
    return build_experiment(load_config(tiny.tiny_words(corpora_root, *big_batch.weight_words())))


def one_round(experiment, subset, schedule="joint", accumulation=1, clip=None, **more):
    """The report of a round on one process, and the gradient that a step of SGD has used, or {} without a step."""
    engine = big_batch.engine(big_batch.cpu_accelerator(), experiment, subset, clip)
    before, _ = engine.full_state()
    report = run_round(
        engine,
        engine.bare.tasks,
        big_batch.share_of_round(subset, 0, 1, accumulation, **more),
        schedule=schedule,
    )
    assert all(p.grad is None for p in engine.bare.parameters())
    after, _ = engine.full_state()
    stepped = any(not torch.equal(before[n], after[n]) for n in before)
    step = {n: (before[n].double() - after[n].double()) / big_batch.RATE for n in before}
    return report, step if stepped else {}


@pytest.mark.parametrize("subset", big_batch.SUBSETS, ids="+".join)
def test_micro_batches_and_schedules_have_the_gradient_of_one_big_batch(experiment, subset):
    model = big_batch.build(experiment, subset)
    truth, means = big_batch.true_gradients(model, subset)
    for schedule in SCHEDULES:
        for accumulation in (1, 2, 4):
            report, gradients = one_round(experiment, subset, schedule, accumulation)
            assert big_batch.worst_error(gradients, truth) < LAW, (schedule, accumulation)
            assert report.losses == pytest.approx(means, rel=1e-5)
            total = sum(big_batch.WEIGHTS[name] * mean for name, mean in means.items())
            assert report.total == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("subset", [big_batch.NAMES, ("audio_tagging",)], ids="+".join)
def test_slices_of_time_have_the_gradient_of_one_big_batch(corpora_root, subset):
    words = tiny.tiny_words(corpora_root, *big_batch.weight_words(), *big_batch.slice_words())
    experiment = build_experiment(load_config(words))
    truth, means = big_batch.true_gradients(big_batch.build(experiment, subset), subset)
    for schedule in SCHEDULES:
        report, gradients = one_round(experiment, subset, schedule, 2)
        assert big_batch.worst_error(gradients, truth) < LAW, schedule
        assert report.losses == pytest.approx(means, rel=1e-5)


def clipped(truth: dict, limit: float) -> tuple[dict, float]:
    """The truth after torch's own clipping by the global norm, and the norm before it."""
    parameters = {name: torch.nn.Parameter(torch.zeros_like(g)) for name, g in truth.items()}
    for name, parameter in parameters.items():
        parameter.grad = truth[name].clone()
    norm = torch.nn.utils.clip_grad_norm_(parameters.values(), limit).item()
    return {name: p.grad for name, p in parameters.items()}, norm


@pytest.mark.parametrize("limit", [0.05, 1e3])
def test_clipping_is_that_of_the_big_batchs_global_norm(experiment, limit):
    subset = big_batch.NAMES
    model = big_batch.build(experiment, subset)
    wanted, norm = clipped(big_batch.true_gradients(model, subset)[0], limit)
    for schedule in SCHEDULES:
        report, gradients = one_round(experiment, subset, schedule, 2, clip=limit)
        assert big_batch.worst_error(gradients, wanted) < LAW
        assert report.grad_norm == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("more", [[], big_batch.slice_words()], ids=["whole clips", "slices"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_round_with_a_nan_takes_no_step_and_names_task_and_clip(corpora_root, schedule, more):
    words = tiny.tiny_words(corpora_root, *big_batch.weight_words(), *more)
    experiment = build_experiment(load_config(words))
    report, step = one_round(experiment, big_batch.NAMES, schedule, 2, poison="upsampling")
    assert step == {}
    assert report.nonfinite == ["upsampling: clip 6"]


def test_a_gradient_that_overflows_takes_no_step(experiment, monkeypatch):
    build = big_batch.build

    def steep(experiment, subset):
        model = build(experiment, subset)
        with torch.no_grad():
            head = model.heads.heads["next_step"].layers
            head[0].weight.mul_(1e30)
            head[2].weight.zero_()
        return model

    monkeypatch.setattr(big_batch, "build", steep)
    report, step = one_round(experiment, ("next_step",))
    assert torch.isfinite(torch.tensor(report.total))
    assert step == {}
    assert "norm" in report.nonfinite[0]


def test_round_robin_holds_one_task_a_forward_and_joint_all():
    round_ = big_batch.share_of_round(big_batch.NAMES, 0, 1, 2)
    assert [list(step) for step in micro_steps(round_, "joint")] == [list(big_batch.NAMES)] * 2
    alone = [[name] for name in big_batch.NAMES]
    assert [list(step) for step in micro_steps(round_, "round_robin")] == alone * 2
