"""The scripts of slurm/ without a cluster: what they start, when they requeue, what they refuse.

test_slurm.py has them on a real one.
"""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from stand_in_slurm import Job, option, status, submit

from mtl_dist.config import load_config

SCRIPTS = sorted((tiny.REPOSITORY / "slurm").iterdir())
ELEMENT = {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_MIN": "0"}
GRID = ["--recipes", "demo,sample", "--seeds", "0,1"]


@pytest.mark.parametrize(
    "script", [*SCRIPTS, tiny.REPOSITORY / ".ci/run"], ids=lambda path: path.name
)
@pytest.mark.parametrize(
    "checker", [["bash", "-n"], ["shellcheck", "--external-sources"]], ids=" ".join
)
def test_every_script_is_sound(script, checker):
    checker[0] = (
        str(Path(sys.executable).with_name("shellcheck")) if len(checker[1]) > 2 else "bash"
    )
    done = subprocess.run(
        [*checker, str(script)], cwd=tiny.REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_process_on_every_gpu_of_every_node(tmp_path):
    job = submit(tmp_path, "train.sbatch", SLURM_GPUS_ON_NODE="8", SLURM_CPUS_PER_TASK="64")
    assert option(job, "--config_file").endswith("/launch_configs/several_nodes.yaml")
    assert (option(job, "--num_machines"), option(job, "--num_processes")) == ("2", "16")
    assert (option(job, "--main_process_ip"), option(job, "--main_process_port")) == (
        "node7",
        "23456",
    )
    assert "OMP_NUM_THREADS=8\n" in job.environment
    assert "CUDA_VISIBLE_DEVICES=\n" not in job.environment
    assert "--cpus-per-task=64" in job.started


def test_one_process_a_node_and_no_gpu_where_the_job_has_none(tmp_path):
    job = submit(tmp_path, "train.sbatch", SLURM_CPUS_PER_TASK="4")
    assert option(job, "--config_file").endswith("/launch_configs/two_cpu_processes.yaml")
    assert (option(job, "--num_machines"), option(job, "--num_processes")) == ("2", "2")
    assert "OMP_NUM_THREADS=4\n" in job.environment
    assert "CUDA_VISIBLE_DEVICES=\n" in job.environment


def test_launch_file_processes_and_options_are_the_users_choice(tmp_path):
    choice = {"MTL_DIST_LAUNCH": "all_gpus", "MTL_DIST_PROCESSES_PER_NODE": "3"}
    job = submit(
        tmp_path, "train.sbatch", MTL_DIST_LAUNCH_OPTIONS="--mixed_precision fp16", **choice
    )
    assert option(job, "--config_file").endswith("/launch_configs/all_gpus.yaml")
    assert (option(job, "--num_processes"), option(job, "--mixed_precision")) == ("6", "fp16")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"MTL_DIST_LAUNCH": "none_such"}, "MTL_DIST_LAUNCH: .*none_such.yaml is not there"),
        ({"MTL_DIST_PROCESSES_PER_NODE": "all"}, "MTL_DIST_PROCESSES_PER_NODE: all is not"),
        (
            {"MTL_DIST_HOME": "/tmp"},
            "no slurm/cluster.sh in /tmp: submit from the project's folder",
        ),
    ],
)
def test_a_wrong_setting_is_named_and_nothing_is_started(tmp_path, wrong, message):
    job = submit(tmp_path, "train.sbatch", **wrong)
    assert (job.code, job.started) == (2, None)
    assert re.search(f"error: .*{message}", job.text)


@pytest.mark.parametrize(
    ("words", "run"),
    [
        ([], "runs/named-123456"),
        (["--run.dir", "runs/a b"], "runs/a b"),
        (["--run.dir=runs/c", "--train.tasks", "[audio_tagging, next_step]"], "runs/c"),
    ],
)
def test_words_are_passed_on_and_the_run_folder_is_the_jobs_or_the_users(tmp_path, words, run):
    job = submit(tmp_path, "train.sbatch", *words)
    place = job.started.index(str(tiny.REPOSITORY / "mtl_dist/train.py"))
    assert job.started[place + 1 :] == [*words, "--run.dir", run, "--run.resume", "auto"]


@pytest.mark.parametrize(
    ("after", "code"),
    [
        (status("finished", 100), 0),
        (status("failed", 50), 1),
        (status("stopped", 50), 0),  # by train.stop_after_rounds
        (status("stopped", 50, "SIGINT"), 1),
        (None, 1),  # never begun: a mistake in the words
    ],
)
def test_a_run_that_is_done_failed_or_told_to_stop_is_not_requeued(tmp_path, after, code):
    job = submit(tmp_path, "train.sbatch", "--run.dir", "runs/given", after=after, code=code)
    assert (job.requeued, job.code) == (None, code), job.text


