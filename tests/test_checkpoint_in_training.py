"""Checkpoints while a run trains: it goes on when one cannot be written, and the best is one that is there."""

import pytest
import tiny
import torch
from accelerate import Accelerator
from tiny import full_disk

from mtl_dist import checkpoint
from mtl_dist.config import load_config
from mtl_dist.evaluation import Evaluation
from mtl_dist.experiment import build_experiment
from mtl_dist.micro_batch import plan_together
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import StopRequest
from mtl_dist.trainer import Trainer, TrainingError


def trainer_of(corpora_root, run, *words):
    words = ["--run.dir", str(run), *words]
    experiment = build_experiment(load_config(tiny.tiny_words(corpora_root, *words)))
    folder = RunFolder(run)
    folder.checkpoints.mkdir(parents=True)
    accelerator = Accelerator(cpu=True)
    plan = plan_together(accelerator, experiment, Phases())
    return Trainer(experiment, plan, accelerator, folder, StopRequest())


def test_training_goes_on_when_a_checkpoint_cannot_be_written(
    corpora_root, tmp_path, monkeypatch, caplog
):
    trainer = trainer_of(corpora_root, tmp_path / "run", "--train.checkpoint_every", "1")
    folder = trainer.folder
    write, calls = checkpoint.save_file, []

    def sometimes(*arguments, **named):
        calls.append(1)
        if 3 <= len(calls) <= 4:  # the second and third checkpoint; each ends at its first file
            full_disk()
        return write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", sometimes)
    assert trainer.train() is not None
    trainer.close()
    assert trainer.state.round == 4
    assert caplog.text.count("could not be written") == 2
    assert checkpoint.whole_checkpoints(folder.checkpoints)[0].name == "round_00000004"


def validations(monkeypatch, trainer, *losses: float) -> None:
    """Let the trainer's validations find these losses of the main task, lower is better, then 9."""
    monkeypatch.setattr(trainer, "higher_is_better", False)
    trainer.best_metric, values = "loss", iter(losses)

    def validation(*arguments):
        numbers = {"audio_tagging": {"loss": torch.tensor(next(values, 9.0))}}
        return Evaluation(metrics=numbers, clips={"audio_tagging": 1}, bad=[])

    monkeypatch.setattr("mtl_dist.trainer.evaluate", validation)


def test_the_best_is_kept_although_no_checkpoint_was_due(corpora_root, tmp_path, monkeypatch):
    every = ["--train.checkpoint_every", "3", "--train.validate_every", "2"]
    trainer = trainer_of(corpora_root, tmp_path / "run", *every)
    validations(monkeypatch, trainer, 1.0, 2.0)
    trainer.train()
    trainer.close()
    assert trainer.state.best_round == 2
    assert checkpoint.best_checkpoint(trainer.folder.checkpoints).name == "round_00000002"


def test_a_best_that_the_disk_did_not_take_is_not_called_the_best(
    corpora_root, tmp_path, monkeypatch
):
    trainer = trainer_of(corpora_root, tmp_path / "run", "--train.validate_every", "1")
    validations(monkeypatch, trainer, 3.0, 1.0, 2.0, 4.0)
    write, calls = checkpoint.save_file, []

    def sometimes(*arguments, **named):
        calls.append(1)
        return full_disk() if len(calls) == 3 else write(*arguments, **named)

    monkeypatch.setattr(checkpoint, "save_file", sometimes)
    trainer.train()
    trainer.close()
    assert (trainer.state.best, trainer.state.best_round) == (2.0, 3)
    assert checkpoint.best_checkpoint(trainer.folder.checkpoints).name == "round_00000003"


@pytest.mark.parametrize("harm", ["pointer", "weights"])
def test_a_damaged_best_costs_the_best_and_not_the_run(corpora_root, tmp_path, caplog, harm):
    trainer = trainer_of(corpora_root, tmp_path / "run", "--train.validate_every", "2")
    root, watch = trainer.folder.checkpoints, trainer._end_if

    def spoil(*arguments):
        if harm == "pointer" and (root / "best.json").exists():
            (root / "best.json").write_text("{")
        for weights in root.glob("*/model.safetensors") if harm == "weights" else []:
            weights.write_bytes(b"")
        watch(*arguments)

    trainer._end_if = spoil
    assert trainer.train() is not None
    trainer.close()
    said = "no checkpoint is known as the best" if harm == "pointer" else "has 0 of"
    assert said in caplog.text


def test_results_that_cannot_be_written_are_shown_and_their_remedy_named(
    corpora_root, tmp_path, monkeypatch, capfd
):
    trainer = trainer_of(corpora_root, tmp_path / "run")
    monkeypatch.setattr(trainer.folder, "save_results", full_disk)
    with pytest.raises(TrainingError, match=r"No space left.*mtl-dist evaluate"):
        trainer.train()
    trainer.close()
    assert "map@3" in capfd.readouterr().err
