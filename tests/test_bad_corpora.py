"""What a user can get wrong about corpora: tables, folders and files that are missing or say something else."""

import csv
import re
import shutil

import pytest
from entry import enter, entries, refused, tagging_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.config import ConfigError, load_config
from mtl_dist.data.corpora import CORPORA
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
        (["--corpora.librispeech.root", "EMPTY/x"], "UTTERANCE.flac in the folders train-clean-100 of"),
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
        CORPORA["folder"](**fields).open("folder", 0)


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
        CORPORA["folder"](manifest=str(tmp_path / "m.csv")).open("folder", 0)


def test_a_wrong_split_in_a_manifest_is_named_with_its_line(tmp_path):
    (tmp_path / "m.csv").write_text("path,split\na.wav,training\n")
    with pytest.raises(
        ValueError, match=r"m\.csv, line 2, column split: 'training' \(allowed: train,"
    ):
        CORPORA["folder"](manifest=str(tmp_path / "m.csv")).open("folder", 0)


def test_a_labelled_task_on_an_unlabelled_corpus_is_refused(corpora_root, tmp_path):
    words = tagging_words(corpora_root, tmp_path / "run", "--tasks.audio_tagging.sources")
    assert "a labelled task needs corpora with labels" in refused(*words, "[librispeech]")


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
