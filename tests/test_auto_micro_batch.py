"""train.micro_batch: auto: the largest that fits and divides, the same on all ranks, and the gradient of any other."""

import math
import re

import pytest
import tiny
import torch
import worlds
from accelerate import Accelerator
from entry import enter, entries, refused, tagging_words
from test_planning import plan

from mtl_dist.config import load_config
from mtl_dist.device_memory import bytes_for_tensors, left_in_control_groups
from mtl_dist.experiment import build_experiment, plan_rounds
from mtl_dist.micro_batch import case_here, plan_together
from mtl_dist.phases import Phases

BATCH = 12
PLAIN = ["--model.kernel", "eager", "--memory.recompute", "none"]
AUTO = ["--train.global_batch", str(BATCH), "--train.micro_batch", "auto", *PLAIN]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="this machine has no CUDA GPU")


def experiment_of(corpora, *words: str):
    return build_experiment(load_config(tiny.tiny_words(corpora, *AUTO, *words)))


@pytest.fixture(scope="module")
def needs(corpora_root):
    """{micro-batch: GB of its fullest micro-step}."""
    experiment = experiment_of(corpora_root)
    meter = case_here(Accelerator(cpu=True), experiment, 24).activations
    return {m: meter.micro_step("round_robin", m) / 1e9 for m in (1, 2, 3, 4, 6, 12)}


def between(needs: dict[int, float], low: int, high: int) -> str:
    """Return a budget that does for `low` clips and not for `high`."""
    return str((needs[low] + needs[high]) / 2)


