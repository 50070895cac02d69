"""Every launch file is launched for real, as far as this machine allows."""

import json
import os
import socket
import subprocess
import sys

import pytest
import tiny
import torch
import worlds
import yaml
from accelerate.commands.config.config_args import ClusterConfig
from entry import entries
from safetensors.torch import load_file

FILES = sorted((tiny.REPOSITORY / "launch_configs").glob("*.yaml"))
ENTRY = "mtl_dist/train.py"
LAUNCH = ("-m", "accelerate.commands.launch")
LIMIT = 280.0
"""Seconds a launch may take: about 15 on an idle core, many times that on a busy one."""

ZERO = ("zero1", "zero2", "zero3")
TASKS = ("audio_tagging", "next_step", "noise_reduction", "upsampling")
pytestmark = pytest.mark.timeout(2 * LIMIT + 60)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


def launch_words(file: str, *options: str) -> list[str]:
    return [*LAUNCH, "--config_file", f"launch_configs/{file}.yaml", *options, ENTRY]


def words(corpora, run, *more: str) -> list[str]:
    """A run of all four tasks that ends with a checkpoint after round 4."""
    return tiny.tiny_words(corpora, "--run.dir", str(run), *more)


def launch(file: str, *options: str, run: list[str]):
    """Launch the entry with a launch file, with time for a busy machine."""
    return tiny.run_process([*launch_words(file, *options), *run], timeout=LIMIT)


def end_of(run) -> dict[str, torch.Tensor]:
    return load_file(run / "checkpoints" / "round_00000004" / "model.safetensors")


