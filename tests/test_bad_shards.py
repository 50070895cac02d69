"""Bad shards through whole runs of the real entry: refused by name, counted skips, or an end from which it goes on."""

import io
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sharded
import soundfile
import tiny
from entry import enter, entries, refused

from mtl_dist.monitor import Monitor

ROUNDS = 12


@pytest.fixture(scope="module")
def prepared(corpora_root, tmp_path_factory):
    return sharded.prepare(corpora_root, tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def root(prepared, tmp_path):
    """A copy of the prepared FSDKaggle2018 that a test may damage."""
    return shutil.copytree(prepared / "FSDKaggle2018", tmp_path / "FSDKaggle2018")


def words(prepared, root, run, *more: str) -> list[str]:
    """A run of tagging alone, without workers."""
    lengths = ["--train.rounds", str(ROUNDS), "--train.validate_every", str(ROUNDS)]
    tagging = ["--train.tasks", "[audio_tagging]", "--corpora.fsdkaggle2018.root", str(root)]
    return tiny.tiny_words(prepared, *tagging, *lengths, "--run.dir", str(run), *more)


def shard(root, number: int = 0):
    return sorted(root.glob("train-*.parquet"))[number]


def rewrite(path, change) -> None:
    """Let `change` edit the rows of a file; a row's fields may get other types."""
    rows = pq.read_table(path).to_pylist()
    change(rows)
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=3)


def no_rows(root) -> None:
    for path in root.glob("train-*.parquet"):
        pq.write_table(pq.read_table(path).slice(0, 0), path)


AT_THE_START = {
    "cut short": (
        lambda root: shard(root).write_bytes(shard(root).read_bytes()[:-100]),
        "{shard}: not a Parquet file, or cut short",
    ),
    "no rows": (no_rows, "source {root}/train-*.parquet: there are no rows in its"),
    "one id twice": (
        lambda root: rewrite(shard(root), lambda rows: rows[1].update(id=rows[0]["id"])),
        "1 ids stand twice, such as",
    ),
    "another type": (
        lambda root: rewrite(shard(root), lambda rows: [r.update(audio="a.wav") for r in rows]),
        "{shard}: column audio is of type string, but audio must be binary",
    ),
    "another type than in the others": (
        lambda root: rewrite(shard(root), lambda rows: [r.update(seconds="2") for r in rows]),
        "{shard}: column seconds is of type string, but seconds must be a number",
    ),
}


@pytest.mark.parametrize("damage", AT_THE_START)
def test_what_is_wrong_from_the_start_is_refused_by_its_name(prepared, root, tmp_path, damage):
    act, message = AT_THE_START[damage]
    act(root)
    error = refused(*words(prepared, root, tmp_path / "run"))
    assert "error: corpora.fsdkaggle2018" in error
    assert message.format(root=root, shard=shard(root)) in error
    assert not (tmp_path / "run").exists()


def learned(run) -> list[dict]:
    kept = ("loss", "count", "grad_norm", "round")
    rounds = entries(run, "round")
    return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in rounds]


@pytest.fixture(scope="module")
def whole(prepared, tmp_path_factory):
    """The run without damage."""
    run = tmp_path_factory.mktemp("whole") / "run"
    assert enter(*words(prepared, prepared / "FSDKaggle2018", run)).code == 0
    return learned(run)


AFTER_THE_START = {
    "vanishes": (lambda path: path.unlink(), "No such file"),
    "cut short": (lambda path: path.write_bytes(path.read_bytes()[:500]), "has become shorter"),
    "spoiled": (lambda path: path.write_bytes(bytes(path.stat().st_size)), "bytes are damaged"),
}


