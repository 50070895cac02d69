"""Checkpoints: saved and loaded bit for bit, broken ones skipped, nothing lost to a full disk, nothing pickled."""

import copy
import json
import logging

import pytest
import tiny
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from tiny import full_disk

from mtl_dist import checkpoint
from mtl_dist.checkpoint import TrainState
from mtl_dist.config import load_config
from mtl_dist.engines import make_engine
from mtl_dist.experiment import build_experiment
from mtl_dist.optim import make_optimizer, schedules
from mtl_dist.sections import OptimConfig

FILES = {
    "COMPLETE",
    "config.yaml",
    "model.json",
    "model.safetensors",
    "optimizer.safetensors",
    "state.json",
}


def engine_after(experiment, steps: int = 0):
    """An engine of one process after `steps` steps of random gradients."""
    rates = schedules(OptimConfig(), {n: t.config for n, t in experiment.tasks.items()})
    engine = make_engine(
        Accelerator(cpu=True),
        experiment.build_model,
        lambda model: make_optimizer(model, OptimConfig(), rates),
    )
    rng = torch.Generator().manual_seed(steps)
    for _ in range(steps):
        for parameter in engine.bare.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=rng)
        engine.step()
    return engine


def save(root, experiment, round_: int, steps: int = 2, **state):
    weights, moments = engine_after(experiment, steps).full_state()
    state = TrainState(round=round_, positions={"speech": [[0, round_, 0, 4]]}, **state)
    return checkpoint.save(root, weights, moments, state, "run: {}\n", {"model": {}})


def equal(ours: dict, theirs: dict) -> bool:
    return ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_model_adam_and_state_come_back_bit_for_bit(tiny_experiment, tmp_path):
    engine = engine_after(tiny_experiment, steps=3)
    state = TrainState(
        round=7,
        positions={"speech": [[1, 0, 2, 3], [0, 7, 0, 1]]},
        best=0.125,
        best_round=5,
        clips=9,
    )
    path = checkpoint.save(tmp_path, *engine.full_state(), state, "a: 1\n", {})
    *tensors, found = checkpoint.read(path)
    assert found == state
    other = engine_after(tiny_experiment)
    other.load_state(*tensors)
    names = {name for name, _ in engine.bare.named_parameters()}
    assert set(tensors[0]) == names
    assert set(tensors[1]) == {f"{k}/{n}" for k in ("exp_avg", "exp_avg_sq", "step") for n in names}
    for ours, theirs in zip(engine.full_state(), other.full_state(), strict=True):
        assert equal(ours, theirs)


def test_the_next_step_after_loading_is_the_one_without(tiny_experiment, tmp_path):
    engine = engine_after(tiny_experiment, steps=3)
    path = checkpoint.save(tmp_path, *engine.full_state(), TrainState(round=3), "", {})
    other = engine_after(tiny_experiment)
    other.load_state(*checkpoint.read(path)[:2])
    for each in (engine, other):
        for parameter in each.bare.parameters():
            parameter.grad = torch.full_like(parameter, 0.25)
        each.step()
    assert equal(engine.full_state()[0], other.full_state()[0])
    assert not equal(engine.full_state()[0], checkpoint.read(path)[0])


def test_running_means_of_a_head_are_saved_too(tiny_experiment, tmp_path):
    def build():
        model = tiny_experiment.build_model()
        model.heads.heads["next_step"].add_module("norm", torch.nn.BatchNorm1d(2))
        return model

    engines = [
        make_engine(Accelerator(cpu=True), build, lambda m: torch.optim.Adam(m.parameters()))
        for _ in range(2)
    ]
    mean = "heads.heads.next_step.norm.running_mean"
    dict(engines[0].bare.named_buffers())[mean].fill_(3.0)
    engines[1].load_state(*engines[0].full_state())
    assert dict(engines[1].bare.named_buffers())[mean].tolist() == [3.0, 3.0]
    assert dict(engines[0].whole_copy().named_buffers())[mean].tolist() == [3.0, 3.0]


def remove_marker(path):
    (path / "COMPLETE").unlink()