@pytest.mark.parametrize(
    "after", [("stopped", 50, "SIGUSR1"), ("stopped", 50, "SIGTERM"), ("running", 50)]
)
@pytest.mark.parametrize("began", [None, 49])
def test_a_run_that_was_stopped_or_killed_is_requeued_if_it_got_on(tmp_path, after, began):
    before = None if began is None else status("stopped", began, "SIGUSR1")
    words = ["--run.dir", "runs/given"]
    job = submit(tmp_path, "train.sbatch", *words, before=before, after=status(*after), code=1)
    assert (job.requeued, job.code) == ("123456\n", 0), job.text


@pytest.mark.parametrize("after", [None, ("running", 50), ("stopped", 50, "SIGUSR1")])
def test_a_run_that_did_not_get_on_is_not_requeued(tmp_path, after):
    """None: a mistake in the words, seen before the status of the last time was written anew."""
    before, after = status("stopped", 50, "SIGUSR1"), after and status(*after)
    words = ["--run.dir", "runs/given"]
    job = submit(tmp_path, "train.sbatch", *words, before=before, after=after, code=1)
    assert (job.requeued, job.code) == (None, 2)
    assert "error: no progress since round 50: the job is not requeued" in job.text


def sweep(folder: Path, element: int, *words, array: int = 4, **more) -> Job:
    place = {"SLURM_ARRAY_TASK_ID": str(element), "SLURM_ARRAY_TASK_MAX": str(array - 1)}
    place |= ELEMENT | {"SLURM_ARRAY_TASK_COUNT": str(array)}
    return submit(folder, "sweep.sbatch", *words, **more, **place)


def test_a_sweep_trains_every_recipe_with_every_seed_in_a_folder_of_its_own(tmp_path):
    seen = []
    for element in range(4):
        job = sweep(tmp_path, element, *GRID, "--train.rounds", "7")
        assert option(job, "--train.rounds") == "7"
        seen.append([option(job, name) for name in ("--config", "--run.seed", "--run.dir")])
    assert seen == [
        [recipe, seed, f"runs/sweep-named/{recipe}_seed{seed}"]
        for recipe in ("demo", "sample")
        for seed in ("0", "1")
    ]


def test_a_sweep_skips_what_is_finished_and_requeues_an_element_alone(tmp_path):
    run = "runs/sweep-named/sample_seed0"
    job = sweep(
        tmp_path, 2, *GRID, run=run, before=status("stopped", 5), after=status("running", 9)
    )
    assert job.requeued == "77_2\n"
    (tmp_path / "stub/words").unlink()
    (tmp_path / run / "status.json").write_text(json.dumps(status("finished", 100)))
    job = sweep(tmp_path, 2, *GRID)
    assert (job.code, job.started) == (0, None)
    assert f"{run} is finished: skipped" in job.text


@pytest.mark.parametrize(
    ("words", "array", "message"),
    [
        (GRID, 3, "2 recipes x 2 seeds want sbatch --array=0-3; this array has 0 to 2, 3 elements"),
        (GRID, 5, "2 recipes x 2 seeds want sbatch --array=0-3; this array has 0 to 4, 5 elements"),
        (["--recipes", "demo"], 4, "name recipes and seeds"),
        (
            ["--recipes", "a/x.yaml,b/x", "--seeds", "0"],
            2,
            "these recipes or seeds would train in the same folder: x",
        ),
        ([*GRID, "--run.seed=3"], 4, "--run.seed=3: a sweep sets it itself"),
    ],
)
def test_a_sweep_that_does_not_fit_is_refused(tmp_path, words, array, message):
    job = sweep(tmp_path, 0, *words, array=array)
    assert (job.code, job.started) == (2, None)
    assert f"error: {message}" in job.text


def test_the_commands_of_the_readme_start_what_they_say(tmp_path):
    text = (tiny.REPOSITORY / "README.md").read_text(encoding="utf-8")
    commands = [shlex.split(line) for line in re.findall(r"^sbatch .*", text, re.MULTILINE)]
    assert {Path(word).name for words in commands for word in words} >= {
        "train.sbatch",
        "sweep.sbatch",
    }
    for command in commands:
        place = next(n for n, word in enumerate(command) if word.endswith(".sbatch"))
        if command[place] == "slurm/sweep.sbatch":
            (last,) = re.findall(r"--array=0-(\d+)", " ".join(command))
            job = sweep(tmp_path, int(last), *command[place + 1 :], array=int(last) + 1)
        else:
            job = submit(tmp_path, "train.sbatch", *command[place + 1 :])
        assert job.code == 0, job.text
        words = job.started[job.started.index(str(tiny.REPOSITORY / "mtl_dist/train.py")) + 1 :]
        load_config(words)
