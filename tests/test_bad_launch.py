"""Launches that cannot work: a clear error, once, a quick end of all processes, and no run folder."""

import importlib.util
import os
import platform

import pytest
import tiny
import torch
import worlds
from accelerate.state import AcceleratorState, PartialState
from entry import enter, refused
from test_launch import ENTRY, LAUNCH, LIMIT, words

from mtl_dist.runtime import LaunchError, start

MACHINES = "--num_machines 2 --num_processes 2 --machine_rank 0 --main_process_ip 127.0.0.1".split()
pytestmark = pytest.mark.timeout(2 * LIMIT)


@pytest.fixture
def fresh_state():
    """Let Accelerator be created anew; forget it afterwards, and the environment that it wrote."""
    environment = dict(os.environ)
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    os.environ.clear()
    os.environ.update(environment)


@pytest.mark.skipif(torch.cuda.is_available(), reason="fp16 works on this machine's GPU")
def test_fp16_on_a_cpu_is_refused(fresh_state, corpora_root, tmp_path):
    error = refused(*words(corpora_root, tmp_path / "run", "--train.mixed_precision", "fp16"))
    assert "fp16 is not to be had on a CPU; use --mixed_precision bf16 or no" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment", [{}, {"RANK": "0", "LOCAL_RANK": "0"}])
def test_a_world_of_which_nobody_says_where_it_meets_is_refused(
    fresh_state, monkeypatch, environment, corpora_root, tmp_path
):
    for name, value in ({"WORLD_SIZE": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    error = refused(*words(corpora_root, tmp_path / "run"))
    assert "MASTER_ADDR" in error
    assert "WORLD_SIZE 2" in error
    assert not (tmp_path / "run").exists()


def test_processes_that_have_not_found_each_other_are_refused(fresh_state, monkeypatch):
    PartialState(cpu=True)  # a process that believes it is alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match=r"started 2 processes, but this one found 1: .*two_cpu"):
        start("no")


@pytest.mark.slow
@pytest.mark.parametrize("asked", [["--num_processes", "2"], MACHINES])
def test_a_launcher_that_starts_one_process_where_two_were_asked_for_is_refused(
    tmp_path, corpora_root, asked
):
    run = words(corpora_root, tmp_path / "run")
    options = ["--cpu", *asked, "--mixed_precision", "no", "--main_process_port", "29999"]
    ended = tiny.run_process([*LAUNCH, *options, ENTRY, *run], timeout=LIMIT)
    assert ended.returncode != 0
    assert "error: the launcher was asked for several processes and started one" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_that_only_the_first_rank_can_see_ends_both_with_one_message(
    tmp_path, corpora_root
):
    (tmp_path / "file").write_text("in the way")
    ended = worlds.launch("two_cpu_processes", ENTRY, *words(corpora_root, tmp_path / "file"))
    assert ended.returncode != 0
    assert ended.stderr.count("error: run.dir: ") == 1
    assert "[rank" not in ended.stderr  # torch's mark of a traceback


@pytest.mark.slow
def test_a_missing_corpus_ends_both_ranks_with_one_message(tmp_path, corpora_root):
    missing = ["--corpora.fsdkaggle2018.root", str(tmp_path / "nowhere")]
    run = words(corpora_root, tmp_path / "run", *missing)
    ended = worlds.launch("two_cpu_processes", ENTRY, *run)
    assert ended.returncode != 0
    assert ended.stderr.count("error: corpora.fsdkaggle2018.root: ") == 1
    assert "[rank" not in ended.stderr


@pytest.mark.slow
def test_a_rank_that_cannot_see_the_data_ends_all_with_one_message_that_names_its_node(
    tmp_path, corpora_root
):
    hidden = str(corpora_root / "LibriSpeech")
    ended = worlds.launch(
        "two_cpu_processes",
        "tests/workers/blind_rank.py",
        hidden,
        *words(corpora_root, tmp_path / "run"),
    )
    assert ended.returncode != 0
    assert ended.stderr.count("error: ") == 1
    assert f"error: on {platform.node()}: corpora.librispeech: {hidden}/" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("package", ["deepspeed", "transformers"])
def test_an_engine_without_its_package_is_refused(
    fresh_state, monkeypatch, corpora_root, tmp_path, package
):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    there = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *p: None if name == package else there(name, *p)
    )
    error = refused(*words(corpora_root, tmp_path / "run"))
    assert f"DeepSpeed needs the packages {package}: pip install 'mtl_dist[deepspeed]'" in error
    assert not (tmp_path / "run").exists()


def test_fsdp_1_is_refused(fresh_state, monkeypatch, corpora_root, tmp_path):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    error = refused(*words(corpora_root, tmp_path / "run"))
    assert "set fsdp_version: 2 in the launch file" in error


@pytest.mark.slow
def test_a_run_of_another_model_is_refused_by_all_ranks_with_one_message(corpora_root, tmp_path):
    run = words(corpora_root, tmp_path / "run", "--train.rounds", "1")
    assert enter(*run).code == 0
    wider = [*run, "--model.channels", "6", "--run.resume", "auto"]
    ended = worlds.launch("fsdp2_two_cpu_processes", ENTRY, *wider)
    assert ended.returncode != 0
    assert ended.stderr.count("error: ") == 1, ended.stderr
    assert "holds a run of another configuration (model.channels: 4 -> 6)" in ended.stderr
    assert "Traceback" not in ended.stderr
