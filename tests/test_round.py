"""The step law: any split into ranks, micro-batches and schedule has the gradient of one big batch (big_batch.py)."""

import json

import big_batch
import pytest
import tiny
import torch
from safetensors.torch import load_file

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.round import micro_steps, run_round

SCHEDULES = ("round_robin", "joint")
LAW = 1e-5


@pytest.fixture(scope="module")
def experiment(corpora_root):
    return build_experiment(load_config(tiny.tiny_words(corpora_root, *big_batch.weight_words())))


@pytest.fixture(scope="module")
def two_processes(corpora_root, tmp_path_factory):
    """Everything that workers/round_worker.py wrote on two gloo processes."""
    out = tmp_path_factory.mktemp("two")
    done = tiny.launch_two("tests/workers/round_worker.py", str(corpora_root), str(out))
    assert done.returncode == 0, done.stderr[-3000:]
    return out


def one_round(model, subset, schedule="joint", accumulation=1, clip=None, **more):
    recorder = big_batch.Recorder(model)
    report = run_round(
        big_batch.cpu_accelerator(),
        model,
        recorder,
        model.tasks,
        big_batch.share_of_round(subset, 0, 1, accumulation, **more),
        schedule=schedule,
        clip_norm=clip,
    )
    return report, recorder.steps


@pytest.mark.parametrize("subset", big_batch.SUBSETS, ids="+".join)
def test_micro_batches_and_schedules_have_the_gradient_of_one_big_batch(experiment, subset):
    model = big_batch.build(experiment, subset)
    truth, means = big_batch.true_gradients(model, subset)
    for schedule in SCHEDULES:
        for accumulation in (1, 2, 4):
            report, (gradients,) = one_round(model, subset, schedule, accumulation)
            assert big_batch.worst_error(gradients, truth) < LAW, (schedule, accumulation)
            assert report.losses == pytest.approx(means, rel=1e-5)
            total = sum(big_batch.WEIGHTS[name] * mean for name, mean in means.items())
            assert report.total == pytest.approx(total, rel=1e-5)


def test_two_processes_have_the_gradient_of_one_big_batch(experiment, two_processes):
    found = load_file(two_processes / "gradients_0.safetensors")
    reports = json.loads((two_processes / "reports_0.json").read_text())
    for subset in big_batch.SUBSETS:
        model = big_batch.build(experiment, subset)
        truth, means = big_batch.true_gradients(model, subset)
        for schedule in SCHEDULES:
            for accumulation in (1, 2):
                key = f"{'+'.join(subset)}/{schedule}/{accumulation}/None"
                gradients = {name: found[f"{key}/{name}"] for name in truth}
                assert big_batch.worst_error(gradients, truth) < LAW, key
                losses = {name: reports[key][name] for name in subset}
                assert losses == pytest.approx(means, rel=1e-5)


def test_all_ranks_step_with_the_same_gradient(two_processes):
    ours, theirs = (load_file(two_processes / f"gradients_{rank}.safetensors") for rank in (0, 1))
    assert set(ours) == set(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


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
        report, (gradients,) = one_round(model, subset, schedule, 2, clip=limit)
        assert big_batch.worst_error(gradients, wanted) < LAW
        assert report.grad_norm == pytest.approx(norm, rel=1e-5)


def test_clipping_on_two_processes_is_that_of_the_global_norm(experiment, two_processes):
    found = load_file(two_processes / "gradients_0.safetensors")
    reports = json.loads((two_processes / "reports_0.json").read_text())
    subset = big_batch.NAMES
    truth, _ = big_batch.true_gradients(big_batch.build(experiment, subset), subset)
    wanted, norm = clipped(truth, 0.05)
    assert norm > 0.05
    for schedule in SCHEDULES:
        key = f"{'+'.join(subset)}/{schedule}/2/0.05"
        gradients = {name: found[f"{key}/{name}"] for name in wanted}
        assert big_batch.worst_error(gradients, wanted) < LAW
        assert reports[key]["grad_norm"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_round_with_a_nan_takes_no_step_and_names_task_and_clip(experiment, schedule):
    model = big_batch.build(experiment, big_batch.NAMES)
    report, steps = one_round(model, big_batch.NAMES, schedule, 2, poison="upsampling")
    assert steps == []
    assert report.nonfinite == ["upsampling: clip 6"]
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_overflows_takes_no_step(experiment):
    model = big_batch.build(experiment, ("next_step",))
    with torch.no_grad():
        head = model.heads.heads["next_step"].layers
        head[0].weight.mul_(1e30)
        head[2].weight.zero_()
    before = [p.detach().clone() for p in model.parameters()]
    report, steps = one_round(model, ("next_step",))
    assert torch.isfinite(torch.tensor(report.total))
    assert steps == []
    assert "norm" in report.nonfinite[0]
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


def test_a_nan_on_one_rank_is_skipped_by_all_ranks_together(two_processes):
    for rank in (0, 1):
        outcome = json.loads((two_processes / f"poisoned_{rank}.json").read_text())
        assert outcome["next_step"]["nonfinite"] == ["next_step: clip 6"]
        assert outcome["next_step"]["unchanged"]
        # the next, clean round goes on as if nothing had been
        assert outcome["None"] == {
            "nonfinite": [],
            "unchanged": False,
            "finite": True,
            "stop": True,
        }


def test_a_stop_asked_of_one_rank_is_heard_by_all(two_processes):
    for rank in (0, 1):
        outcome = json.loads((two_processes / f"poisoned_{rank}.json").read_text())
        assert outcome["next_step"]["stop"]


def test_round_robin_holds_one_task_a_forward_and_joint_all():
    round_ = big_batch.share_of_round(big_batch.NAMES, 0, 1, 2)
    assert [list(step) for step in micro_steps(round_, "joint")] == [list(big_batch.NAMES)] * 2
    alone = [[name] for name in big_batch.NAMES]
    assert [list(step) for step in micro_steps(round_, "round_robin")] == alone * 2