def assert_equal_weights(found: dict, expected: dict) -> None:
    """Compare every tensor to 1e-5 relative to its norm."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert (found[name] - tensor).norm() <= 1e-5 * tensor.norm(), name


def assert_equal_results(run, other) -> None:
    """Compare the scores of the test side."""
    results = [json.loads((f / "results.json").read_text()) for f in (run, other)]
    for task, numbers in results[1]["test"].items():
        assert results[0]["test"][task] == pytest.approx(numbers, rel=1e-3), task


@pytest.fixture(scope="module")
def one_process(corpora_root, tmp_path_factory):
    """What launch_configs/one_cpu.yaml printed, and its run folder."""
    run = tmp_path_factory.mktemp("one") / "run"
    ended = launch("one_cpu", run=words(corpora_root, run))
    assert ended.returncode == 0, ended.stderr
    return ended, run


@pytest.fixture(scope="module")
def two_processes(corpora_root, tmp_path_factory):
    """What launch_configs/two_cpu_processes.yaml printed, and its run folder."""
    run = tmp_path_factory.mktemp("two") / "run"
    ended = launch("two_cpu_processes", run=words(corpora_root, run))
    assert ended.returncode == 0, ended.stderr
    return ended, run


@pytest.mark.parametrize("file", FILES, ids=lambda path: path.stem)
def test_every_field_of_a_launch_file_is_known_to_accelerate_and_its_command_names_it(file):
    config = ClusterConfig.from_yaml_file(yaml_file=str(file))
    assert vars(config).items() >= yaml.safe_load(file.read_text()).items()
    text = file.read_text()
    assert text.startswith("# ")
    assert f"--config_file launch_configs/{file.name}" in text


def test_there_is_a_launch_file_for_every_engine_and_place():
    names = {path.stem for path in FILES}
    places = {"two_cpu_processes", "all_gpus", "several_nodes"}
    engines = {f"{engine}_{place}" for engine in ("fsdp2", *ZERO) for place in places}
    assert names == {"one_cpu", "one_gpu", *places, *engines}


@pytest.mark.slow
def test_one_cpu_trains_one_process(one_process):
    ended, run = one_process
    assert "one process, 1 processes on cpu, precision no" in ended.stderr
    assert "global batch 4 = 1 ranks x 4 x 1; 4 rounds" in ended.stderr
    assert (run / "results.json").is_file()


@pytest.mark.slow
def test_two_cpu_processes_train_together_and_both_ranks_clips_are_used(two_processes, one_process):
    ended, run = two_processes
    assert "DDP, 2 processes on cpu, precision no" in ended.stderr
    assert "global batch 4 = 2 ranks x 2 x 1; 4 rounds" in ended.stderr
    losses = [
        [[entry[f"loss/{task}"] for task in TASKS] for entry in entries(folder, "round")]
        for folder in (run, one_process[1])
    ]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-7)


@pytest.mark.slow
def test_the_final_weights_of_two_processes_are_those_of_one(two_processes, one_process):
    assert_equal_weights(end_of(two_processes[1]), end_of(one_process[1]))


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("fsdp2", marks=pytest.mark.slow),
        *(pytest.param(name, marks=pytest.mark.deepspeed) for name in ("zero1", "zero3")),
    ],
)
def test_an_engines_launch_file_trains_it_and_its_weights_are_those_of_one_process(
    corpora_root, tmp_path, one_process, engine
):
    run = tmp_path / "run"
    if engine == "zero1":  # launched like zero3; ZeRO-2 trains below
        ended = worlds.launch(f"{engine}_two_cpu_processes", ENTRY, *words(corpora_root, run))
    else:
        ended = launch(f"{engine}_two_cpu_processes", run=words(corpora_root, run))
    assert ended.returncode == 0, ended.stderr
    name = engine.upper().replace("ZERO", "ZeRO-")
    assert f"{name}, 2 processes on cpu, precision no, round_robin" in ended.stderr
    assert_equal_weights(end_of(run), end_of(one_process[1]))
    assert_equal_results(run, one_process[1])


@pytest.mark.slow
def test_several_nodes_are_as_many_launchers_that_train_one_model(
    corpora_root, tmp_path, one_process
):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    launchers = []
    for rank in ("0", "1"):
        options = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", rank]
        options += ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
        options += ["--mixed_precision", "no"]
        launchers.append(
            subprocess.Popen(
                [
                    sys.executable,
                    *launch_words("several_nodes", *options),
                    *words(corpora_root, tmp_path / "run"),
                ],
                cwd=tiny.REPOSITORY,
                env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
                stderr=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                text=True,
            )
        )
    try:
        texts = [launcher.communicate(timeout=LIMIT)[1] for launcher in launchers]
    finally:
        for launcher in launchers:
            launcher.kill()
    assert [launcher.returncode for launcher in launchers] == [0, 0], texts
    assert "global batch 4 = 2 ranks x 2 x 1; 4 rounds" in texts[0]
    assert_equal_weights(end_of(tmp_path / "run"), end_of(one_process[1]))


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero2", marks=pytest.mark.deepspeed),
    ],
)
def test_an_engines_file_for_several_nodes_trains_one_model(
    corpora_root, tmp_path, one_process, engine
):
    """Two nodes of one rank each, as their launchers would start them (the test above starts launchers)."""
    options = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", "0"]
    options += ["--main_process_ip", "127.0.0.1", "--mixed_precision", "no", ENTRY]
    ended = worlds.launch(
        f"{engine}_several_nodes",
        *options,
        *words(corpora_root, tmp_path / "run"),
        ACCELERATE_USE_CPU="true",
    )
    assert ended.returncode == 0, ended.stderr
    name = engine.upper().replace("ZERO", "ZeRO-")
    assert f"{name}, 2 processes on cpu, precision no" in ended.stderr
    assert "global batch 4 = 2 ranks x 2 x 1; 4 rounds" in ended.stderr
    assert_equal_weights(end_of(tmp_path / "run"), end_of(one_process[1]))
    assert_equal_results(tmp_path / "run", one_process[1])


@needs_gpu
@pytest.mark.slow
@pytest.mark.parametrize("file", ["one_gpu", "all_gpus"])
def test_the_gpu_files_train_in_bf16_on_the_gpus_that_are_there(corpora_root, tmp_path, file):
    count = 1 if file == "one_gpu" else torch.cuda.device_count()
    run = words(corpora_root, tmp_path / "run", "--train.global_batch", str(2 * count))
    ended = launch(file, "--num_processes", str(count), run=run)
    assert ended.returncode == 0, ended.stderr
    assert f"{count} processes on cuda, precision bf16" in ended.stderr


@pytest.mark.slow
def test_bf16_trains_on_a_cpu_and_its_losses_are_near_those_of_fp32(
    corpora_root, tmp_path, one_process
):
    run = words(corpora_root, tmp_path / "run")
    ended = worlds.launch("one_cpu", "--mixed_precision", "bf16", ENTRY, *run)
    assert ended.returncode == 0, ended.stderr
    assert "precision bf16" in ended.stderr
    first, truth = (entries(run, "round")[0] for run in (tmp_path / "run", one_process[1]))
    assert first["loss/total"] != truth["loss/total"]
    assert first["loss/total"] == pytest.approx(truth["loss/total"], rel=0.03)


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param("fsdp2", marks=pytest.mark.slow),
        pytest.param("zero3", marks=pytest.mark.deepspeed),
    ],
)
def test_bf16_on_an_engine_is_autocast_as_on_one_process(
    corpora_root, tmp_path, one_process, engine
):
    run = words(corpora_root, tmp_path / "run")
    ended = worlds.launch(f"{engine}_two_cpu_processes", "--mixed_precision", "bf16", ENTRY, *run)
    assert ended.returncode == 0, ended.stderr
    assert "precision bf16" in ended.stderr
    found, truth = (entries(run, "round") for run in (tmp_path / "run", one_process[1]))
    for ours, theirs in zip(found, truth, strict=True):
        assert ours["loss/total"] != theirs["loss/total"]
        assert ours["loss/total"] == pytest.approx(theirs["loss/total"], rel=0.03)
