"""What is wrong with a source: a clear error with field, file and remedy, or a counted skip; never a lost run."""

import gzip
import io
import re
import shutil
from pathlib import Path

import fsspec
import kinds
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
from entry import enter, entries, refused
from test_sources import NO_SHARES, of

from mtl_dist.data.faults import DataError
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.monitor import Monitor

ROUNDS = 12
TRAIN = kinds.clips(24)
"""Six rounds an epoch."""


def words(path, run, *more: str, columns: str = "", tasks: str = "[next_step]") -> list[str]:
    """Words of a run of next_step on a source of unlabelled audio."""
    listed = f"[{{path: '{path}', columns: {{{columns}}}}}]"
    corpus = "[folder]" if "tagging" in tasks else "[unlabelled_folder]"
    told = {
        "train.tasks": tasks,
        "train.main_task": tasks.strip("[]"),
        f"tasks.{tasks.strip('[]')}.sources": corpus,
        f"corpora.{corpus.strip('[]')}.sources": listed,
        "train.rounds": str(ROUNDS),
        "train.validate_every": str(ROUNDS),
        "run.dir": str(run),
    }
    pairs = [word for name, value in told.items() for word in (f"--{name}", value)]
    return tiny.tiny_words(Path("/nowhere"), *pairs, *more)


def data_set(folder: Path) -> Path:
    """Write a data set with all three sides, of which train has eight row groups in three files."""
    kinds.shards(folder, TRAIN)
    for first, split in ((50, "validation"), (60, "test")):
        kinds.shards(folder, kinds.clips(5, first), name=split)
    return folder


def shard(folder: Path, number: int = 0, split: str = "train") -> Path:
    return sorted(folder.glob(f"{split}-*.parquet"))[number]


def rewrite(path: Path, change) -> None:
    """Let `change` edit the rows of a file; a column may get another type."""
    rows = pq.read_table(path).to_pylist()
    change(rows)
    kinds.parquet(path, rows, schema=None)


def no_rows(folder: Path) -> None:
    for path in folder.glob("train-*.parquet"):
        kinds.parquet(path, [])


