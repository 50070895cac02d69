"""What a user can get wrong, and what a disk can do to audio: a clear error or a counted skip, and no lost run."""

import csv
import os
import re
import shutil

import numpy as np
import pytest
import soundfile
import tiny
import worlds
from entry import enter, entries, refused, tagging_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.config import ConfigError, load_config
from mtl_dist.corpora import CORPORA
from mtl_dist.experiment import build_experiment

TRAIN = "FSDKaggle2018.meta/train_post_competition.csv"
TEST = "FSDKaggle2018.meta/test_post_competition_scoring_clips.csv"


@pytest.fixture
def root(tmp_path, corpora_root):
    """A folder of corpora of which FSDKaggle2018 may be spoilt."""
    shutil.copytree(corpora_root / "FSDKaggle2018", tmp_path / "FSDKaggle2018")
    return tmp_path


def edit(root, table: str, change) -> None:
    """Rewrite the lines of a CSV: `change` maps a list of lists of cells to another."""
    path = root / "FSDKaggle2018" / table
    with open(path, newline="", encoding="utf-8") as lines:
        rows = change(list(csv.reader(lines)))
    with open(path, "w", newline="", encoding="utf-8") as lines:
        csv.writer(lines).writerows(rows)


def relabel(line: int, label: str):
    """Return a change that gives one line (counted from 0, the header) another label."""
    return lambda rows: [[r[0], label, *r[2:]] if i == line else r for i, r in enumerate(rows)]


WRONG_TABLES = {
    "no column": (TRAIN, lambda rows: [["file", *rows[0][1:]], *rows[1:]], "column fname is missing; found"),
    "no rows": (TRAIN, lambda rows: rows[:1], "train_post_competition.csv: holds no clips"),
    "empty file": (TRAIN, lambda rows: [], "column fname, label is missing; found []"),
    "a row twice": (TRAIN, lambda rows: [*rows, rows[5]], "line 26: train004.wav stands twice"),
    "a short row": (TRAIN, lambda rows: [*rows, ["x.wav"]], "line 26: the line ends before column label"),
    "no label": (TRAIN, relabel(3, ""), "line 4, column label: empty"),
    "unknown label": (TEST, relabel(3, "Barc"), "line 4, column label: unknown label 'Barc'; did you mean 'Bark'?"),
    "other case": (TRAIN, relabel(3, "bark"), "differ in case or spaces only"),
    "all files missing": (
        TRAIN,
        lambda rows: [rows[0], *(["no_" + r[0], *r[1:]] for r in rows[1:])],
        "none of its 24 files is in",
    ),
    "many files missing": (
        TRAIN,
        lambda rows: [*rows[:18], *(["no_" + r[0], *r[1:]] for r in rows[18:])],
        "corpora.fsdkaggle2018: 7 of 24 listed files are missing, such as",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_TABLES)
def test_a_wrong_table_stops_with_file_line_and_remedy(root, case):
    table, change, message = WRONG_TABLES[case]
    edit(root, table, change)
    with pytest.raises(ConfigError) as caught:
        build_experiment(load_config(tagging_words(root, root / "run")))
    assert message in str(caught.value)


@pytest.mark.parametrize("gone", ["", "FSDKaggle2018.meta", "FSDKaggle2018.audio_test", TRAIN])
def test_a_missing_folder_or_file_is_named_with_its_field(root, gone):
    path = root / "FSDKaggle2018" / gone
    path.unlink() if path.is_file() else shutil.rmtree(path)
    error = refused(*tagging_words(root, root / "run"))
    assert "corpora.fsdkaggle2018.root: the f" in error
    assert f"{path} does not exist" in error or not gone
    assert not (root / "run").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpora.librispeech.root", "/gone"], "corpora.librispeech.root: the folder /gone does"),
        (["--corpora.librispeech.splits", "[dev-clean]"], "there are the folders train-clean-100"),
        (["--corpora.librispeech.root", "EMPTY/x"], "0 FLAC files of 0 speakers found; at least 3"),
        (["--corpora.chime3.root", "/gone"], "corpora.chime3.root: the folder /gone does not exist"),
        (["--corpora.chime3.root", "EMPTY"], "corpora.chime3: no BGD_*.wav of the environments"),
        (["--corpora.chime3.environments", "[BTH]"], "environments there: ['BUS', 'CAF', 'PED', 'STR']"),
    ],
)  # fmt: skip
def test_a_missing_or_empty_corpus_of_speech_or_noise_is_named(
    corpora_root, tmp_path, words, message
):
    (tmp_path / "x" / "train-clean-100").mkdir(parents=True)
    words = [word.replace("EMPTY", str(tmp_path)) for word in words]
    tasks = ["--train.tasks", "[audio_tagging, noise_reduction]"]
    assert message in refused(*tagging_words(corpora_root, tmp_path / "run", *tasks, *words))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"manifest": "/gone.csv"}, "corpora.folder.manifest: the file /gone.csv does not exist"),
        ({"root": "/gone"}, "corpora.folder.root: the folder /gone does not exist"),
        ({}, "set root (a folder), manifest (a CSV file) or sources (a list of any kind)"),
        ({"manifest": "M"}, "line 2, column label: empty; every clip needs a label"),
    ],
)
def test_a_missing_or_incomplete_corpus_of_ones_own_is_named(tmp_path, fields, message):
    (tmp_path / "m.csv").write_text("path,label\na.wav,\n")
    fields = {k: str(tmp_path / "m.csv") if v == "M" else v for k, v in fields.items()}
    with pytest.raises(ValueError, match=re.escape(message)):
        CORPORA["folder"](**fields).load("folder", 0)


