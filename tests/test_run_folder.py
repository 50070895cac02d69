"""Whose run folder it is: refused where it cannot be written, is another run's, or not a run's at all."""

import errno
import os

import pytest
import yaml
from entry import enter, entries, refused, tagging_words

from mtl_dist.run_folder import RunFolder


@pytest.fixture(scope="module")
def finished(corpora_root, tmp_path_factory):
    """A run folder of one round, and the words that made it."""
    run = tmp_path_factory.mktemp("finished") / "run"
    words = tagging_words(corpora_root, run, "--train.rounds", "1")
    ended = enter(*words)
    assert ended.code == 0, ended.text
    return run, words


def test_a_run_folder_holds_what_the_run_was(finished):
    run, _ = finished
    assert sorted(path.name for path in run.iterdir()) == [
        ".lock",
        "checkpoints",
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "predictions",
        "results.json",
        "status.json",
        "tensorboard",
    ]
    assert yaml.safe_load((run / "config.yaml").read_text())["train"]["rounds"] == 1


def test_a_folder_that_holds_a_run_is_not_overwritten(finished):
    run, words = finished
    before = (run / "metrics.jsonl").read_text()
    assert "holds a run already; go on with --run.resume auto" in refused(*words)
    assert (run / "metrics.jsonl").read_text() == before


def test_a_run_of_another_configuration_is_not_resumed_and_the_fields_are_named(finished):
    _, words = finished
    error = refused(*words, "--run.resume", "auto", "--optim.learning_rate", "0.5")
    assert "holds a run of another configuration (optim.learning_rate: 0.0003 -> 0.5)" in error


def test_a_resumed_run_goes_on_and_its_length_may_change(finished):
    run, words = finished
    ended = enter(*words, "--run.resume", "auto", "--train.rounds", "3")
    assert ended.code == 0, ended.text
    assert f"goes on from {run / 'checkpoints' / 'round_00000001'} (round 1)" in ended.text
    assert [entry["round"] for entry in entries(run, "round")] == [1, 2, 3]


def test_lines_of_rounds_that_are_done_again_are_dropped_from_every_file(tmp_path):
    folder = RunFolder(tmp_path)
    folder.ranks.mkdir()
    files = [folder.metrics, folder.rank_file(0), folder.rank_file(12)]
    for path in files:
        path.write_text("".join(f'{{"round": {n}}}\n' for n in (0, 1, 3, 4, 5)) + '{"round": 2')
    folder.keep_lines_until(3)
    for path in files:
        assert path.read_text() == '{"round": 0}\n{"round": 1}\n{"round": 3}\n'
    folder.keep_lines_until(0)
    assert [path.read_text() for path in files] == [""] * 3, "as of a run that never began"


def test_a_full_disk_at_a_resume_is_reported(tmp_path, monkeypatch, caplog):
    folder = RunFolder(tmp_path)
    folder.metrics.write_text('{"round": 1}\n')

    def full(path, text):
        raise OSError(errno.ENOSPC, f"{path} could not be written")

    monkeypatch.setattr("mtl_dist.run_folder.write_atomically", full)
    folder.keep_lines_until(1)
    assert "metrics.jsonl could not be written" in caplog.text


@pytest.mark.parametrize("resume", ["no", "auto"])
def test_a_foreign_folder_is_left_alone(corpora_root, tmp_path, resume):
    (tmp_path / "thesis.tex").write_text("years of work")
    error = refused(*tagging_words(corpora_root, tmp_path, "--run.resume", resume))
    assert f"run.dir: {tmp_path} is not empty and holds no run; name another folder" in error
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_folder_with_a_damaged_configuration_is_refused(corpora_root, tmp_path):
    (tmp_path / "config.yaml").write_text("")
    words = tagging_words(corpora_root, tmp_path, "--run.resume", "auto")
    assert f"run.dir: {tmp_path / 'config.yaml'} is damaged" in refused(*words)


@pytest.mark.parametrize("place", ["file", "file/below"])
def test_a_folder_that_cannot_be_made_is_named(corpora_root, tmp_path, place):
    (tmp_path / "file").write_text("in the way")
    error = refused(*tagging_words(corpora_root, tmp_path / place))
    assert f"run.dir: {tmp_path / place} cannot be written" in error


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_write_permission_is_named(corpora_root, tmp_path):
    tmp_path.chmod(0o500)
    error = refused(*tagging_words(corpora_root, tmp_path / "run"))
    assert f"run.dir: {tmp_path / 'run'} cannot be written" in error


def test_a_batch_that_does_not_divide_leaves_no_run_folder_behind(corpora_root, tmp_path):
    words = tagging_words(corpora_root, tmp_path / "run", "--train.micro_batch", "3")
    error = refused(*words)
    assert "4 = 1 ranks x micro_batch 3 x accumulation 1.33333 does not come out whole" in error
    assert not (tmp_path / "run").exists()
