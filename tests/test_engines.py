"""The step law on every engine, two processes: the gradient of one big batch on one process (big_batch.py)."""

import itertools
import json
import shutil

import big_batch
import crossing
import pytest
import tiny
import torch
import worlds
from safetensors.torch import load_file
from test_round import LAW, SCHEDULES, clipped

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment

FILES = {
    "DDP": "two_cpu_processes",
    "FSDP2": "fsdp2_two_cpu_processes",
    "ZeRO-1": "zero1_two_cpu_processes",
    "ZeRO-2": "zero2_two_cpu_processes",
    "ZeRO-3": "zero3_two_cpu_processes",
}
pytestmark = pytest.mark.timeout(480)


def marked(name: str):
    return pytest.param(name, marks=pytest.mark.deepspeed if "ZeRO" in name else pytest.mark.slow)


@pytest.fixture(scope="module")
def experiment(corpora_root):
    return build_experiment(load_config(tiny.tiny_words(corpora_root, *big_batch.weight_words())))


@pytest.fixture(scope="module")
def shared(corpora_root, tmp_path_factory):
    """Where stopped runs wait to be gone on with, the first of them stopped by one process; see crossing.py."""
    folder = tmp_path_factory.mktemp("shared")
    crossing.train(big_batch.cpu_accelerator(), corpora_root, folder / "uninterrupted")
    crossing.write(big_batch.cpu_accelerator(), corpora_root, folder, "one process")
    return folder


@pytest.fixture(scope="module", params=[marked(name) for name in FILES])
def ran(request, corpora_root, tmp_path_factory, shared):
    """(engine, folder) of what workers/engine_worker.py wrote on two processes."""
    if "ZeRO" in request.param:
        pytest.importorskip("deepspeed")
    out = tmp_path_factory.mktemp("engine")
    words = ["tests/workers/engine_worker.py", str(corpora_root), str(out), str(shared)]
    done = worlds.launch(FILES[request.param], *words, timeout=380)
    assert done.returncode == 0, done.stderr[-3000:]
    return request.param, out


def outcome(out, rank: int = 0) -> dict:
    return json.loads((out / f"outcome_{rank}.json").read_text())


def test_the_engine_in_force_is_the_one_asked_for(ran):
    name, out = ran
    assert [outcome(out, rank)["names"] for rank in (0, 1)] == [[name], [name]]


def check_law(subsets, experiment, found: dict[str, torch.Tensor], reports: dict) -> None:
    """Every subset's gradients and losses, by schedule and accumulation, are those of one big batch."""
    for subset in subsets:
        truth, means = big_batch.true_gradients(big_batch.build(experiment, subset), subset)
        for schedule, accumulation in itertools.product(SCHEDULES, big_batch.accumulations(subset)):
            key = f"{'+'.join(subset)}/{schedule}/{accumulation}/None"
            gradients = {name: found[f"{key}/{name}"] for name in truth}
            assert big_batch.worst_error(gradients, truth) < LAW, key
            losses = {name: reports[key][name] for name in subset}
            assert losses == pytest.approx(means, rel=1e-5)


def test_every_subset_schedule_and_accumulation_has_the_gradient_of_one_big_batch(ran, experiment):
    _, out = ran
    found, reports = load_file(out / "gradients.safetensors"), outcome(out)["reports"]
    check_law(big_batch.SUBSETS, experiment, found, reports)


def test_slices_of_time_have_the_gradient_of_one_big_batch(ran, corpora_root):
    _, out = ran
    words = tiny.tiny_words(corpora_root, *big_batch.weight_words(), *big_batch.slice_words())
    found = load_file(out / "slices.safetensors")
    reports = json.loads((out / "slices_0.json").read_text())
    subsets = (big_batch.NAMES, big_batch.NAMES[:1])
    check_law(subsets, build_experiment(load_config(words)), found, reports)


def test_clipping_is_by_the_global_norm(ran, experiment):
    _, out = ran
    found, reports = load_file(out / "gradients.safetensors"), outcome(out)["reports"]
    subset = big_batch.NAMES
    truth, _ = big_batch.true_gradients(big_batch.build(experiment, subset), subset)
    wanted, norm = clipped(truth, 0.05)
    assert norm > 0.05
    for schedule in SCHEDULES:
        for limit, gradient in ((None, truth), (0.05, wanted)):
            key = f"{'+'.join(subset)}/{schedule}/2/{limit}"
            gradients = {name: found[f"{key}/{name}"] for name in gradient}
            assert big_batch.worst_error(gradients, gradient) < LAW
            assert reports[key]["grad_norm"] == pytest.approx(norm, rel=1e-5)


def test_runs_that_other_engines_have_stopped_go_on_as_if_they_had_not(ran, shared):
    name, _ = ran
    truth = crossing.losses(shared / "uninterrupted")
    written = [path.name for path in crossing.in_order(shared)]
    resumed = sorted((shared / "resumed").glob(f"*__{name}"))
    before = written[: written.index(name)]
    assert [run.name.split("__")[0] for run in resumed] == sorted(before[-2:])
    assert before[0] == "one process"
    for run in resumed:
        assert crossing.worst(run, truth) < 1e-4, run.name


def test_one_process_goes_on_with_the_run_that_an_engine_has_stopped(ran, shared, corpora_root):
    name, _ = ran
    run = shared / "resumed" / f"{name}__one process"
    shutil.copytree(shared / "written" / name, run)
    crossing.train(big_batch.cpu_accelerator(), corpora_root, run)
    assert crossing.worst(run, crossing.losses(shared / "uninterrupted")) < 1e-4


def test_a_nan_on_one_rank_is_skipped_by_all_ranks_together(ran):
    _, out = ran
    for rank in (0, 1):
        poisoned = outcome(out, rank)["poisoned"]
        assert poisoned["next_step"]["nonfinite"] == ["next_step: clip 6"]
        assert poisoned["next_step"]["unchanged"]
        # the next, clean round goes on as if nothing had been
        assert poisoned["None"]["nonfinite"] == []
        assert poisoned["None"]["finite"]
    assert not outcome(out)["poisoned"]["None"]["unchanged"]


def test_a_stop_asked_of_one_rank_is_heard_by_all(ran):
    _, out = ran
    assert all(outcome(out, rank)["poisoned"]["next_step"]["stop"] for rank in (0, 1))