def test_a_byte_order_mark_and_a_missing_file_cost_nothing_but_a_count(root):
    path = root / "FSDKaggle2018" / TRAIN
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    (root / "FSDKaggle2018" / "FSDKaggle2018.audio_train" / "train004.wav").unlink()
    ended = enter(*tagging_words(root, root / "run", "--train.rounds", "1"))
    assert ended.code == 0, ended.text
    assert "79 test clips, 3 classes, 1 files missing, such as" in ended.text


@pytest.mark.parametrize("text", [b"path\n\xff\xfe.wav\n", b"path\n" + b'"' + b"x" * 200_000])
def test_a_manifest_that_is_no_csv_in_utf8_is_named(tmp_path, text):
    (tmp_path / "m.csv").write_bytes(text)
    with pytest.raises(ValueError, match=r"m\.csv: not a CSV file in UTF-8"):
        CORPORA["folder"](manifest=str(tmp_path / "m.csv")).load("folder", 0)


def test_a_wrong_split_in_a_manifest_is_named_with_its_line(tmp_path):
    (tmp_path / "m.csv").write_text("path,split\na.wav,training\n")
    with pytest.raises(
        ValueError, match=r"m\.csv, line 2, column split: 'training' \(allowed: train,"
    ):
        CORPORA["folder"](manifest=str(tmp_path / "m.csv")).load("folder", 0)


def test_a_labelled_task_on_an_unlabelled_corpus_is_refused(corpora_root, tmp_path):
    words = tagging_words(corpora_root, tmp_path / "run", "--tasks.audio_tagging.sources")
    assert "a labelled task needs corpora with labels" in refused(*words, "[librispeech]")