@pytest.mark.parametrize(("low", "high"), [(1, 2), (2, 3), (4, 6), (6, 12)])
def test_the_largest_that_fits_and_divides_is_found_and_planned(
    corpora_root, capsys, needs, low, high
):
    budget = ["--memory.budget_gb", between(needs, low, high)]
    experiment = experiment_of(corpora_root, *budget)
    found = plan_together(Accelerator(cpu=True), experiment, Phases())
    assert (found.micro_batch, found.accumulation) == (low, BATCH // low)
    said = capsys.readouterr().err
    assert re.search(rf"micro_batch {low} \(auto: {low} clips? takes? \S+ GB of \S+ GB on", said)
    assert f"accumulation {BATCH // low})" in said
    words = tiny.tiny_words(corpora_root, *AUTO, *budget, "--train.tasks", "[audio_tagging]")
    code, facts = plan(capsys, "--precision", "no", *words)
    assert (code, facts["micro_batch"]) == (0, low)


def test_without_a_limit_it_is_all_at_once_and_joint_takes_fewer(corpora_root, needs):
    accelerator, joint = Accelerator(cpu=True), ["--train.schedule", "joint"]
    assert plan_together(accelerator, experiment_of(corpora_root), Phases()).micro_batch == BATCH
    budget = ["--memory.budget_gb", between(needs, 4, 6)]
    experiment = experiment_of(corpora_root, *budget, *joint)
    assert plan_together(accelerator, experiment, Phases()).micro_batch < 4


def test_ranks_are_counted_before_anything_is_measured(corpora_root):
    config = experiment_of(corpora_root).config
    assert plan_rounds(config, 24, 2).micro_batch == BATCH // 2
    assert plan_rounds(config, 24, 2, 3).accumulation == 2
    with pytest.raises(ValueError, match="multiple of 5"):
        plan_rounds(config, 24, 5)


def test_losses_are_those_of_one_big_micro_batch_also_when_a_resumed_run_finds_another(
    corpora_root, tmp_path, needs
):
    fixed = [*AUTO[:2], "--run.dir", str(tmp_path / "fixed")]
    assert enter(*tiny.tiny_words(corpora_root, *fixed)).code == 0
    auto = tiny.tiny_words(corpora_root, *AUTO, "--run.dir", str(tmp_path / "auto"))
    parts = [
        (1, 2, ["--train.stop_after_rounds", "2"]),
        (3, 4, ["--run.resume", "auto"]),
    ]
    for low, high, more in parts:
        ended = enter(*auto, *more, "--memory.budget_gb", between(needs, low, high))
        assert ended.code == 0, ended.text
        assert f"global batch {BATCH} = 1 ranks x {low} x {BATCH // low}" in ended.text
    truth, found = (entries(tmp_path / name, "round") for name in ("fixed", "auto"))
    assert [e["round"] for e in found] == [e["round"] for e in truth] == [1, 2, 3, 4]
    losses = [key for key in truth[0] if key.startswith("loss/")]
    assert len(losses) == 5
    for one, other in zip(truth, found, strict=True):
        assert [other[k] for k in losses] == pytest.approx([one[k] for k in losses], rel=1e-6)


def test_two_ranks_agree_on_what_fits_the_smaller(corpora_root, tmp_path, needs):
    budgets = f"1.0,{between(needs, 3, 4)}"
    words = tiny.tiny_words(corpora_root, *AUTO, "--run.dir", str(tmp_path / "run"))
    worker = "tests/workers/uneven_memory.py"
    ended = worlds.launch("two_cpu_processes", worker, budgets, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert (
        len(re.findall(r"micro_batch 3 \(auto: .* on rank 1; accumulation 2\)", ended.stderr)) == 1
    )
    assert f"global batch {BATCH} = 2 ranks x 3 x 2" in ended.stderr


def test_one_rank_without_room_ends_both_with_one_message(corpora_root, tmp_path):
    words = tiny.tiny_words(corpora_root, *AUTO, "--run.dir", str(tmp_path / "run"))
    worker = "tests/workers/uneven_memory.py"
    ended = worlds.launch("two_cpu_processes", worker, "1.0,1e-5", *words)
    assert ended.returncode != 0
    assert ended.stderr.count("error: train.micro_batch: auto finds none on rank 1 (") == 1
    assert "[rank" not in ended.stderr  # torch's mark of a traceback


def test_not_even_one_clip_is_an_error_with_the_arithmetic_and_no_run_folder(
    corpora_root, tmp_path, needs
):
    words = tagging_words(corpora_root, tmp_path / "run", *AUTO)
    error = refused(*words, "--memory.budget_gb", "0.0001")
    assert re.search(r"1 clip takes 0.00\d+ GB, and memory.budget_gb allows 0.0001 GB; use", error)
    assert "memory.slice_seconds" in error
    assert not (tmp_path / "run").exists()


def test_a_budget_that_a_fixed_micro_batch_exceeds_is_refused(corpora_root, tmp_path):
    words = tagging_words(corpora_root, tmp_path / "run", "--train.global_batch", str(BATCH))
    error = refused(*words, "--memory.budget_gb", "0.0001")
    assert re.search(r"budget_gb: 12 clips take \S+ GB on rank 0 .*, and 0.0001 GB are", error)
    assert "use train.micro_batch auto" in error


def test_slices_and_micro_batch_share_a_budget(corpora_root, tmp_path):
    both = [*AUTO, "--memory.budget_gb", "0.002", "--memory.slice_seconds", "auto"]
    ended = enter(*tiny.tiny_words(corpora_root, *both, "--run.dir", str(tmp_path / "run")))
    assert ended.code == 0, ended.text
    assert f"micro_batch {BATCH} (auto: " in ended.text
    assert re.search(r"slices of \d+ samples", ended.text)


def test_a_process_with_a_real_limit_trains_where_one_big_micro_batch_ends_it(
    corpora_root, tmp_path
):
    wide = ["--model.channels", "32", "--data.crop_seconds", "2.5", "--train.global_batch", "16"]
    wide += ["--train.rounds", "1", "--evaluation.max_clips", "1", *PLAIN]
    little = ["tests/workers/little_memory.py", str(1000 * 2**20)]
    words = tagging_words(corpora_root, tmp_path / "null", *wide)
    ended = worlds.run(*little, *words)
    assert ended.returncode != 0
    assert "can't allocate memory" in ended.stderr
    words = tagging_words(corpora_root, tmp_path / "auto", *wide, "--train.micro_batch", "auto")
    ended = worlds.run(*little, *words)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert re.search(r"micro_batch [24] \(auto", ended.stderr)


V1 = {
    "proc/self/cgroup": "5:cpu,cpuacct:/\n4:memory:/job/step\n0::/\n",
    "sys/fs/cgroup/memory/job/step/memory.limit_in_bytes": "1000",
    "sys/fs/cgroup/memory/job/step/memory.usage_in_bytes": "300",
    "sys/fs/cgroup/memory/job/step/memory.stat": "cache 90\ninactive_file 1\ntotal_inactive_file 80\n",
    "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "900",
    "sys/fs/cgroup/memory/job/memory.usage_in_bytes": "700",
    "sys/fs/cgroup/memory/job/memory.stat": "total_inactive_file 100\n",
}
V2 = {
    "proc/self/cgroup": "0::/job:1/step\n",
    "sys/fs/cgroup/job:1/step/memory.max": "max\n",
    "sys/fs/cgroup/job:1/memory.max": "900\n",
    "sys/fs/cgroup/job:1/memory.current": "700\n",
    "sys/fs/cgroup/job:1/memory.stat": "anon 600\ninactive_file 100\n",
}


@pytest.mark.parametrize(("files", "left"), [(V1, [780, 300]), (V2, [300]), ({}, [])])
def test_limits_of_control_groups_are_read_up_to_the_root(tmp_path, files, left):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert list(left_in_control_groups(tmp_path)) == left


def test_ranks_of_a_node_share_its_memory():
    cpu = torch.device("cpu")
    assert bytes_for_tensors(cpu, 4) == pytest.approx(bytes_for_tensors(cpu, 1) / 4, rel=0.2)


@needs_gpu
def test_a_gpu_is_tried_and_its_end_of_memory_is_no_end_of_the_run(corpora_root):
    accelerator = Accelerator()
    large = ["--data.crop_seconds", "2", "--model.channels", "64", "--memory.budget_gb", "1"]
    experiment = experiment_of(corpora_root, *large)
    case = case_here(accelerator, experiment, 24)
    found = case.with_smaller_batches()
    micro = found.rounds().micro_batch
    assert found.activations_needed() <= 1e9
    larger = next((m for m in (1, 2, 3, 4, 6, 12) if m > micro), None)
    assert larger is None or case.changed(micro_batch=larger).activations_needed() > 1e9
    assert all(p.grad is None for p in case.activations.model.parameters())
    torch.cuda.set_per_process_memory_fraction(1e-3)
    try:
        assert case.activations.micro_step("joint", 60) == math.inf
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