def script(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    (folder / "clips.py").write_text("raise SystemExit('this was run')\n")


SPOILT = {
    "cut short": (
        lambda root: shard(root).write_bytes(shard(root).read_bytes()[:-100]), "", "train-00000-of-00003",
    ),
    "no bytes": (lambda root: shard(root).write_bytes(b""), "", "train-00000-of-00003"),
    "no rows": (no_rows, "", "holds? no clips|hold no training clips"),
    "no audio": (
        lambda root: [rewrite(p, lambda rows: [r.pop("audio") for r in rows]) for p in root.glob("*")],
        "", r"there is no column audio \(found: id.*set columns\.audio",
    ),
    "another type": (
        lambda root: [
            rewrite(p, lambda rows: [r.update(audio=1.5) for r in rows]) for p in root.glob("*")
        ], "", "column audio is of type double, but audio must be binary",
    ),
    "no such column": (lambda root: None, "speaker: who", "columns.speaker: there is no column who"),
    "unknown name": (
        lambda root: None, "speakr: id", r"unknown name 'speakr' \(allowed: audio, id, label, speaker",
    ),
    "no such member": (lambda root: None, "label: audio.tag", "columns.label: there is no audio.tag"),
    "two kinds": (
        lambda root: kinds.tars(root, TRAIN), "", "name files of one kind .* by each source|mtl-dist prepare",
    ),
    "a script": (script, "", "no audio files in .*data"),
    "nothing": (lambda root: shutil.rmtree(root), "", "the folder .* does not exist"),
}  # fmt: skip


@pytest.mark.parametrize("how", SPOILT)
def test_what_is_wrong_from_the_start_is_refused_with_its_field_and_file(tmp_path, how):
    act, columns, message = SPOILT[how]
    root = data_set(tmp_path / "data")
    act(root)
    error = refused(*words(root, tmp_path / "run", columns=columns))
    assert error.startswith(("error: corpora.unlabelled_folder", "error: tasks.next_step")), error
    assert re.search(message, error), error
    assert not (tmp_path / "run").exists()


LABELLED = {
    "one id twice": (
        lambda rows: rows[1].update(id=rows[0]["id"]), r"corpora\.folder: .*two clips have the id 'cat/0008",
    ),
    "no label": (lambda rows: rows[2].update(label=None), r"corpora\.folder: \S+00001-of-00003\S+ a row has no label"),
    "no id": (lambda rows: rows[2].update(id=None), r"corpora\.folder: \S+00001-of-00003\S+ a row has no id"),
    "another type": (
        lambda rows: [row.update(label=[row["label"]]) for row in rows], r"corpora\.folder: \S+00001-of-00003",
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", LABELLED)
def test_labels_that_cannot_be_told_are_refused_with_their_file(tmp_path, how):
    root = data_set(tmp_path / "data")
    change, message = LABELLED[how]
    rewrite(shard(root, 1), change)
    error = refused(*words(root, tmp_path / "run", tasks="[audio_tagging]"))
    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("a.tar.gz", r"a\.tar\.gz is compressed, .*unpack it to a plain \.tar"),
        ("*.gz", r"a\.tar\.gz is compressed, .*unpack it"),
        ("b.tar", r"b\.tar"),
        ("*.tar", r"b\.tar"),
        ("c{0..1}.tar", r"c1\.tar does not exist"),
        ("*.parquet", "does not exist, or holds neither data nor audio files"),
        ("{a.tar.gz,d.parquet}", "name files of one kind|is compressed"),
        ("d.{parquet,jsonl}", r"\.jsonl, \.parquet files in .*; name files of one kind"),
        ("nosuchprotocol://x/y.parquet", "nosuchprotocol"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named(tmp_path, path, message):
    data = kinds.tar(tmp_path / "c0.tar", [("a.flac", kinds.flac(0))]).read_bytes()
    (tmp_path / "a.tar.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.tar").write_bytes(gzip.compress(data))
    kinds.parquet(tmp_path / ("d.parquet" if "d." in path else "d.other"), TRAIN)
    (tmp_path / "d.jsonl").write_text('{"id": "a", "path": "a.wav"}\n')
    place = path if "://" in path else f"{tmp_path}/{path}"
    with pytest.raises(ValueError, match=rf"corpora\.mine\S+ .*{message}"):
        of({"path": place})


def learned(run: Path) -> list[dict]:
    kept = ("loss", "count", "grad_norm", "round")
    rounds = entries(run, "round")
    return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in rounds]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """What a run without damage learns."""
    root = tmp_path_factory.mktemp("whole")
    assert enter(*words(data_set(root / "data"), root / "run")).code == 0
    return learned(root / "run")


AFTER_THE_START = {
    "gone": lambda path: path.unlink(),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:500]),
    "spoilt": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "replaced": lambda path: kinds.parquet(path, kinds.clips(8, first=100)),
}


@pytest.mark.parametrize("how", AFTER_THE_START)
def test_what_happens_to_a_shard_later_ends_the_run_by_its_name_and_nothing_is_lost(
    tmp_path, whole, monkeypatch, how
):
    root, run = data_set(tmp_path / "data"), tmp_path / "run"
    victim, kept, note, epoch = shard(root, 1), tmp_path / "kept", Monitor.round, 6
    shutil.copy2(victim, kept)

    def damaging(monitor, number, *arguments):
        note(monitor, number, *arguments)
        if number == epoch:
            AFTER_THE_START[how](victim)

    told = words(root, run, "--run.resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "round", damaging)
        error = refused(*told)
    assert re.match(r"error: rank 0 on \S+, corpus unlabelled_folder, ", error)
    assert f"{victim}, part " in error
    assert "is gone or was changed since it was opened" in error
    done = len(learned(run))
    assert epoch <= done < ROUNDS
    assert (run / f"checkpoints/round_{done:08d}/COMPLETE").is_file()
    shutil.copy2(kept, victim)
    ended = enter(*told)
    assert ended.code == 0, ended.text
    assert learned(run) == whole


def test_a_test_side_that_vanishes_ends_a_run_that_then_has_only_to_be_scored(
    tmp_path, whole, monkeypatch
):
    root, run, note = data_set(tmp_path / "data"), tmp_path / "run", Monitor.round
    victim = shard(root, split="test")
    away = victim.with_suffix(".away")

    def damaging(monitor, number, *arguments):
        note(monitor, number, *arguments)
        if number == ROUNDS:
            victim.rename(away)

    told = words(root, run, "--run.resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "round", damaging)
        error = refused(*told)
    assert re.match(rf"error: rank 0 on .*{victim}", error)
    assert not (run / "results.json").exists()
    away.rename(victim)
    ended = enter(*told)
    assert ended.code == 0, ended.text
    assert learned(run) == whole
    assert (run / "results.json").exists()


def test_rows_without_audio_and_a_broken_flac_are_skipped_and_counted_by_file_and_row(tmp_path):
    wave = tiny.tone(3.0, kinds.RATE, np.random.default_rng(5), 440.0)
    file = io.BytesIO()
    soundfile.write(file, wave, kinds.RATE, "PCM_16", format="FLAC")
    broken, part = bytearray(file.getvalue()), len(file.getvalue()) // 10
    broken[part : 9 * part] = np.random.default_rng(6).bytes(8 * part)  # wherever a crop falls
    root, run = data_set(tmp_path / "data"), tmp_path / "run"
    rows = pq.read_table(shard(root)).to_pylist()
    rows[0]["audio"], rows[1]["audio"]["bytes"] = None, None
    rows[2]["audio"]["bytes"] = bytes(broken)
    kinds.parquet(shard(root), rows)
    ended = enter(*words(root, run, "--data.max_bad_share", "0.5"))
    assert ended.code == 0, ended.text
    found = entries(run, "bad_files")
    messages = [message for entry in found for message in entry["messages"]]
    cannot = r"(cannot be read as audio|is truncated) ?.*"
    named = f"{shard(root)}, part 0 of 3, row"
    reasons = [
        rf"{named} 0 \(cat/0000.flac\): holds no bytes",
        f"{root}/dog/0001.flac: {cannot}",
        rf"{named} 2 \(cat/0002.flac\): {cannot}",
    ]
    for name in reasons:
        assert 1 <= sum(bool(re.fullmatch(name, message)) for message in messages) <= 2, "\n".join(
            messages
        )
    assert found[-1]["total"] == len(messages)
    error = refused(*words(root, tmp_path / "strict", "--data.max_bad_share", "0.01"))
    assert "clips could not be used, more than data.max_bad_share 0.01; the last: " in error
    assert str(root) in error


def test_a_source_without_other_sides_trains_all_the_same(tmp_path):
    kinds.shards(tmp_path / "data", TRAIN)
    shares = [f"--corpora.unlabelled_folder.{side}_share=0" for side in ("validation", "test")]
    ended = enter(*words(tmp_path / "data", tmp_path / "run", *shares, "--train.rounds", "2"))
    assert ended.code == 0, ended.text


CHANGED = {
    "changed": lambda path: kinds.parquet(path, kinds.clips(8, first=100)),
    "is new": lambda path: kinds.parquet(path.with_name("train-00009.parquet"), TRAIN[:3]),
    "is gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("how", CHANGED)
@pytest.mark.parametrize("where", ["disk", "URL"])
def test_files_that_changed_since_the_checkpoint_are_refused_by_name(tmp_path, where, how):
    fsspec.filesystem("memory").store.clear()
    root = data_set(tmp_path / "data")
    path = root / "train-*.parquet" if where == "disk" else kinds.to_memory(root, "d") + "/train-*"
    told = words(path, tmp_path / "run", "--run.resume", "auto", "--train.rounds")
    assert enter(*told, "2").code == 0
    CHANGED[how](shard(root, 1))
    system = fsspec.filesystem("memory")
    for path in [path for path in system.find("/d") if not (root / Path(path).name).exists()]:
        system.rm_file(path)
    for path in root.iterdir():
        far = f"/d/{path.name}"
        if not system.exists(far) or system.cat_file(far) != path.read_bytes():
            system.pipe_file(far, path.read_bytes())
    name = "train-00009.parquet" if how == "is new" else "train-00001-of-00003.parquet"
    error = refused(*told, "4")
    assert re.search(rf"corpora\.unlabelled_folder, source 0: {name} {how} since", error), error


@pytest.mark.parametrize("kind", ["Parquet", "tars"])
def test_fewer_rows_than_a_round_and_lanes_without_a_block_work(tmp_path, kind):
    write = {"Parquet": kinds.shards, "tars": kinds.tars}[kind]
    write(tmp_path / "data", TRAIN[:6])
    for first, split in ((50, "validation"), (60, "test")):
        part = write(tmp_path / split, kinds.clips(5, first))
        for path in part.iterdir():
            path.rename(tmp_path / "data" / f"{split}-{path.name.partition('-')[2]}")
    more = ["--train.global_batch", "8", "--train.rounds", "6"]
    ended = enter(*words(tmp_path / "data", tmp_path / "run", *more))
    assert ended.code == 0, ended.text
    found = learned(tmp_path / "run")
    assert [entry["count/next_step"] > 0 for entry in found] == [True] * 6


def test_empty_files_and_row_groups_are_passed_over_and_nothing_but_those_is_an_error(tmp_path):
    for number, rows in enumerate(([], TRAIN[:5], [])):
        kinds.parquet(tmp_path / f"{number}.parquet", rows)
    corpus = of({"path": f"{tmp_path}/*.parquet"}, **NO_SHARES)
    lane = Lane(Blocks(corpus.parts["train"]), 1, 0, ())
    heard = [next(lane)[1].id for _ in range(10)]
    assert (
        sorted(heard[:5]) == sorted(heard[5:]) == sorted(f"mine/{row['id']}" for row in TRAIN[:5])
    )
    assert of({"path": f"{tmp_path}/*.parquet"}, kind="folder").classes == ["cat", "dog"]
    (part,) = corpus.parts["train"]
    part.keep = frozenset().__contains__
    with pytest.raises(DataError, match=r"corpus mine: none of its . blocks holds a clip"):
        next(Lane(Blocks([part]), 1, 0, ()))