def truncate(path):
    whole = (path / "optimizer.safetensors").read_bytes()
    (path / "optimizer.safetensors").write_bytes(whole[: len(whole) // 2])


def damage_marker(path):
    (path / "COMPLETE").write_text('{"model.safetensors": 12')


def empty_marker(path):
    (path / "COMPLETE").write_text("")


def lose_a_file(path):
    (path / "model.safetensors").unlink()


def nonsense_marker(path):
    (path / "COMPLETE").write_text("[1, 2]")


@pytest.mark.parametrize(
    "harm", [remove_marker, truncate, damage_marker, empty_marker, lose_a_file, nonsense_marker]
)
def test_a_broken_checkpoint_is_skipped_with_a_warning(tiny_experiment, tmp_path, caplog, harm):
    older, newer = (save(tmp_path, tiny_experiment, n) for n in (5, 10))
    harm(newer)
    with caplog.at_level(logging.WARNING, logger="mtl_dist"):
        assert checkpoint.whole_checkpoints(tmp_path) == [older]
    assert str(newer) in caplog.text
    with pytest.raises(ValueError, match="round_00000010"):
        checkpoint.find(newer)


def test_old_checkpoints_go_and_the_best_stays(tiny_experiment, tmp_path):
    paths = [save(tmp_path, tiny_experiment, n, steps=1) for n in (1, 2, 3, 4, 5)]
    checkpoint.mark_best(tmp_path, paths[1])
    checkpoint.remove_old(tmp_path, keep=2)
    assert sorted(tmp_path.glob("round_*")) == [paths[1], paths[3], paths[4]]
    assert checkpoint.best_checkpoint(tmp_path) == paths[1]


def test_a_run_folder_gives_its_best_checkpoint_else_its_newest(tiny_experiment, tmp_path):
    root = tmp_path / "checkpoints"
    paths = [save(root, tiny_experiment, n, steps=1) for n in (1, 2)]
    assert checkpoint.find(tmp_path) == paths[1]
    checkpoint.mark_best(root, paths[0])
    assert checkpoint.find(tmp_path) == paths[0]
    remove_marker(paths[0])
    assert checkpoint.find(tmp_path) == paths[1]


def test_a_checkpoint_of_another_model_is_refused_by_the_names_that_do_not_fit(
    tiny_experiment, corpora_root, tmp_path
):
    path = save(tmp_path, tiny_experiment, 1)
    for words, name in (
        (["--tasks.upsampling.hidden", "[5]"], r"heads\.heads\.upsampling\.layers\.0\.weight"),
        (["--model.residual_projection", "true"], r"trunk\.layers\.0\.projection\.weight"),
        (["--train.tasks", "[audio_tagging]"], r"heads\.heads\.next_step"),
    ):
        config = load_config(tiny.tiny_words(corpora_root, *words))
        other = build_experiment(config).build_model()
        before = copy.deepcopy(other.state_dict())
        with pytest.raises(ValueError, match=name):
            checkpoint.load_weights(path, other)
        assert all(torch.equal(v, before[n]) for n, v in other.state_dict().items())


def test_a_checkpoint_holds_safetensors_json_and_yaml_only(tiny_experiment, tmp_path):
    path = save(tmp_path, tiny_experiment, 1)
    assert {file.name for file in path.iterdir()} == FILES
    for name in ("model.json", "state.json", "COMPLETE"):
        json.loads((path / name).read_text())
    for name in ("model.safetensors", "optimizer.safetensors"):
        raw = (path / name).read_bytes()
        header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
        kinds = {entry["dtype"] for key, entry in header.items() if key != "__metadata__"}
        assert kinds == {"F32"}
        assert load_file(path / name)


def test_the_marker_is_written_last_and_the_folder_named_when_whole(
    tiny_experiment, tmp_path, monkeypatch
):
    seen = []
    rename = type(tmp_path).rename
    monkeypatch.setattr(
        type(tmp_path),
        "rename",
        lambda self, to: (seen.append({p.name for p in self.iterdir()}), rename(self, to))[1],
    )
    written = []
    flush = checkpoint._flush
    monkeypatch.setattr(checkpoint, "_flush", lambda p: (written.append(p.name), flush(p))[1])
    save(tmp_path, tiny_experiment, 1)
    assert seen == [FILES]
    assert written[-1] == "COMPLETE"
    assert set(written) == FILES


def test_a_failed_write_leaves_the_old_checkpoint_and_nothing_else(
    tiny_experiment, tmp_path, monkeypatch
):
    old = save(tmp_path, tiny_experiment, 1)
    monkeypatch.setattr(checkpoint, "save_file", full_disk)
    with pytest.raises(OSError, match=r"round_00000002.*No space left"):
        save(tmp_path, tiny_experiment, 2)
    assert list(tmp_path.iterdir()) == [old]
    assert checkpoint.broken(old) is None
