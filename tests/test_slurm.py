"""The scripts of slurm/ on a real cluster of two nodes, with either way in which SLURM finds the processes of a job.

The cluster is a local one (local_slurm.py) or, where no script starts one, any that answers scontrol: then run pytest with a
--basetemp on a disk that its nodes share.
"""

import datetime
import json
import os
import re
import shlex
import subprocess
import time
from pathlib import Path

import pytest
import tiny
import torch
from local_slurm import Cluster, bring_up, start_script
from safetensors.torch import load_file

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(1200)]
ALL = os.environ.get("MTL_DIST_SLURM") == "all"
"""All of them take over 20 minutes, most of it waiting; without it those that stay under five are run."""

ROUNDS = 110
PACED = ["--run.plugins", f"[{tiny.REPOSITORY / 'tests/workers/at_a_pace.py'}]"]
"""110 rounds at 0.5 s outlast the signal of a time limit of 1 minute, which comes 20 to 50 s after a job's start."""


@pytest.fixture(scope="module", params=["linuxproc", "cgroup"])
def cluster(request, tmp_path_factory):
    """A cluster of which ProctrackType is the parameter; stopped again if it was started here."""
    if request.param == "cgroup" and not ALL:
        pytest.skip("the same tests as under linuxproc; MTL_DIST_SLURM=all runs them too")
    script, began = start_script(), datetime.datetime.now().replace(microsecond=0)
    if script and request.param == "cgroup" and not Path("/sys/fs/cgroup/freezer").is_dir():
        pytest.skip("this machine has no freezer of cgroup v1, which the local cluster wants")
    cluster = bring_up(script, request.param) if script else Cluster(dict(os.environ))
    found = cluster.setting("ProctrackType")
    if found is None:
        pytest.skip(
            "no cluster answers scontrol, and MTL_DIST_LOCAL_SLURM names no script that starts one"
        )
    if found != f"proctrack/{request.param}":
        pytest.skip(f"the cluster that is up already has {found}, not {request.param}")
    cluster.folder = tmp_path_factory.mktemp("slurm")
    yield cluster
    if script and datetime.datetime.fromisoformat(cluster.setting("BOOT_TIME")) >= began:
        subprocess.run([script.with_name("stop.sh")], check=True, capture_output=True)


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    return tiny.write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="module")
def two_on_a_node(cluster, corpora):
    """(log, metrics) of 40 rounds of two processes on one node with two GPUs, by a launch file for CPUs."""
    words = tiny.tiny_words(corpora, "--run.dir", f"{cluster.folder}/node", "--train.rounds", "40")
    options = ["--gpus-per-node=2"]
    job = cluster.submit("train.sbatch", options, words, MTL_DIST_LAUNCH="two_cpu_processes")
    cluster.finish(job)
    return cluster.log(job), entries(cluster.folder / "node")


@pytest.fixture(scope="module")
def words(corpora):
    lengths = ["--train.rounds", str(ROUNDS), "--train.validate_every", str(ROUNDS)]
    often = ["--train.log_every", "10", "--train.checkpoint_every", "10"]
    return tiny.tiny_words(corpora, *lengths, *often)


@pytest.fixture(scope="module")
def whole(cluster, words):
    """(job, log, run folder) of an uninterrupted run on two nodes."""
    run = cluster.folder / "whole"
    job = cluster.submit("train.sbatch", ["--nodes=2"], [*words, "--run.dir", str(run)])
    return cluster.finish(job), cluster.log(job), run


def entries(run: Path) -> list[dict]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "round"]


def status(run: Path) -> dict:
    path = run / "status.json"
    return json.loads(path.read_text()) if path.exists() else {"state": "none", "round": 0}


def assert_ended_alike(run: Path, whole: Path) -> None:
    """Bit for bit the parameters of the uninterrupted run, which are not those of its beginning, and the same curve."""
    assert status(run) == status(whole)
    last = f"checkpoints/round_{status(run)['round']:08d}/model.safetensors"
    ours, theirs = load_file(run / last), load_file(whole / last)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    curves = [[(e["round"], e["loss/total"]) for e in entries(folder)] for folder in (run, whole)]
    assert curves[0] == curves[1]
    assert curves[0][-1][1] != curves[0][0][1]


def test_a_job_starts_a_process_on_every_gpu_of_its_node(two_on_a_node):
    log, _ = two_on_a_node
    assert "1 nodes x 2 processes by " in log
    assert "global batch 4 = 2 ranks x 2 x 1; 40 rounds" in log


