"""memory.slice_seconds: a length, or the longest that memory.budget_gb lets be; what cannot be is refused at the start."""

import os
import re

import pytest
import tiny
import torch
from test_slices import batches, peak

from mtl_dist import cli
from mtl_dist.config import ConfigError, load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.slice_length import GB


@pytest.fixture
def experiment_with(corpora_root):
    def build(*words: str, precision: str = "no"):
        config = load_config(tiny.tiny_words(corpora_root, *words))
        return build_experiment(config, device=torch.device("cpu"), precision=precision)

    return build


def auto(budget: float) -> list[str]:
    return ["--memory.slice_seconds", "auto", "--memory.budget_gb", str(budget)]


def test_seconds_are_samples_of_the_rate(experiment_with):
    experiment = experiment_with("--memory.slice_seconds", "0.01", "--data.sample_rate", "8000")
    assert experiment.build_model().slice_samples == 80
    assert experiment_with().build_model().slice_samples is None


@pytest.mark.parametrize("schedule", ["round_robin", "joint"])
def test_auto_fills_the_budget_and_keeps_it(experiment_with, schedule):
    experiment = experiment_with(*auto(0.002), "--train.schedule", schedule)
    model = experiment.build_model().float()
    used = []
    for name in experiment.tasks:
        some = batches([name], samples=12_000, valid=[12_000, 5_000], dtype=torch.float32)
        used.append(peak(model, some))
    assert 0.9 * 0.002 * GB < max(used) <= 0.002 * GB


def test_more_memory_means_longer_slices(experiment_with):
    lengths = [experiment_with(*auto(b)).blueprint.slice_samples for b in (0.0005, 0.001, 0.01, 1)]
    assert lengths == sorted(set(lengths))


def test_auto_without_a_budget_is_refused(experiment_with):
    with pytest.raises(ConfigError, match=re.escape("memory.budget_gb")):
        experiment_with("--memory.slice_seconds", "auto").build_model()


def test_a_budget_that_holds_no_slice_is_refused_with_the_arithmetic(experiment_with):
    with pytest.raises(
        ConfigError, match=r"budget_gb: 1e-05 GB .* 15 samples and what .*, take \S+ GB"
    ):
        _ = experiment_with(*auto(1e-5)).blueprint.slice_samples


def test_fp16_is_refused(experiment_with):
    experiment = experiment_with("--memory.slice_seconds", "1", precision="fp16")
    with pytest.raises(ConfigError, match=r"memory\.slice_seconds: not together with .*fp16"):
        _ = experiment.blueprint.slice_samples


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_plan_in_slices_is_of_the_precision_that_it_is_asked_for(corpora_root, capsys, precision):
    words = ["plan", "--precision", precision, *tiny.tiny_words(corpora_root, *auto(0.02))]
    cli.main(words)
    held = re.search(r"memory: activations +(\S+) MiB", capsys.readouterr().out).group(1)
    assert 0.85 * 0.02 * GB < float(held) * 2**20 <= 1.005 * 0.02 * GB  # it is said in tenths


def test_a_plan_in_fp16_needs_no_gpu_and_refuses_slices(corpora_root, capsys):
    words = ["plan", "--precision", "fp16", *tiny.tiny_words(corpora_root)]
    cli.main(words)
    with pytest.raises(SystemExit, match=r"slice_seconds: not together with mixed precision fp16"):
        cli.main([*words, "--memory.slice_seconds", "0.1"])


def test_the_plan_of_slices_does_not_grow_with_the_micro_batch(corpora_root, capsys):
    words = tiny.tiny_words(corpora_root, "--memory.slice_seconds", "0.01")
    held = []
    for batch in (4, 16):
        cli.main(["plan", *words, "--train.global_batch", str(batch)])
        text = capsys.readouterr().out
        held.append(re.search(r"memory: activations +(\S+ \w+)", text).group(1))
    assert held[0] == held[1]


def test_a_run_says_the_length_in_force_and_who_is_computed_whole(corpora_root, tmp_path):
    plugin = tmp_path / "loudest.py"
    plugin.write_text(
        "from mtl_dist.tasks import TASKS, register_task\n"
        "@register_task('loudest')\n"
        "class Loudest(TASKS['upsampling']):\n"
        "    def loss(self, outputs, batch):\n"
        "        return outputs.square().amax(dim=1).sum(), self.count(batch)\n"
    )
    words = ["--run.plugins", f"[{plugin}]", "--train.tasks", "[audio_tagging,loudest]"]
    words += ["--tasks.loudest.sources", "[librispeech]", "--run.dir", str(tmp_path / "run")]
    words += ["--memory.slice_seconds", "0.01", "--train.rounds", "1"]
    train = tiny.tiny_words(corpora_root, *words)
    done = tiny.run_process([os.path.join("mtl_dist", "train.py"), *train])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "slices of 160 samples (0.01 s)" in done.stderr
    assert len(re.findall("task loudest is computed on whole clips", done.stderr)) == 1
    assert "audio_tagging is computed on whole" not in done.stderr
