"""Adam's groups and learning rates of the paper (section 4.2, Table 3)."""

import pytest
import torch

from mtl_dist.optim import Schedule, make_optimizer, schedules, set_learning_rates
from mtl_dist.sections import OptimConfig
from mtl_dist.tasks import TASKS

PAPER = {
    "trunk": 3e-4,
    "audio_tagging": 5.37e-5,
    "next_step": 5e-3,
    "noise_reduction": 5e-3,
    "upsampling": 5e-3,
}


@pytest.fixture
def groups():
    """The schedules of the defaults, which are the paper's."""
    return schedules(
        OptimConfig(), {n: TASKS[n].Config(sources=["any"]) for n in PAPER if n in TASKS}
    )


@pytest.fixture
def optimizer(tiny_experiment, groups):
    return make_optimizer(tiny_experiment.build_model(), OptimConfig(), groups)


def test_trunk_and_heads_have_the_papers_learning_rates(optimizer):
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == PAPER


def test_adam_has_the_papers_betas_and_epsilon(optimizer):
    assert isinstance(optimizer, torch.optim.Adam)
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.99), 1e-8)
        assert group["weight_decay"] == 0


def test_every_parameter_is_in_the_one_group_it_belongs_to(tiny_experiment, groups):
    model = tiny_experiment.build_model()
    name_of = {id(p): name for name, p in model.named_parameters()}
    optimizer = make_optimizer(model, OptimConfig(), groups)
    found = [(name_of[id(p)], g["name"]) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(name for name, _ in found) == sorted(name_of.values())
    for name, group in found:
        assert name.startswith("trunk." if group == "trunk" else f"heads.heads.{group}.")


@pytest.mark.parametrize(
    ("epoch", "factor"), [(0, 1), (4, 1), (5, 0.95), (9, 0.95), (10, 0.95**2), (99, 0.95**19)]
)
def test_learning_rates_fall_by_5_percent_every_5_epochs(optimizer, groups, epoch, factor):
    rates = set_learning_rates(optimizer, groups, epoch, epoch / 100)
    assert rates == pytest.approx({name: rate * factor for name, rate in PAPER.items()}, rel=1e-12)
    assert {g["name"]: g["lr"] for g in optimizer.param_groups} == rates


def test_learning_rates_depend_on_the_epoch_alone(optimizer, groups):
    direct = set_learning_rates(optimizer, groups, 23, 0.23)
    for epoch in (50, 0, 7, 23):
        by_detours = set_learning_rates(optimizer, groups, epoch, epoch / 100)
    assert by_detours == direct


def test_tasks_may_decay_on_their_own():
    own = schedules(
        OptimConfig(decay_factor=0.5, decay_epochs=2),
        {"next_step": TASKS["next_step"].Config(decay_factor=0.1, decay_epochs=3)},
    )
    assert own["trunk"] == Schedule(3e-4, 0.5, 2)
    assert own["trunk"].at(5, 0.5) == pytest.approx(3e-4 * 0.25)
    assert own["next_step"].at(5, 0.5) == pytest.approx(5e-3 * 0.1)


def test_the_cosine_schedule_is_pytorchs():
    own = schedules(OptimConfig(schedule="cosine"), {"upsampling": TASKS["upsampling"].Config()})
    optimizer = torch.optim.SGD(
        [
            {"params": [torch.nn.Parameter(torch.zeros(1))], "lr": own[n].base, "name": n}
            for n in own
        ]
    )
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=30)
    for step in range(30):
        wanted = dict(zip(own, theirs.get_last_lr(), strict=True))
        found = {name: schedule.at(step // 4, step / 30) for name, schedule in own.items()}
        assert found == pytest.approx(wanted, rel=1e-6)
        optimizer.step()
        theirs.step()


def test_an_adam_step_is_the_papers_formula(tiny_experiment, groups):
    """First step by hand: the bias-corrected moments are g and g^2, so the step is lr g / (|g| + eps)."""
    model = tiny_experiment.build_model()
    optimizer = make_optimizer(model, OptimConfig(), groups)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    set_learning_rates(optimizer, groups, 5, 0.05)
    optimizer.step()
    for name, parameter in model.named_parameters():
        group = "trunk" if name.startswith("trunk.") else name.split(".")[2]
        gradient = parameter.grad
        wanted = before[name] - PAPER[group] * 0.95 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), wanted, rtol=1e-5, atol=1e-7)