def test_two_nodes_train_one_model_to_the_end(whole):
    job, log, run = whole
    assert (job["NumNodes"], job["Restarts"], job["ExitCode"]) == ("2", "0", "0:0")
    assert "2 nodes x 1 processes by " in log
    assert "2 processes on cpu" in log
    assert "global batch 4 = 2 ranks x 2 x 1" in log
    assert status(run)["state"] == "finished"
    assert (run / "results.json").is_file()


def test_a_job_over_its_time_limit_is_requeued_and_ends_as_if_uninterrupted(cluster, words, whole):
    run = cluster.folder / "limited"
    options = ["--nodes=2", "--time=1", "--signal=B:USR1@10"]
    job = cluster.submit("train.sbatch", options, [*words, *PACED, "--run.dir", str(run)])
    cluster.wait(job, "was not requeued", Restarts="1")
    if os.geteuid() == 0:  # an administrator may give it more time, so that one more turn is enough
        cluster.call("scontrol", "update", f"jobid={job}", "TimeLimit=30")
    restarts = int(cluster.finish(job)["Restarts"])
    log = cluster.log(job)
    assert restarts >= 1
    assert log.count("stopped after round") == log.count("goes on from") == restarts
    assert_ended_alike(run, whole[2])


@pytest.mark.skipif(not ALL, reason="takes minutes; MTL_DIST_SLURM=all runs it")
def test_requeued_signalled_cancelled_and_submitted_again_a_run_ends_as_if_uninterrupted(
    cluster, words, whole
):
    run = cluster.folder / "interrupted"
    words = [*words, *PACED, "--run.dir", str(run)]
    job, before = cluster.submit("train.sbatch", ["--nodes=2"], words), 0

    def interrupt(*command: str) -> None:
        """Interrupt the run once it has got on; it saves the round that it is at."""
        nonlocal before
        cluster.wait(job, "does not run", JobState="RUNNING")
        for _ in range(1200):
            if status(run)["round"] > before:
                break
            time.sleep(0.1)
        cluster.call(*command, job)
        cluster.wait(
            job, "still runs", JobState="CANCELLED" if command == ("scancel",) else "PENDING"
        )
        assert status(run)["state"] == "stopped", cluster.log(job)
        assert before < status(run)["round"] < status(whole[2])["round"]
        before = status(run)["round"]

    interrupt("scontrol", "requeue")
    interrupt("scancel", "--signal=USR1")
    assert cluster.job(job)["Restarts"] == "2"
    cluster.call("scontrol", "update", f"jobid={job}", "StartTime=now")
    interrupt("scancel")
    job = cluster.submit("train.sbatch", ["--nodes=2"], words)
    cluster.finish(job)
    assert f"round_{before:08d} (round {before})" in cluster.log(job)
    assert_ended_alike(run, whole[2])


def test_an_array_of_four_trains_recipes_by_seeds_and_again_only_what_is_missing(cluster, corpora):
    recipe = (tiny.REPOSITORY / "tests/tiny.yaml").read_text()
    for name, text in {"four": recipe, "three": recipe.replace("layers: 3", "layers: 2")}.items():
        (cluster.folder / f"{name}.yaml").write_text(text)
    grid = [
        "--recipes",
        f"{cluster.folder}/four.yaml,{cluster.folder}/three.yaml",
        "--seeds",
        "0,1",
    ]
    words = [*grid, *tiny.tiny_words(corpora)[2:]]
    runs = {"MTL_DIST_RUNS": f"{cluster.folder}/runs"}

    def logs() -> list[str]:
        options = ["--array=0-3%2", "--job-name=table", f"--output={cluster.folder}/%A_%a.log"]
        array = cluster.submit("sweep.sbatch", options, words, **runs)
        elements = [f"{array}_{element}" for element in range(4)]
        for element in elements:
            cluster.finish(element)
        return [cluster.log(element) for element in elements]

    assert all("is finished at round 4 (began at 0" in log for log in logs())
    folders = [
        cluster.folder / f"runs/sweep-table/{name}_seed{seed}"
        for name in ("four", "three")
        for seed in "01"
    ]
    ends = [entries(folder)[-1]["loss/total"] for folder in folders]
    assert len(set(ends)) == 4
    os.rename(folders[2], cluster.folder / "moved")
    assert ["is finished: skipped" in log for log in logs()] == [True, True, False, True]
    assert entries(folders[2])[-1]["loss/total"] == ends[2]


def test_sbatch_takes_the_commands_of_the_readme(cluster):
    text = (tiny.REPOSITORY / "README.md").read_text(encoding="utf-8")
    for command in re.findall(r"^sbatch (.*)", text, re.MULTILINE):
        assert "to start at" in cluster.call("sbatch", "--test-only", *shlex.split(command))
