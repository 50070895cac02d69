"""`mtl-dist evaluate` writes what it prints, and says clearly what is wrong with a path or a word."""

import csv
import json

import numpy as np
import pytest
import tiny

from mtl_dist import cli
from mtl_dist.checkpoint import TrainState, save
from mtl_dist.config import load_config
from mtl_dist.optim import make_optimizer, schedules


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, corpora_root, tiny_experiment):
    """A run folder with one checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(tiny.tiny_words(corpora_root))
    model = tiny_experiment.build_model()
    groups = schedules(config.optim, {n: t.config for n, t in tiny_experiment.tasks.items()})
    save(
        folder / "checkpoints",
        model,
        make_optimizer(model, config.optim, groups),
        TrainState(round=3),
        config.text,
        {},
    )
    return folder


def test_evaluate_prints_and_writes_the_same_numbers(run_folder, tmp_path, capsys, tiny_experiment):
    cli.main(["evaluate", str(run_folder), "--out", str(tmp_path), "--split", "test"])
    printed = capsys.readouterr().out
    results = json.loads((tmp_path / "results.json").read_text())["test"]
    tagging = results["audio_tagging"]
    for metric in ("map@3", "accuracy", "map@3_single_crop", "accuracy_single_crop"):
        assert 0 <= tagging[metric] <= 1
        assert f"{tagging[metric]:.4g}" in printed
    with open(tmp_path / "test_audio_tagging_confusion.csv") as file:
        header, *rows = csv.reader(file)
    counts = np.array([row[1:] for row in rows], dtype=int)
    assert header[1:] == tiny_experiment.tasks["audio_tagging"].class_names()
    assert counts.sum() == tagging["clips"]
    assert np.trace(counts) / counts.sum() == pytest.approx(tagging["accuracy"])
    with open(tmp_path / "test_audio_tagging_per_class.csv") as file:
        per_class = list(csv.DictReader(file))
    weighted = sum(int(row["clips"]) * float(row["map@3"]) for row in per_class)
    assert weighted / counts.sum() == pytest.approx(tagging["map@3"], abs=1e-3)
    assert (tmp_path / "test_audio_tagging_confusion.png").read_bytes().startswith(b"\x89PNG")


def test_evaluate_keeps_the_results_of_other_splits(run_folder, tmp_path):
    for split in ("test", "validation"):
        cli.main(["evaluate", str(run_folder), "--out", str(tmp_path), "--split", split])
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"test", "validation"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["evaluate", "/nowhere"], "neither a checkpoint nor a run folder"),
        (["evaluate", "RUN", "--evaluation.max_clps", "3"], "did you mean 'evaluation.max_clips'"),
        (["evaluate", "RUN", "--model.channels", "6"], "is of another model: "),
        (["evaluate", "RUN", "--corpora.fsdkaggle2018.root", "/nowhere"], "does not exist"),
    ],
)
def test_mistakes_end_with_one_line_that_names_them(run_folder, words, message):
    words = [str(run_folder) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert str(stop.value).startswith("error: ")
    assert message in str(stop.value)
