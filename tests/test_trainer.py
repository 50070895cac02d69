"""When a run stops by itself, and which checkpoint its results are of."""

import copy
import json

import pytest
import tiny
import torch
from safetensors.torch import load_file

from mtl_dist import checkpoint
from mtl_dist.config import ConfigError, load_config
from mtl_dist.data.corpora.dividing import make_corpus
from mtl_dist.data.corpora.listing import Listing
from mtl_dist.evaluation import evaluate
from mtl_dist.experiment import build_experiment
from mtl_dist.micro_batch import plan_together
from mtl_dist.models.wavenet import WaveNetTrunk
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import StopRequest, start, world_of
from mtl_dist.trainer import Trainer

FROZEN = ["--optim.learning_rate", "0", "--tasks.audio_tagging.learning_rate", "0"]


@pytest.fixture
def make_trainer(tmp_path, corpora_root):
    """make_trainer(*words) -> (trainer, run folder) of tagging alone on the tiny corpora, in this process."""
    made = []

    def make(*words):
        alone = ["--train.tasks", "[audio_tagging]", "--run.dir", str(tmp_path / "run")]
        words = [word.format(tmp_path) for word in words]
        config = load_config([*tiny.tiny_words(corpora_root), *alone, *words])
        accelerator = start("no")
        folder = RunFolder(config.run.dir)
        folder.open(config, world_of(accelerator), accelerator.device)
        experiment = build_experiment(config)
        plan = plan_together(accelerator, experiment, Phases())
        made.append(Trainer(experiment, plan, accelerator, folder, StopRequest()))
        return made[-1], folder

    yield make
    for trainer in made:
        trainer.close()


def test_without_a_better_validation_the_run_stops_after_patience(make_trainer):
    words = ["--train.rounds", "9", "--train.validate_every", "1", "--train.patience", "2"]
    trainer, folder = make_trainer(*words, *FROZEN)
    trainer.train()
    assert trainer.state.round == 3, "best at the first validation, then two that are no better"
    assert checkpoint.best_checkpoint(folder.checkpoints).name == checkpoint.folder_name(1)


def test_without_patience_it_goes_to_the_end(make_trainer):
    trainer, _ = make_trainer("--train.rounds", "4", "--train.validate_every", "1", *FROZEN)
    trainer.train()
    assert trainer.state.round == 4


@pytest.mark.parametrize("which", ["best", "last"])
def test_results_are_of_the_checkpoint_that_was_asked_for(make_trainer, which, monkeypatch):
    heard = []

    def listen(accelerator, model, *more):
        heard.append(copy.deepcopy(model))
        return evaluate(accelerator, model, *more)

    monkeypatch.setattr("mtl_dist.trainer.evaluate", listen)
    words = ["--train.rounds", "5", "--train.validate_every", "1", "--evaluation.checkpoint", which]
    trainer, folder = make_trainer(*words, *FROZEN[:1], "1e-2", *FROZEN[2:3], "1e-2")
    results = trainer.train()
    last = folder.checkpoints / checkpoint.folder_name(5)
    wanted = checkpoint.best_checkpoint(folder.checkpoints) if which == "best" else last
    model = trainer.experiment.build_model()
    checkpoint.load_weights(wanted, model)
    scored = heard[-1].state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(value, scored[name]), name
    assert json.loads(folder.results.read_text()) == results


