"""`mtl-dist doctor` finds what is made wrong on purpose, names it, and exits non-zero on every rank."""

import os
import shutil
import socket
import types

import pytest
import tiny
import worlds

from mtl_dist import cli, doctor, health
from mtl_dist.config import load_config
from mtl_dist.health import FAIL, OK, WARN, Finding

WORKER = "tests/workers/doctor_worker.py"


def words(corpora, folder, *more: str) -> list[str]:
    return tiny.tiny_words(corpora, "--run.dir", str(folder / "run"), *more)


def verdicts(text: str) -> dict[str, str]:
    """Return {check: verdict} of a printed table."""
    lines = [line for line in text.splitlines() if any(v in line.split() for v in (OK, WARN, FAIL))]
    return {
        line.split("  ")[0]: next(v for v in (FAIL, WARN, OK) if v in line.split())
        for line in lines
    }


def test_alone_every_local_check_is_made_and_nothing_is_left_behind(corpora_root, tmp_path, capsys):
    cli.main(["doctor", *words(corpora_root, tmp_path)])
    found = verdicts(capsys.readouterr().out)
    assert {"versions", "devices", "cores", "shared memory", "run folder"} <= set(found)
    assert {"data: fsdkaggle2018", "data: librispeech", "data: chime3"} <= set(found)
    assert FAIL not in found.values()
    assert list(tmp_path.iterdir()) == []


def test_clips_in_shards_are_heard_and_a_shard_that_is_gone_fails(corpora_root, tmp_path):
    cli.main(["prepare", "chime3", str(corpora_root / "CHiME3"), str(tmp_path / "shards")])
    told = ["--train.tasks", "[noise_reduction]", "--train.main_task", "noise_reduction"]
    told += ["--corpora.chime3.root", str(tmp_path / "shards")]
    config = load_config(words(corpora_root, tmp_path, *told))
    assert {f.check: f.verdict for f in health.data(config)}["data: chime3"] == OK
    for shard in (tmp_path / "shards").glob("*.parquet"):
        shard.write_bytes(b"PAR1")
    assert {f.check: f.verdict for f in health.data(config)}["data: chime3"] == FAIL


def test_a_file_that_cannot_be_decoded_fails_and_is_named(corpora_root, tmp_path, capsys):
    copy = tmp_path / "chime3"
    shutil.copytree(corpora_root / "CHiME3", copy)
    broken = list(copy.rglob("BGD_*"))  # whichever is tried
    for path in broken:
        path.write_bytes(b"no audio")
    with pytest.raises(SystemExit) as stop:
        cli.main(["doctor", *words(corpora_root, tmp_path, "--corpora.chime3.root", str(copy))])
    printed = capsys.readouterr().out
    assert stop.value.code == 1
    assert any(str(path) in printed for path in broken)
    assert {check for check, verdict in verdicts(printed).items() if verdict == FAIL} == {
        "data: chime3"
    }


def test_what_a_machine_lacks_is_found(monkeypatch, corpora_root, tmp_path):
    config = load_config(words(corpora_root, tmp_path))
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(4)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert [health.cores(wanted, 4).verdict for wanted in (4, 5)] == [OK, WARN]
    assert health.cores(10, 5).verdict == FAIL
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "2")
    assert health.cores(4, 4).verdict == FAIL
    usage = types.SimpleNamespace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert [health.shared_memory(n).verdict for n in (1000, 1001)] == [OK, FAIL]
    keep = config.train.keep_checkpoints
    sizes = (1000 // (keep + 2), 400, 501)
    assert [health.run_folder(config, n).verdict for n in sizes] == [OK, WARN, FAIL]


def test_a_package_older_than_asked_for_fails(monkeypatch):
    assert health.versions().verdict == OK
    real = health.importlib.metadata.version
    monkeypatch.setattr(
        health.importlib.metadata, "version", lambda n: "1.0" if n == "torch" else real(n)
    )
    found = health.versions()
    assert found.verdict == FAIL
    assert "torch 1.0, not >=2.6" in found.value


def test_the_worst_of_all_ranks_is_reported():
    told = [
        ("a", Finding("x", "1")),
        ("b", Finding("x", "2", FAIL)),
        ("c", Finding("x", "3", WARN)),
    ]
    assert doctor.report(told).splitlines()[-1].split() == ["x", "b", "2", "FAIL"]


@pytest.mark.slow
@pytest.mark.parametrize(("ahead", "verdict"), [(0.0, OK), (-5.0, WARN), (100.0, FAIL)])
def test_two_ranks_measure_what_lies_between_them_and_the_skew_of_a_clock(
    corpora_root, tmp_path, ahead, verdict
):
    done = worlds.launch("two_cpu_processes", WORKER, str(ahead), *words(corpora_root, tmp_path))
    found = verdicts(done.stdout)
    assert {"world", "shared run folder", "round-trip", "bandwidth"} <= set(found), done.stderr
    assert found["clock"] == verdict
    assert (done.returncode == 0) == (verdict != FAIL)
    if verdict != OK:
        line = next(line for line in done.stdout.splitlines() if line.startswith("clock"))
        assert "rank 1" in line
        assert float(line.split("  s against")[0].split(" s against")[0].split()[-1]) == (
            pytest.approx(ahead, abs=0.5)
        )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_corpus_that_is_not_there_ends_all_ranks_with_its_name(corpora_root, tmp_path):
    lost = str(tmp_path / "lost")
    done = worlds.launch(
        "two_cpu_processes",
        WORKER,
        "0",
        *words(corpora_root, tmp_path, "--corpora.librispeech.root", lost),
    )
    assert done.returncode != 0
    assert verdicts(done.stdout)["data: librispeech"] == FAIL
    assert lost in done.stdout


@pytest.mark.slow
def test_a_rank_whose_others_never_come_says_so_and_ends(corpora_root, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    done = worlds.run(
        *["-m", "mtl_dist.cli", "doctor", "--timeout", "5", *words(corpora_root, tmp_path)],
        timeout=120,
        RANK="0",
        LOCAL_RANK="0",
        **world,
    )
    assert done.returncode == 1
    assert f"the ranks have not met at 127.0.0.1:{port} within 5 s" in done.stderr
    assert "data: chime3" in done.stderr


def test_tasks_of_an_srun_find_each_other(monkeypatch):
    listed = types.SimpleNamespace(stdout="node1\nnode2\n")
    monkeypatch.setattr(doctor.subprocess, "run", lambda *a, **k: listed)
    step = {"SLURM_JOB_ID": "8", "SLURM_STEP_ID": "1", "SLURM_STEP_NUM_TASKS": "2"}
    step |= {"SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_STEP_NODELIST": "node[1-2]"}
    one, other = dict(step), step | {"SLURM_PROCID": "0"}
    assert doctor.join_slurm(one)
    assert doctor.join_slurm(other)
    assert (one["RANK"], one["WORLD_SIZE"], one["MASTER_ADDR"]) == ("1", "2", "node1")
    assert one["MASTER_PORT"] == other["MASTER_PORT"]
    assert not doctor.join_slurm({"SLURM_JOB_ID": "8", "SLURM_NTASKS": "2"})
    assert not doctor.join_slurm(step | {"MASTER_ADDR": "node1"})