@pytest.mark.parametrize("damage", AFTER_THE_START)
def test_what_goes_wrong_later_ends_the_run_by_its_name_and_nothing_is_lost(
    prepared, root, whole, tmp_path, monkeypatch, damage
):
    act, reason = AFTER_THE_START[damage]
    victim, take_note, epoch = shard(root, 1), Monitor.round, 6  # 22 clips, 4 a round

    def damaging(monitor, number, *arguments):
        take_note(monitor, number, *arguments)
        if number == epoch:
            act(victim)

    run = tmp_path / "run"
    told = words(prepared, root, run, "--run.resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "round", damaging)
        error = refused(*told)
    assert "error: rank 0 on " in error
    assert f"corpus corpora.fsdkaggle2018, {victim}, row group " in error
    assert reason in error
    done = len(learned(run))
    assert epoch <= done < ROUNDS
    assert (run / f"checkpoints/round_{done:08d}/COMPLETE").is_file()
    shutil.copy(prepared / "FSDKaggle2018" / victim.name, victim)
    ended = enter(*told)
    assert ended.code == 0, ended.text
    assert learned(run) == whole


def broken_flac() -> bytes:
    """A clip of 3 s with noise where frames in its middle should be."""
    wave = tiny.tone(3.0, 16_000, np.random.default_rng(5), 440.0)
    file = io.BytesIO()
    soundfile.write(file, wave, 16_000, "PCM_16", format="FLAC")
    data = bytearray(file.getvalue())
    third = len(data) // 3
    data[third : 2 * third] = np.random.default_rng(6).bytes(third)
    return bytes(data)


def test_a_row_without_bytes_and_a_broken_flac_are_skipped_and_counted_by_row_and_file(
    prepared, root, tmp_path
):
    ids = []

    def spoil(rows):
        rows[0]["audio"]["bytes"], rows[1]["audio"]["bytes"] = None, broken_flac()
        rows[1]["silence_db"] = None  # where its sound lies has to be heard
        ids.extend(row["id"] for row in rows[:2])

    for number in range(3):
        rewrite(shard(root, number), spoil)
    run = tmp_path / "run"
    ended = enter(*words(prepared, root, run, "--data.max_bad_share", "0.5"))
    assert ended.code == 0, ended.text
    found = entries(run, "bad_files")
    messages = [message for entry in found for message in entry["messages"]]
    assert found[-1]["total"] == len(messages)
    named = rf"{root}/train-\S+, row group 0, row {{}} \(fsdkaggle2018/({'|'.join(ids)})\): {{}}"
    no_bytes = re.compile(named.format(0, "holds no bytes"))
    broken = re.compile(named.format(1, "(cannot be read as audio|is truncated).*"))
    assert all(no_bytes.fullmatch(m) or broken.fullmatch(m) for m in messages), messages
    assert any(map(no_bytes.fullmatch, messages))
    assert any(map(broken.fullmatch, messages))
    assert np.isfinite([entry["loss/total"] for entry in entries(run, "round")]).all()
    error = refused(*words(prepared, root, tmp_path / "strict", "--data.max_bad_share", "0.01"))
    assert "clips could not be used, more than data.max_bad_share 0.01; the last: " in error
    assert ", row group " in error


def test_a_test_side_that_vanishes_ends_a_run_that_then_has_only_to_be_scored(
    prepared, root, whole, tmp_path, monkeypatch
):
    victims, take_note = sorted(root.glob("test-*.parquet")), Monitor.round

    def damaging(monitor, number, *arguments):
        take_note(monitor, number, *arguments)
        for path in victims if number == ROUNDS else []:
            path.unlink()

    run = tmp_path / "run"
    told = words(prepared, root, run, "--run.resume", "auto")
    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "round", damaging)
        error = refused(*told)
    assert re.match(rf"error: rank 0 on .*{root}/test-.*No such file", error)
    assert not (run / "results.json").exists()
    for path in victims:
        shutil.copy(prepared / "FSDKaggle2018" / path.name, path)
    ended = enter(*told)
    assert ended.code == 0, ended.text
    assert learned(run) == whole
    assert (run / "results.json").exists()


def test_a_patience_beyond_the_ranks_own_time_limit_is_refused(prepared, root, tmp_path):
    error = refused(*words(prepared, root, tmp_path / "run", "--run.timeout_seconds", "160"))
    assert "corpora.fsdkaggle2018.remote: a fault is borne for 160 s (patience_seconds 120" in error
    assert "run.timeout_seconds 160" in error