def test_an_epoch_is_one_pass_over_the_main_tasks_training_clips(make_trainer):
    trainer, _ = make_trainer("--train.rounds", "30", "--train.validate_every", "30")
    clips, batch = trainer.main_clips, trainer.config.train.global_batch
    seen = []
    for round_ in range(30):
        trainer.state.round = round_
        seen.append(trainer.epoch())
    assert seen == [round_ * batch // clips for round_ in range(30)]
    assert max(seen) >= 2


def test_other_clips_or_labels_than_the_checkpoints_are_refused(make_trainer):
    trainer, folder = make_trainer("--train.rounds", "2", "--train.validate_every", "2")
    trainer.train()
    (path,) = checkpoint.whole_checkpoints(folder.checkpoints)
    state = json.loads((path / "state.json").read_text())
    (table,) = state["tables"]
    assert table == "corpora.fsdkaggle2018, source 0: its training clips"
    state["tables"][table] = "of other clips"
    text = json.dumps(state)
    (path / "state.json").write_text(text)
    sizes = json.loads((path / checkpoint.MARKER).read_text()) | {"state.json": len(text)}
    (path / checkpoint.MARKER).write_text(json.dumps(sizes))
    with pytest.raises(ConfigError, match=rf"{table} changed since {path} was written"):
        make_trainer("--train.rounds", "3", "--train.validate_every", "2", "--run.resume", "auto")


def test_a_fingerprint_tells_training_clips_and_labels_apart_and_nothing_else():
    rows = [
        {"id": str(i), "path": f"{i}.wav", "label": "ab"[i % 2], "split": "train"} for i in range(6)
    ]
    rows.append(rows[0] | {"id": "held", "split": "test"})

    def fingerprint(changed: list[dict]) -> str:
        (digest,) = make_corpus("c", Listing(rows=changed)).fingerprint().values()
        return digest

    first = rows[0]
    others = [rows[1:], [first | {"label": "b"}, *rows[1:]], [first | {"id": "x"}, *rows[1:]]]
    assert len({fingerprint(changed) for changed in [rows, *others]}) == 4
    moved = [row | {"path": f"elsewhere/{row['path']}"} for row in rows]
    for same in (rows[::-1], rows[:-1], moved):
        assert fingerprint(same) == fingerprint(rows)


def test_a_checkpoint_of_the_right_size_but_unreadable_is_skipped(make_trainer):
    trainer, folder = make_trainer("--train.rounds", "2", "--train.validate_every", "1")
    trainer.train()
    newest = folder.checkpoints / checkpoint.folder_name(2)
    damaged = newest / "optimizer.safetensors"
    damaged.write_bytes(b"\xff" * damaged.stat().st_size)
    again, _ = make_trainer(
        "--train.rounds", "2", "--train.validate_every", "1", "--run.resume", "auto"
    )
    assert again.state.round == 1


def test_the_configured_schedule_accumulation_clipping_and_decay_reach_the_step(make_trainer):
    """joint and accumulated == round_robin in one piece; clipped to nothing, nothing moves; rates fall by epochs."""
    decay = ["--optim.decay_factor", "0.5", "--optim.decay_epochs", "1"]
    words = ["--train.tasks", "[audio_tagging, upsampling]", "--train.rounds", "12", *decay]
    ended = {}
    for name, more in {
        "whole": ["--train.schedule", "round_robin"],
        "joint": ["--train.schedule", "joint", "--train.micro_batch", "2"],
        "clipped": ["--optim.clip_norm", "1e-30"],
    }.items():
        trainer, folder = make_trainer(*words, *more, "--run.dir", f"{{}}/{name}")
        before = [p.detach().clone() for p in trainer.engine.bare.parameters()]
        trainer.train()
        ended[name] = before, [p.detach() for p in trainer.engine.bare.parameters()]
        steps = [json.loads(line) for line in folder.metrics.read_text().splitlines()]
    for one, other in zip(ended["whole"][1], ended["joint"][1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
    for old, new in zip(*ended["clipped"], strict=True):
        torch.testing.assert_close(old, new, rtol=0, atol=1e-9)
    assert not torch.equal(ended["whole"][0][0], ended["whole"][1][0])
    per_epoch = trainer.main_clips / trainer.config.train.global_batch
    rates = {e["round"]: e["learning_rate/trunk"] for e in steps if e["kind"] == "round"}
    base = trainer.config.optim.learning_rate
    assert rates == {n: base * 0.5 ** int((n - 1) // per_epoch) for n in range(1, 13)}
    assert rates[12] <= base / 4


def test_a_second_process_cannot_write_the_same_run(make_trainer, tmp_path):
    _, folder = make_trainer()
    program = (
        "import sys; from mtl_dist.run_folder import RunFolder; RunFolder(sys.argv[1])._lock()"
    )
    done = tiny.run_process(["-c", program, str(folder.path)])
    assert done.returncode != 0
    assert "another process is writing" in done.stderr


def test_a_damaged_results_file_is_written_anew(make_trainer):
    trainer, folder = make_trainer("--train.rounds", "1")
    folder.results.write_text("{")
    results = trainer.train()
    assert json.loads(folder.results.read_text()) == results


def test_the_published_weights_and_their_json_rebuild_the_trunk(make_trainer):
    trainer, folder = make_trainer("--train.rounds", "1")
    trainer.train()
    (path,) = checkpoint.whole_checkpoints(folder.checkpoints)
    about = json.loads((path / "model.json").read_text())
    weights = load_file(path / "model.safetensors")
    trunk = WaveNetTrunk(**about["model"])
    trunk.load_state_dict(
        {n.removeprefix("trunk."): w for n, w in weights.items() if n.startswith("trunk.")}
    )
    wave = torch.randn(2, 300)
    torch.testing.assert_close(trunk(wave), trainer.engine.bare.trunk(wave))  # another kernel
    assert trunk.receptive_field == about["receptive_field_samples"]
    assert about["data"]["sample_rate"] == 16_000
    classes = trainer.experiment.tasks["audio_tagging"].class_names()
    assert about["tasks"]["audio_tagging"]["classes"] == classes
