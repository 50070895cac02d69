"""Which rank is slow and at what: told by rank 0 for all, and by each rank in a file of its own."""

import json
import statistics

import pytest
import tiny
import torch
import worlds
from accelerate import Accelerator
from entry import entries

from mtl_dist import stragglers
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.stragglers import Stragglers

SLOW, SECONDS = 1, 0.8
KEYS = ("time/data", "time/forward_backward", "time/collective", "time/optimizer")


class RankOneOfThree:
    """The world of three ranks of which this is rank 1."""

    num_processes, process_index = 3, 1


@pytest.fixture
def phases(monkeypatch):
    """Phases by a clock that stands still; phases.spend(phase, seconds)."""
    now, made = [100.0], Phases()
    monkeypatch.setattr("mtl_dist.phases.time.perf_counter", lambda: now[0])
    made.enter("start")

    def spend(phase, seconds):
        made.enter(phase)
        now[0] += seconds

    made.spend = spend
    made.take()
    return made


def test_seconds_are_a_round_and_start_anew_after_every_entry(phases, tmp_path):
    alone = Stragglers(Accelerator(cpu=True), phases, RunFolder(tmp_path), first_round=6)
    for seconds in (1.0, 3.0):
        phases.spend("data", seconds)
        phases.spend("collective", 10 * seconds)
        phases.spend("forward/backward", 100 * seconds)
        phases.spend("collective", 20 * seconds)
        phases.spend("optimizer", 1000 * seconds)
        phases.spend("reporting", 5 * seconds)
    assert alone.compare(8) == dict(zip(KEYS, (2.0, 200.0, 60.0, 2000.0), strict=True))
    phases.spend("data", 5.0)
    phases.spend("validation", 7.0)
    phases.enter("data")
    assert alone.compare(9) == dict(zip(KEYS, (5.0, 0.0, 0.0, 0.0), strict=True))
    assert not (tmp_path / "ranks").exists(), "one process alone has no other to be compared with"


def test_the_slowest_rank_is_the_one_with_most_work_of_its_own(phases, tmp_path, monkeypatch):
    others = torch.tensor([[1.0, 1, 9, 1], [0, 0, 0, 0], [3, 0, 0, 4]], dtype=torch.float64)
    monkeypatch.setattr(stragglers, "sum_over_ranks", lambda _, table: table + others)
    three = Stragglers(RankOneOfThree(), phases, RunFolder(tmp_path), first_round=0)
    phases.spend("data", 0.5)
    phases.spend("forward/backward", 1.0)
    phases.spend("collective", 6.0)
    phases.enter("reporting")
    times = three.compare(1)
    assert (times["time/slowest_rank"], times["time/slowest_rank_seconds"]) == (2, 3.0)
    assert (times["time/fastest_rank"], times["time/fastest_rank_seconds"]) == (1, 1.5)
    assert times["time/data"] == pytest.approx((1 + 0.5 + 3) / 3)
    assert times["time/collective"] == pytest.approx((9 + 6 + 0) / 3)


def test_a_full_disk_is_reported_and_training_goes_on(phases, tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(stragglers, "sum_over_ranks", lambda _, table: table)
    monkeypatch.setattr(RunFolder, "rank_file", lambda *_: tmp_path / "full")
    (tmp_path / "full").symlink_to("/dev/full")
    Stragglers(RankOneOfThree(), phases, RunFolder(tmp_path), 0).compare(1)
    assert "full could not be written" in caplog.text
    assert "training goes on" in caplog.text


def own_lines(run, rank: int) -> list[dict]:
    lines = (run / "ranks" / f"rank_{rank:05d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def typical(lines: list[dict], key: str) -> float:
    return statistics.median(line[key] for line in lines)


def train_slowly(corpora, run, *more: str):
    """Five rounds of one micro-batch on two ranks, of which one sleeps between forward and backward."""
    words = ["--train.schedule", "joint", "--train.rounds", "9", "--train.stop_after_rounds", "5"]
    words += ["--evaluation.max_clips", "1", "--run.dir", str(run), *more]
    script = ["tests/workers/straggler.py", str(SLOW), str(SECONDS)]
    done = worlds.launch("two_cpu_processes", *script, *tiny.tiny_words(corpora, *words))
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_two_ranks_tell_who_is_slow_one_writes_tensorboard_and_a_resume_repeats_nothing(
    corpora_root, tmp_path
):
    """DDP waits for the other rank within the only backward: the wait must not look like work."""
    run = tmp_path / "run"
    train_slowly(corpora_root, run)
    told = entries(run, "round")
    assert [line["time/slowest_rank"] for line in told] == [SLOW] * 5
    assert [line["time/fastest_rank"] for line in told] == [1 - SLOW] * 5
    slow, fast = own_lines(run, SLOW), own_lines(run, 1 - SLOW)
    assert typical(slow, "time/forward_backward") > SECONDS
    assert typical(fast, "time/forward_backward") < SECONDS
    assert typical(fast, "time/collective") > SECONDS / 2 > typical(slow, "time/collective")
    for key in KEYS:
        for line, one, other in zip(told, slow, fast, strict=True):
            assert line[key] == pytest.approx((one[key] + other[key]) / 2)
    assert len(list((run / "tensorboard").iterdir())) == 1

    with open(run / "ranks" / f"rank_{SLOW:05d}.jsonl", "a") as beyond:  # as a killed run leaves it
        beyond.write('{"round": 6}\n{"rou')
    train_slowly(corpora_root, run, "--run.resume", "auto")
    for rank in (0, 1):
        assert [line["round"] for line in own_lines(run, rank)] == list(range(1, 10))
        assert all(set(KEYS) | {"host", "memory/process_gib"} <= {*e} for e in own_lines(run, rank))
