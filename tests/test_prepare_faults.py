"""`mtl-dist prepare` when something goes wrong: it goes on where it was, names what is wrong, and `--verify` finds it."""

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
from test_prepare import SMALL, decoded, files_of, prepared, rows_of, run, write_clips

from mtl_dist.data import shards

TEN = ("--rows_per_shard", 2, "--rows_per_group", 1, "--workers", 2)
SCRIPT = """
import argparse, resource, sys
from mtl_dist.data.prepare import add_prepare
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
parser = argparse.ArgumentParser()
add_prepare(parser.add_subparsers())
options, overrides = parser.parse_known_args(sys.argv[2:])
try:
    options.act(options, overrides)
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


@pytest.fixture
def long_clips(tmp_path):
    """Forty clips that take two processes several seconds."""
    return write_clips(tmp_path / "clips", clips=40, seconds=90.0)


def refused(*words: object) -> str:
    with pytest.raises((ValueError, OSError)) as error:
        run(*words)
    return str(error.value)


def start(*words: object, limit: int = -1) -> subprocess.Popen:
    """Start `mtl-dist prepare` as a process of its own, which may write files of `limit` bytes."""
    script = [sys.executable, "-c", SCRIPT, str(limit), "prepare", *map(str, words)]
    return subprocess.Popen(script, cwd=tiny.REPOSITORY, stderr=subprocess.PIPE, text=True)


def noted(out: Path) -> dict[str, int]:
    """Return {name: inode} of the shards that are whole."""
    names = [note.stem for note in out.glob(".preparing/*-of-*.json")]
    return {name: (out / f"{name}.parquet").stat().st_ino for name in names}


def wait_for_shards(process: subprocess.Popen, out: Path, count: int) -> None:
    """Wait until as many shards are whole, and the process has not ended."""
    until = time.monotonic() + 120
    while len(noted(out)) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.01)


def inodes(out: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_ino for path in out.glob("*.parquet")}


@pytest.mark.slow
def test_killed_stopped_and_started_again_it_ends_with_the_bytes_of_one_that_was_left_alone(
    long_clips, tmp_path
):
    words, kept = ("folder", long_clips, tmp_path / "out", *TEN), {}
    prepared("folder", long_clips, tmp_path / "whole", *TEN)
    for number, code in ((signal.SIGKILL, -9), (signal.SIGINT, 130), ("a worker", 1)):
        process = start(*words)
        try:
            wait_for_shards(process, tmp_path / "out", len(kept) + 1)
            family = psutil.Process(process.pid).children(recursive=True)
            if number == signal.SIGKILL:
                assert "OUT: another process is preparing" in refused(*words)
            if number == "a worker":
                family[0].kill()
            else:
                process.send_signal(number)
            assert process.wait(60) == code
        finally:
            process.kill()
        assert len(family) == 3  # two workers and what collects from them
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not (tmp_path / "out" / "manifest.json").exists()
        assert kept.items() <= inodes(tmp_path / "out").items()
        kept = noted(tmp_path / "out")
        text = process.stderr.read()
        assert "Traceback" not in text
        told = {signal.SIGINT: "stopped; start the same", "a worker": "error: a worker was killed"}
        assert told.get(number, "") in text
    prepared(*words)
    assert kept.items() <= inodes(tmp_path / "out").items()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


def test_a_full_disk_is_an_error_and_what_is_whole_is_kept(clips, tmp_path):
    long = np.random.default_rng(1).uniform(-1, 1, 80_000)
    soundfile.write(clips / "cat" / "long.wav", long, 16_000)
    words = ("folder", clips, tmp_path / "out", *TEN[:4], "--workers", 1)
    process = start(*words, limit=60_000)
    _, text = process.communicate(timeout=60)
    assert process.returncode == 1
    assert ".parquet could not be written: File too large; shards that are whole are kept" in text
    assert not list((tmp_path / "out").glob(".*.partial"))
    kept = inodes(tmp_path / "out")
    assert kept
    prepared(*words)
    prepared("folder", clips, tmp_path / "whole", *TEN)
    assert kept.items() <= inodes(tmp_path / "out").items()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_or_files_than_it_was_begun_with_are_refused_by_name(
    clips, tmp_path, finished, monkeypatch
):
    out, words = tmp_path / "out", ("folder", clips, tmp_path / "out", *SMALL)
    if finished:
        prepared(*words)
    else:
        encode = shards.encode

        def full(audio, *more):
            if audio["path"].endswith("07.wav"):
                raise OSError(28, "No space left on device")
            return encode(audio, *more)

        monkeypatch.setattr(shards, "encode", full)
        assert "No space left" in refused(*words, "--workers", 1)
        monkeypatch.undo()
    before = inodes(out)
    for field in ("seed", "rows_per_shard", "rows_per_group"):
        assert f"{field}: is 5 and was" in refused(*words, f"--{field}", 5)
    assert "encoding: is 'wav' and was 'flac'" in refused(*words, "--encoding", "wav")
    assert "FROM: holds other files" in refused(*words, "--labelled")
    (clips / "cat" / "01.wav").rename(clips / "cat" / "01b.wav")
    assert f"FROM: holds other files than when {out} was begun" in refused(*words)
    (clips / "cat" / "01b.wav").rename(clips / "cat" / "01.wav")
    assert before == inodes(out)
    prepared(*words)
    prepared("folder", clips, tmp_path / "whole", *SMALL)
    assert before.items() <= inodes(out).items()
    assert files_of(out) == files_of(tmp_path / "whole")


def spoil(clips: Path) -> dict[str, str]:
    """Break four of the twelve clips; return {file: what its reason says}."""
    (clips / "dog" / "00.wav").write_bytes(b"")
    (clips / "cat" / "01.wav").write_bytes(b"no audio at all")
    soundfile.write(clips / "dog" / "02.wav", np.array([0.1, np.nan]), 16_000, "FLOAT")
    whole = (clips / "cat" / "03.wav").read_bytes()
    (clips / "cat" / "03.wav").write_bytes(whole[: len(whole) // 2])
    reasons = ("cannot be read", "cannot be read", "NaN", "is truncated")
    names = ("dog/00.wav", "cat/01.wav", "dog/02.wav", "cat/03.wav")
    return dict(zip(names, reasons, strict=True))


def test_bad_files_are_skipped_by_name_and_too_many_are_an_error(clips, tmp_path, caplog):
    bad, words = spoil(clips), ("folder", clips, tmp_path / "out", *SMALL, "--max_bad_share")
    assert "of 12 clips cannot be used, such as" in refused(*words, 0.3)
    assert "was not prepared to its end" in refused("--verify", tmp_path / "out")
    manifest = prepared(*words, 0.5)
    skipped = {entry["file"]: entry["reason"] for entry in manifest["skipped"]}
    assert set(skipped) == set(bad)
    assert all(bad[name] in reason for name, reason in skipped.items())
    assert all(f"skipped: {name}" in caplog.text for name in bad)
    assert len(rows_of(tmp_path / "out")) == manifest["splits"]["train"]["clips"] == 8
    run("--verify", tmp_path / "out")


def test_files_that_a_table_names_and_that_are_not_there_are_skipped(corpora_root, tmp_path):
    shutil.copytree(corpora_root / "FSDKaggle2018", tmp_path / "fsd")
    (tmp_path / "fsd/FSDKaggle2018.audio_test/test007.wav").unlink()
    manifest = prepared("fsdkaggle2018", tmp_path / "fsd", tmp_path / "out")
    name = "FSDKaggle2018.audio_test/test007.wav"
    assert manifest["skipped"] == [{"file": name, "reason": "is not there"}]


def test_samples_beyond_full_scale_are_clipped_and_counted(tmp_path):
    wave = np.array([0.5, 1.5, -2.0, 1.0, -1.0, 0.25])
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "loud.wav", np.stack([wave, wave], 1), 16_000, "FLOAT")
    assert prepared("folder", tmp_path / "in", tmp_path / "out")["clipped_samples"] == 2
    (row,) = rows_of(tmp_path / "out")
    assert decoded(row).tolist() == [16_384, 32_767, -32_768, 32_767, -32_768, 8192]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fsdkagle2018", "CLIPS", "NEW"], "KIND: 'fsdkagle2018' is not known; did you mean 'fsdkaggle2018'"),
        (["librispeech", "FULL", "NEW"], "is not librispeech as published: it holds neither"),
        (["chime3", "FULL/x.txt", "NEW"], "FROM: FULL/x.txt is a file; name the folder"),
        (["folder", "CLIPS", "FULL"], "OUT: FULL is not empty and not a prepared corpus"),
        (["folder", "CLIPS"], "KIND, FROM and OUT are needed"),
        (["folder", "CLIPS", "NEW", "--splits", "a"], "--splits: is for the kind librispeech only"),
        (["folder", "CLIPS", "NEW", "--rows_per_shard", "0"], "--rows_per_shard: 0 is not allowed"),
        (["folder", "CLIPS", "NEW", "--max_bad_share", "nan"], "--max_bad_share: nan is not allowed"),
        (["folder", "CLIPS", "NEW", "--sed", "1"], "--sed: not known"),
        (["--verify", "FULL"], "FULL is not prepared: there is no FULL/manifest.json"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line_that_names_them(clips, tmp_path, words, message):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x.txt").write_text("mine")
    places = {"CLIPS": str(clips), "FULL": str(tmp_path / "full"), "NEW": str(tmp_path / "out")}

    def real(text: str) -> str:
        for name, place in places.items():
            text = text.replace(name, place)
        return text

    assert real(message) in refused(*map(real, words))
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["x.txt"]
    assert not (tmp_path / "out" / "manifest.json").exists()


def verified(out: Path, capsys) -> str | None:
    """Return what `--verify` says is wrong; None if nothing is."""
    capsys.readouterr()
    try:
        run("--verify", out, "--workers", "1")
    except SystemExit as stop:
        return capsys.readouterr().out if stop.code == 1 else None
    return None


def test_verify_names_shard_and_row_of_a_flipped_byte(clips, tmp_path, capsys):
    prepared("folder", clips, tmp_path / "out", "--rows_per_shard", 4, "--rows_per_group", 2)
    assert verified(tmp_path / "out", capsys) is None
    path = sorted((tmp_path / "out").glob("*.parquet"))[1]
    (clip,) = pq.read_table(path).slice(1, 1).to_pylist()
    file, sound = bytearray(path.read_bytes()), clip["audio"]["bytes"]
    file[file.index(sound[2000:2040]) + 20] ^= 16
    path.write_bytes(file)
    text = verified(tmp_path / "out", capsys)
    assert f"{path.name}: blake2b is" in text
    assert f"{path.name}, row 1 ({clip['id']}): " in text
    assert text.count(", row ") == 1


def test_verify_finds_lost_cut_changed_repeated_and_foreign_shards(clips, tmp_path, capsys):
    out = tmp_path / "out"
    prepared("folder", clips, out, "--rows_per_shard", 4, "--rows_per_group", 2)
    first, second, third = sorted(out.glob("*.parquet"))
    kept = second.read_bytes()
    second.unlink()
    text = verified(out, capsys)
    assert f"{second.name}: is not there" in text
    assert "train: 8 clips" in text
    second.write_bytes(kept[:-100])
    assert f"{second.name}: cannot be read as Parquet" in verified(out, capsys)
    second.write_bytes(first.read_bytes())
    place = f"{second.name}, row 0 ({rows_of(out)[0]['id']}): stands in {first.name}"
    assert place in verified(out, capsys)
    second.write_bytes(kept)
    table = pq.read_table(second)
    pq.write_table(table.slice(0, 3), second)
    assert f"{second.name}: rows is 3, the manifest says 4" in verified(out, capsys)
    number = table.column_names.index("sound_stop")
    pq.write_table(table.set_column(number, "sound_stop", [[1599] * 4]), second)
    assert f"{second.name}, row 3 (" in (text := verified(out, capsys))
    assert "'sound_stop': 1600}, its columns say otherwise" in text
    second.write_bytes(kept)
    shutil.copy(third, out / "train-00007-of-00009.parquet")
    text = verified(out, capsys)
    assert "train-00007-of-00009.parquet: the manifest does not know it" in text
