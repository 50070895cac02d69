"""`mtl-dist evaluate` writes what it prints, and says clearly what is wrong with a path or a word."""

import csv
import json
import shutil

import numpy as np
import pyarrow.parquet as pq
import pytest
import tiny
import worlds

from mtl_dist import cli
from mtl_dist.checkpoint import MARKER, TrainState, mark_best, save
from mtl_dist.config import load_config


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, corpora_root, tiny_experiment):
    """A run folder with one checkpoint of an untrained model."""
    folder = tmp_path_factory.mktemp("run")
    config = load_config(tiny.tiny_words(corpora_root))
    save(
        folder / "checkpoints",
        tiny_experiment.build_model().state_dict(),
        {},
        TrainState(round=3),
        config.text,
        {"tasks": {n: {"classes": t.class_names()} for n, t in tiny_experiment.tasks.items()}},
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


def test_the_numbers_are_those_of_the_predictions(run_folder, tmp_path):
    """Brute force: MAP@3 and accuracy of the rows of predictions/test.parquet."""
    cli.main(["evaluate", str(run_folder), "--out", str(tmp_path), "--split", "test"])
    results = json.loads((tmp_path / "results.json").read_text())["test"]["audio_tagging"]
    table = pq.read_table(tmp_path / "predictions" / "test.parquet")
    classes = json.loads(table.schema.metadata[b"classes"])["audio_tagging"]
    rows = table.to_pylist()
    assert {row["task"] for row in rows} == {"audio_tagging"}
    ids = [row["id"] for row in rows]
    assert ids == sorted(set(ids))
    assert len(ids) == results["clips"]
    for column, suffix in (("probabilities", ""), ("probabilities_single_crop", "_single_crop")):
        precision, right = [], []
        for row in rows:
            assert sum(row[column]) == pytest.approx(1, abs=1e-5)
            ranked = sorted(classes, key=lambda c, row=row: -row[column][classes.index(c)])
            place = ranked.index(row["label"]) + 1
            precision.append(1 / place if place <= 3 else 0)
            right.append(place == 1)
        assert results[f"map@3{suffix}"] == pytest.approx(np.mean(precision), abs=1e-6)
        assert results[f"accuracy{suffix}"] == pytest.approx(np.mean(right), abs=1e-6)


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
        (["evaluate", "RUN", "--out", "/proc/no"], "/proc/no"),
    ],
)
def test_mistakes_end_with_one_line_that_names_them(run_folder, words, message):
    words = [str(run_folder) if word == "RUN" else word for word in words]
    with pytest.raises(SystemExit) as stop:
        cli.main(words)
    assert str(stop.value).startswith("error: ")
    assert message in str(stop.value)


def test_only_what_the_run_itself_would_score_goes_into_its_results(run_folder):
    """Another checkpoint or other settings are written apart; the run's own results stay."""
    results = run_folder / "results.json"
    cli.main(["evaluate", str(run_folder)])
    before = results.read_bytes()
    cli.main(["evaluate", str(run_folder), "--evaluation.max_clips", "2"])
    assert results.read_bytes() == before
    apart = run_folder / "evaluations" / "round_00000003" / "results.json"
    assert json.loads(apart.read_text())["test"]["audio_tagging"]["clips"] == 2
    cli.main(["evaluate", str(run_folder / "checkpoints" / "round_00000003")])
    assert results.read_bytes() == before


@pytest.mark.parametrize(
    ("saved", "which", "round_"), [("best", None, 1), ("last", None, 2), ("last", "best", 1)]
)
def test_the_checkpoint_scored_is_the_one_the_run_scores(
    tmp_path, corpora_root, saved, which, round_
):
    config = load_config([*tiny.tiny_words(corpora_root), "--evaluation.checkpoint", saved])
    paths = [tmp_path / "checkpoints" / f"round_0000000{n}" for n in (1, 2)]
    for path in paths:
        path.mkdir(parents=True)
        (path / "config.yaml").write_text(config.text)
        (path / MARKER).write_text(json.dumps({"config.yaml": len(config.text)}))
    mark_best(tmp_path / "checkpoints", paths[0])
    run, path, own = cli.chosen(tmp_path, which)
    assert (run, path, own) == (tmp_path, paths[round_ - 1], which is None)
    assert cli.chosen(paths[0], None)[2] == (saved == "best")


def test_a_corpus_of_other_classes_is_refused(run_folder, tmp_path):
    path = run_folder / "checkpoints" / "round_00000003"
    about = json.loads((path / "model.json").read_text())
    other = tmp_path / "checkpoints" / path.name
    shutil.copytree(path, other)
    about["tasks"]["audio_tagging"]["classes"][0] = "Arf!"  # as long as "Bark"
    (other / "model.json").write_text(json.dumps(about, indent=2))
    with pytest.raises(SystemExit) as stop:
        cli.main(["evaluate", str(tmp_path)])
    assert "they differ in Arf!, Bark" in str(stop.value)


@pytest.mark.slow
def test_two_processes_score_what_one_scores(run_folder, tmp_path):
    words = [
        "evaluate",
        str(run_folder),
        "--split",
        "test",
        "--evaluation.max_clips",
        "null",
        "--out",
    ]
    cli.main([*words, str(tmp_path / "one")])
    done = worlds.launch("two_cpu_processes", "-m", "mtl_dist.cli", *words, str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    one, two = (
        json.loads((tmp_path / n / "results.json").read_text())["test"] for n in ("one", "two")
    )
    assert one["audio_tagging"]["clips"] == 79
    for task, metrics in one.items():
        assert two[task] == pytest.approx(metrics, rel=1e-5, abs=1e-6)
