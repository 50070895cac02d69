"""The resume law with the real entry, as separate processes: a run in pieces equals the run in one piece, bit for bit."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import tiny
import torch
import worlds
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
ENTRY = "mtl_dist/train.py"
MEASURED = ("throughput/", "time/", "memory/", "stream/")  # of the machine, not of the training
LAST = "round_00000012"


def words(corpora, run, *more) -> list[str]:
    lengths = ["--train.rounds", "12", "--train.validate_every", "4"]
    few = ["--evaluation.max_clips", "2", "--run.resume", "auto", "--run.dir", str(run)]
    return tiny.tiny_words(corpora, *lengths, *few, *more)


def train(corpora, run, *more, entry=(ENTRY,), code=0):
    done = worlds.run(*entry, *words(corpora, run, *more))
    assert done.returncode == code, done.stderr[-3000:]
    return run


def entries(run) -> list[dict]:
    """What metrics.jsonl says of the training; a stopped run has saved at other times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [
        {k: v for k, v in line.items() if not k.startswith(MEASURED)}
        for line in lines
        if line["kind"] != "checkpoint"
    ]


def tensors(run, name: str) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / LAST / f"{name}.safetensors")


def state(run) -> dict:
    return json.loads((run / "checkpoints" / LAST / "state.json").read_text())


def status(run) -> dict:
    return json.loads((run / "status.json").read_text())


def curves(run, **options) -> dict[str, list[tuple[int, float]]]:
    """{tag: [(step, value)]} as TensorBoard reads them."""
    folder = str(run / "tensorboard")
    found = EventAccumulator(folder, size_guidance={"scalars": 0}, **options).Reload()
    return {t: [(p.step, p.value) for p in found.Scalars(t)] for t in found.Tags()["scalars"]}


def assert_each_step_once(run, whole) -> None:
    ours, theirs = curves(run), curves(whole)
    assert set(ours) == set(theirs)
    for tag, points in ours.items():
        steps = [step for step, _ in points]
        assert steps == sorted(set(steps)), tag
        if not tag.startswith(MEASURED):
            assert points == theirs[tag], tag
    assert [step for step, _ in ours["loss/total"]] == list(range(1, 13))


def assert_the_same_run(run, whole) -> None:
    assert_each_step_once(run, whole)
    for name in ("model", "optimizer"):
        ours, theirs = tensors(run, name), tensors(whole, name)
        assert set(ours) == set(theirs)
        assert all(torch.equal(ours[key], theirs[key]) for key in theirs), name
    assert any(key.startswith("exp_avg_sq/trunk.") for key in tensors(run, "optimizer"))
    assert state(run) == state(whole)
    assert entries(run) == entries(whole)
    assert {entry["round"] for entry in entries(run)} == set(range(1, 13))
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, whole)]
    assert results[0] == results[1]
    assert status(run) == {"state": "finished", "round": 12, "rounds": 12, "signal": None}


@pytest.fixture(scope="module")
def whole(corpora_root, tmp_path_factory):
    """12 rounds without a break."""
    return train(corpora_root, tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def stopped_at_5(corpora_root, tmp_path_factory):
    run = tmp_path_factory.mktemp("stopped") / "run"
    return train(corpora_root, run, "--train.stop_after_rounds", "5")


def test_a_run_stopped_twice_equals_the_run_in_one_piece(
    corpora_root, whole, stopped_at_5, tmp_path
):
    run = shutil.copytree(stopped_at_5, tmp_path / "run")
    assert status(run) == {"state": "stopped", "round": 5, "rounds": 12, "signal": None}
    assert {entry["round"] for entry in entries(run)} == set(range(1, 6))
    train(corpora_root, run, "--train.stop_after_rounds", "4")
    assert {entry["round"] for entry in entries(run)} == set(range(1, 10))
    train(corpora_root, run)
    assert_the_same_run(run, whole)


def test_sigterm_saves_and_the_resumed_run_equals_the_run_in_one_piece(
    corpora_root, whole, tmp_path
):
    entry = ("tests/workers/interrupted.py", "SIGTERM", "6")
    run = train(corpora_root, tmp_path / "run", "--data.workers", "2", entry=entry, code=128 + 15)
    # the round after the signal is finished and saved
    assert (run / "checkpoints" / "round_00000007" / "COMPLETE").is_file()
    assert not (run / "results.json").exists()
    assert status(run) == {"state": "stopped", "round": 7, "rounds": 12, "signal": "SIGTERM"}
    assert_the_same_run(train(corpora_root, run), whole)


@pytest.mark.parametrize("file", ["one_cpu", "two_cpu_processes"])
def test_ctrl_c_at_the_launcher_saves_and_the_run_goes_on(corpora_root, whole, tmp_path, file):
    """A terminal sends Ctrl-C to the launcher and to all it started; the launcher may be gone before they are."""
    run = tmp_path / "run"
    config = ["--config_file", f"launch_configs/{file}.yaml"]
    script = ["tests/workers/interrupted.py", "SIGINT", "6", *words(corpora_root, run)]
    launcher = subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *config, *script],
        cwd=tiny.REPOSITORY,
        env=os.environ | {"OMP_NUM_THREADS": "1", "LAUNCHED": "yes"},
        start_new_session=True,
        stderr=subprocess.PIPE,
        text=True,
    )
    said = launcher.communicate(timeout=240)[1]  # until the last of them has ended
    assert launcher.returncode != 0
    assert "stopped after round 7; go on with --run.resume auto" in said
    assert (run / "checkpoints" / "round_00000007" / "COMPLETE").is_file()
    train(corpora_root, run)
    if file == "one_cpu":
        assert_the_same_run(run, whole)


def test_a_killed_run_goes_on_from_its_last_checkpoint_and_equals_the_run_in_one_piece(
    corpora_root, whole, tmp_path
):
    entry = ("tests/workers/interrupted.py", "SIGKILL", "7")
    run = train(corpora_root, tmp_path / "run", entry=entry, code=-9)
    assert max(entry["round"] for entry in entries(run)) == 7
    assert max(step for step, _ in curves(run)["loss/total"]) == 7
    assert status(run) == {"state": "running", "round": 4, "rounds": 12, "signal": None}
    assert [p.name for p in (run / "checkpoints").glob("round_*")] == ["round_00000004"]
    assert_the_same_run(train(corpora_root, run), whole)
    everything = curves(run, purge_orphaned_data=False)["loss/total"]
    assert [step for step, _ in everything] == [*range(1, 8), *range(5, 13)]


def test_a_finished_run_that_is_started_again_says_everything_once(corpora_root, whole, tmp_path):
    run = shutil.copytree(whole, tmp_path / "run")
    assert_the_same_run(train(corpora_root, run), whole)


def test_a_run_goes_on_with_other_ranks_and_loader_workers(
    corpora_root, whole, stopped_at_5, tmp_path
):
    """On two processes sums are taken in another order: equal but for rounding."""
    run = shutil.copytree(stopped_at_5, tmp_path / "run")
    done = worlds.launch(
        "two_cpu_processes", ENTRY, *words(corpora_root, run, "--data.workers", "2")
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert state(run)["positions"] == state(whole)["positions"]
    ours, theirs = tensors(run, "model"), tensors(whole, "model")
    for name in theirs:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-5)
    for found, wanted in zip(entries(run), entries(whole), strict=True):
        assert found.pop("kind") == wanted.pop("kind")
        assert found == pytest.approx(wanted, rel=1e-3, abs=1e-4)