def spoil(path, how: str) -> None:
    """Do to a WAV file what happens to files."""
    wave, rate = soundfile.read(path, dtype="float32")
    if how in ("NaN", "Inf"):
        wave[len(wave) // 2] = float(how)
        soundfile.write(path, wave, rate, "FLOAT")
    elif how == "truncated FLAC":
        soundfile.write(path, np.tile(wave, 20), rate, format="FLAC")
        path.write_bytes(path.read_bytes()[:9000])
    else:
        whole = path.read_bytes()
        kept = {"zero length": 0, "header only": 44, "truncated WAV": len(whole) // 2}
        path.write_bytes(b"# Notes\n" * 50 if how == "text" else whole[: kept[how]])


BAD_FILES = ("zero length", "header only", "truncated WAV", "truncated FLAC", "NaN", "Inf", "text")


def test_bad_files_are_skipped_counted_and_named_and_the_run_goes_to_its_end(root):
    """All seven kinds among 24 clips: named in metrics.jsonl, counted in TensorBoard, absent from nothing else."""
    words = tagging_words(root, root / "run", "--data.max_bad_share", "0.5", "--train.epochs", "2")
    words += [
        "--train.rounds",
        "null",
        "--evaluation.max_clips",
        "null",
        "--train.global_batch",
        "3",
    ]
    rows = build_experiment(load_config(words)).corpora["fsdkaggle2018"].splits
    paths = [rows["train"][place]["audio"]["path"] for place in range(6)]
    paths += [rows["validation"][0]["audio"]["path"]]
    for path, how in zip(paths, BAD_FILES, strict=True):
        spoil(tiny.Path(path), how)
    ended = enter(*words)
    assert ended.code == 0, ended.text

    found = entries(root / "run", "bad_files")
    named = {message.split(": ")[0] for entry in found for message in entry["messages"]}
    assert named == set(paths[:6])
    assert found[-1]["total"] == 12  # six files, two epochs
    assert [e["total"] for e in found] == sorted(e["total"] for e in found)
    (in_validation, *_) = entries(root / "run", "bad_files_in_validation")
    assert in_validation["total"] == 1
    assert paths[6] in in_validation["messages"][0]

    events = EventAccumulator(str(root / "run" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("data/bad_files")] == [e["total"] for e in found]
    assert events.Scalars("data/bad_files_in_validation")[0].value == 1
    texts = [
        e.tensor_proto.string_val[0].decode() for e in events.Tensors("data/bad_files/text_summary")
    ]
    assert all(any(path in text for text in texts) for path in paths[:6])
    assert np.isfinite([e["loss/total"] for e in entries(root / "run", "round")]).all()


def test_more_bad_files_than_the_share_stop_the_run_with_the_last_ones_name(root):
    for path in (root / "FSDKaggle2018" / "FSDKaggle2018.audio_train").iterdir():
        spoil(path, "text")
    words = tagging_words(root, root / "run", "--train.rounds", "100")
    error = refused(*words)
    assert (
        "12 of 12 clips could not be used, more than data.max_bad_share 0.05; the last: " in error
    )
    assert "cannot be read as audio" in error
    assert entries(root / "run", "bad_files")[-1]["total"] == 12


def test_more_bad_files_than_the_share_in_validation_stop_the_run(root):
    words = tagging_words(root, root / "run", "--data.max_bad_share", "0")
    rows = build_experiment(load_config(words)).corpora["fsdkaggle2018"].splits["validation"]
    spoil(tiny.Path(rows[0]["audio"]["path"]), "text")
    error = refused(*words)
    assert f"1 of {len(rows)} clips could not be used" in error
    assert rows[0]["audio"]["path"] in error


@pytest.mark.slow
def test_more_bad_files_than_the_share_stop_all_ranks(root):
    for path in (root / "FSDKaggle2018" / "FSDKaggle2018.audio_train").iterdir():
        spoil(path, "text")
    ended = worlds.launch(
        "two_cpu_processes", "mtl_dist/train.py", *tagging_words(root, root / "run"), timeout=280.0
    )
    assert ended.returncode != 0
    assert ended.stderr.count("error: 12 of 12 clips could not be used") == 1
    assert "[rank" not in ended.stderr  # torch's mark of a traceback


def test_an_evaluation_counts_the_clips_that_it_could_read(root):
    for number in (0, 1, 2):
        spoil(root / "FSDKaggle2018" / "FSDKaggle2018.audio_test" / f"test00{number}.wav", "text")
    words = tagging_words(root, root / "run", "--train.rounds", "1", "--evaluation.max_clips")
    ended = enter(*words, "null")
    assert ended.code == 0, ended.text
    assert ended.text.count("evaluation skips a bad file") == 3
    assert '"clips": 76' in (root / "run" / "results.json").read_text()


def test_a_test_side_that_cannot_be_read_is_named_counted_and_fails_the_run(root):
    for path in (root / "FSDKaggle2018" / "FSDKaggle2018.audio_test").iterdir():
        spoil(path, "text")
    words = tagging_words(root, root / "run", "--train.rounds", "1", "--evaluation.max_clips")
    error = refused(*words, "null")
    assert "the test results are not to be trusted: 79 of 79 clips" in error
    assert '"clips": 0' in (root / "run" / "results.json").read_text()
    assert entries(root / "run", "bad_files_in_test")[0]["total"] == 79


def test_a_run_that_bad_files_stopped_goes_on_when_they_are_mended(root):
    paths = list((root / "FSDKaggle2018" / "FSDKaggle2018.audio_train").iterdir())
    whole = {path: path.read_bytes() for path in paths}
    for path in paths:
        spoil(path, "text")
    words = tagging_words(root, root / "run", "--train.rounds", "8")
    assert "go on with --run.resume auto" in refused(*words)
    for path, content in whole.items():
        path.write_bytes(content)
    ended = enter(*words, "--run.resume", "auto")
    assert ended.code == 0, ended.text


def test_missing_files_are_named_in_the_log_and_counted_in_tensorboard(root):
    gone = root / "FSDKaggle2018" / "FSDKaggle2018.audio_test" / "test003.wav"
    gone.unlink()
    ended = enter(*tagging_words(root, root / "run", "--train.rounds", "1"))
    assert ended.code == 0, ended.text
    assert str(gone) in ended.text
    (entry,) = entries(root / "run", "missing_files")
    assert (entry["messages"], entry["total"]) == ([str(gone)], 1)
    events = EventAccumulator(str(root / "run" / "tensorboard")).Reload()
    assert events.Scalars("data/missing_files")[0].value == 1


def test_too_many_missing_files_are_judged_by_split_and_before_labels(root):
    """Eight of 79 test clips are less than 5 % of neither side together; and no class is unknown for want of files."""
    folder = root / "FSDKaggle2018" / "FSDKaggle2018.audio_test"
    for number in range(8):
        (folder / f"test00{number}.wav").unlink()
    assert "8 of 79 listed files are missing" in refused(*tagging_words(root, root / "run"))
    for path in sorted((root / "FSDKaggle2018" / "FSDKaggle2018.audio_train").iterdir())[::3]:
        path.unlink()  # every clip of the first class
    assert "8 of 24 listed files are missing" in refused(*tagging_words(root, root / "run"))


ODD_CLIPS = {
    "silent": (np.zeros(3000), 44_100),
    "one sample": (np.full(1, 0.5), 44_100),
    "one silent sample": (np.zeros(1), 16_000),
    "eight channels of 192 kHz": (np.random.default_rng(0).uniform(-1, 1, (20_000, 8)), 192_000),
    "twenty seconds": (np.full(20_000, 0.1), 1000),
}


def test_odd_but_whole_clips_are_trained_on_and_evaluated_by_every_task_without_a_skip(
    root, corpora_root
):
    for name in ("LibriSpeech", "CHiME3"):
        os.symlink(corpora_root / name, root / name)
    for part, count in (("train", tiny.TRAIN_CLIPS), ("test", tiny.TEST_CLIPS)):
        for number in range(count):
            wave, rate = list(ODD_CLIPS.values())[number // 3 % len(ODD_CLIPS)]
            folder = root / "FSDKaggle2018" / f"FSDKaggle2018.audio_{part}"
            soundfile.write(folder / f"{part}{number:03d}.wav", wave, rate, "PCM_16")
    words = tiny.tiny_words(root, "--run.dir", str(root / "run"), "--train.rounds", "6")
    for task in ("next_step", "noise_reduction", "upsampling"):
        words += [f"--tasks.{task}.sources", "[fsdkaggle2018]"]
    ended = enter(*words, "--evaluation.max_clips", "10")
    assert ended.code == 0, ended.text
    rounds = entries(root / "run", "round")
    assert len(rounds) == 6
    assert np.isfinite([value for e in rounds for key, value in e.items() if "loss" in key]).all()
    assert entries(root / "run", "bad_files") == []
    assert "nan" not in (root / "run" / "results.json").read_text().lower()


def test_losses_that_are_not_finite_are_named_skipped_and_stop_the_run(corpora_root, tmp_path):
    words = tagging_words(corpora_root, tmp_path / "run", "--train.rounds", "20")
    words += ["--optim.learning_rate", "1e30", "--tasks.audio_tagging.learning_rate", "1e30"]
    error = refused(*words, "--train.max_nonfinite", "3", "--train.checkpoint_every", "1")
    assert "3 rounds in a row had a loss that is not finite (audio_tagging: fsdkaggle2018/" in error
    found = entries(tmp_path / "run", "nonfinite_losses")
    assert [entry["total"] for entry in found] == [1, 2, 3]
    assert "fsdkaggle2018/train" in found[0]["messages"][0]
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("data/nonfinite_losses")] == [1, 2, 3]
