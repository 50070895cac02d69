"""A run that starts from another's weights: what is taken, what is frozen, and what is wrong."""

import json
import shutil

import pytest
import tiny
import torch
import worlds
from safetensors.torch import load_file

from mtl_dist import checkpoint
from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.transfer import transferred

UNLABELLED = ["--train.tasks", "[next_step,upsampling]", "--train.main_task", "upsampling"]


@pytest.fixture(scope="module")
def earlier(corpora_root, tmp_path_factory):
    """A run of two self-supervised tasks, two rounds long."""
    folder = tmp_path_factory.mktemp("earlier") / "run"
    more = ["--train.rounds", "2", "--run.dir", str(folder)]
    done = tiny.run_process(
        ["mtl_dist/train.py", *tiny.tiny_words(corpora_root, *UNLABELLED, *more)]
    )
    assert done.returncode == 0, done.stderr
    return folder


def weights_of(run, which: str = "last") -> dict[str, torch.Tensor]:
    return load_file(checkpoint.find(run, which) / "model.safetensors")


def test_the_trunk_and_the_heads_that_fit_are_taken_and_the_others_new(earlier, corpora_root):
    words = tiny.tiny_words(corpora_root, "--tasks.next_step.hidden", "[4,3]")
    experiment = build_experiment(load_config(words))
    new, saved = experiment.build_model(), weights_of(earlier, "best")
    weights, what = transferred(str(earlier), new, experiment.classes())
    assert "trunk, head of upsampling; new: head of audio_tagging, head of next_step" in what
    for name, value in new.state_dict().items():
        taken = name.startswith(("trunk.", "heads.heads.upsampling."))
        assert torch.equal(weights[name], saved[name] if taken else value), name


def test_a_head_of_other_classes_is_not_taken(corpora_root, tmp_path, tiny_experiment):
    about = {"tasks": {n: {"classes": t.class_names()} for n, t in tiny_experiment.tasks.items()}}
    model, classes = tiny_experiment.build_model(), tiny_experiment.classes()
    state = checkpoint.TrainState(round=1)
    path = checkpoint.save(tmp_path, model.state_dict(), {}, state, "", about)
    assert "new" not in transferred(str(path), model, classes)[1]
    other = {"audio_tagging": ["Bark", "Chime", "Squeal"]}
    assert "new: head of audio_tagging" in transferred(str(path), model, other)[1]


@pytest.mark.parametrize(
    "engine",
    [
        "",
        pytest.param("fsdp2_", marks=pytest.mark.slow),
        pytest.param("zero2_", marks=[pytest.mark.slow, pytest.mark.deepspeed]),
        pytest.param("zero3_", marks=[pytest.mark.slow, pytest.mark.deepspeed]),
    ],
)
def test_two_ranks_start_from_it_with_the_trunk_frozen_and_go_on_without_it(
    earlier, corpora_root, tmp_path, engine
):
    """The trunk stays as it was for an epoch of 22 clips, 6 rounds of 4, and moves after."""
    source, run = tmp_path / "source", tmp_path / "run"
    shutil.copytree(earlier, source)
    words = ["--run.dir", str(run), "--model.initial", str(source), "--train.global_batch", "4"]
    words += ["--optim.trunk_factor", "0", "--optim.trunk_epochs", "1", "--train.rounds", "7"]
    words = ["mtl_dist/train.py", *tiny.tiny_words(corpora_root, *words)]
    first = worlds.launch(f"{engine}two_cpu_processes", *words, "--train.stop_after_rounds", "3")
    assert first.returncode == 0, first.stderr
    assert "starts from " in first.stderr
    saved, now = weights_of(source, "best"), weights_of(run)
    trunk = [name for name in now if name.startswith("trunk.")]
    assert trunk
    assert all(torch.equal(now[name], saved[name]) for name in trunk)
    head = [name for name in now if name.startswith("heads.heads.upsampling.")]
    assert not any(torch.equal(now[name], saved[name]) for name in head)
    shutil.rmtree(source)
    second = worlds.launch(f"{engine}two_cpu_processes", *words, "--run.resume", "auto")
    assert second.returncode == 0, second.stderr
    moved = weights_of(run)
    assert not any(torch.equal(moved[name], saved[name]) for name in trunk)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    rates = {
        r["round"]: r["learning_rate/trunk"]
        for r in map(json.loads, lines)
        if "learning_rate/trunk" in r
    }
    assert not any(rates[n] for n in (1, 3, 6) if n in rates)
    assert rates[7] > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model.initial", "/nowhere"], "model.initial: /nowhere: neither a checkpoint nor"),
        (["--model.initial", "RUN", "--model.channels", "6"], "is of another model: trunk."),
        (["--optim.trunk_factor", "-1"], "optim.trunk_factor: -1.0 is not allowed; use 0 or more"),
    ],
)
def test_mistakes_are_named(earlier, corpora_root, tmp_path, words, message):
    words = [str(earlier) if word == "RUN" else word for word in words]
    words = tiny.tiny_words(corpora_root, "--run.dir", str(tmp_path / "run"), *words)
    done = tiny.run_process(["mtl_dist/train.py", *words])
    assert done.returncode == 1
    assert message in done.stderr.splitlines()[-1]
