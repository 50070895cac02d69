"""Killed at random moments, a run learns the same (benchmarks/failures.py, with fewer kills)."""

import json
import os
import random
import signal
import sys

import pytest
import tiny
import torch
import worlds

sys.path.insert(0, str(tiny.REPOSITORY / "benchmarks"))

import failures

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
ROUNDS = 100


@pytest.fixture(scope="module")
def out(corpora_root, tmp_path_factory):
    """A folder with the corpora and a run that nobody killed."""
    folder = tmp_path_factory.mktemp("failures")
    (folder / "corpora").symlink_to(corpora_root)
    words = failures.words(folder, folder / "uninterrupted", ROUNDS)
    ended = worlds.launch(failures.FILE, "mtl_dist/train.py", *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


def assert_learned_the_same(run, out) -> None:
    ours, theirs = (failures.final(folder, ROUNDS) for folder in (run, out / "uninterrupted"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert json.loads((run / "status.json").read_text())["state"] == "finished"


def test_every_process_killed_twice_over(out):
    assert_learned_the_same(failures.kill_all(out, 2, ROUNDS, random.Random(1)), out)


def test_rank_0_killed_under_a_launcher_that_restarts(out):
    assert_learned_the_same(failures.kill_one(out, 1, ROUNDS, random.Random(2)), out)


def test_a_stop_request_is_not_taken_for_a_failure_by_a_launcher_that_restarts(out):
    run = out / "stopped"
    launcher = failures.launch(out, run, ROUNDS, "--max_restarts", "2")
    failures.wait_for(lambda: failures.rounds_done(run) > 2, launcher)
    for rank in failures.ranks_of(launcher):
        os.kill(rank.pid, signal.SIGTERM)
    assert launcher.wait(timeout=failures.BACK_SECONDS) == 0
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["signal"]) == ("stopped", "SIGTERM")
    assert failures.saved(run) == status["round"] < ROUNDS
    assert failures.resumptions(run) == []
