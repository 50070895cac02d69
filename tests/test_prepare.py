"""`mtl-dist prepare`: the prepared samples are the published ones, and the bytes do not know how they came about."""

import csv
import hashlib
import io
import json
import os
import shutil
import signal
import tarfile
import time
import zipfile
from pathlib import Path

import numpy as np
import psutil
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
import worlds

from mtl_dist import cli
from mtl_dist import prepare as preparing
from mtl_dist.audio.reading import open_clip, read_stretch
from mtl_dist.corpora.noise import SPLIT_SPANS
from mtl_dist.preparing import encoding, sources
from mtl_dist.preparing.pieces import Piece, expected_bytes, plan_shards

FOLDERS = {"fsdkaggle2018": "FSDKaggle2018", "librispeech": "LibriSpeech", "chime3": "CHiME3"}
SMALL = ("--shard_mb", "0.006", "--rows_per_group", "2")


def prepare(kind: str, source: Path, out: Path, *words: str) -> dict:
    """Prepare in this process, with two workers; return the manifest."""
    cli.main(["prepare", kind, str(source), str(out), "--workers", "2", *words])
    return json.loads((out / "manifest.json").read_text())


def refused(*words: object) -> str:
    with pytest.raises(SystemExit) as stop:
        cli.main(["prepare", *map(str, words)])
    return str(stop.value)


def rows_of(out: Path, split: str = "*") -> list[dict]:
    files = sorted(out.glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def decoded(row: dict) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
    assert rate == 16_000
    assert row["seconds"] == len(samples) / 16_000
    return samples


def files_of(out: Path) -> dict[str, bytes]:
    """Everything that is in OUT, but for unpacked archives."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "unpacked"}


@pytest.fixture
def clips(tmp_path):
    """A folder of 12 clips of 0.1 s with labels by folder."""
    rng = np.random.default_rng(0)
    for n in range(12):
        path = tmp_path / "clips" / ("cat" if n % 2 else "dog") / f"{n:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, 1600), 16_000, "PCM_16")
    return tmp_path / "clips"


@pytest.mark.parametrize("kind", ["fsdkaggle2018", "librispeech"])
def test_prepared_samples_are_those_of_the_published_files(corpora_root, tmp_path, kind):
    source = corpora_root / FOLDERS[kind]
    prepare(kind, source, tmp_path / "out", *SMALL)
    rows = {row["id"]: row for row in rows_of(tmp_path / "out")}
    listed = sources.list_clips(kind, source, None, False).rows
    assert len(listed) == {"fsdkaggle2018": 24 + 79, "librispeech": 15}[kind]
    assert set(rows) == {clip["id"] for clip in listed}
    for clip in listed:
        row, samples = rows[clip["id"]], decoded(rows[clip["id"]])
        assert [row[c] for c in ("label", "speaker", "split")] == [
            clip[c] for c in ("label", "speaker", "split")
        ]
        if kind == "librispeech":
            np.testing.assert_array_equal(samples, soundfile.read(clip["path"], dtype="int16")[0])
        else:
            with open_clip({"path": str(clip["path"])}) as file:
                wave = read_stretch(file, 0, file.frames, 16_000)
            np.testing.assert_allclose(samples / 32_768, wave.clip(-1, 1), atol=1.01 * 2**-16)


def test_rows_have_the_ids_and_splits_of_the_published_corpora(corpora_root, tmp_path):
    manifests = {
        kind: prepare(kind, corpora_root / folder, tmp_path / kind)
        for kind, folder in FOLDERS.items()
    }
    first = {kind: min(row["id"] for row in rows_of(tmp_path / kind, "t*")) for kind in FOLDERS}
    assert first == {
        "fsdkaggle2018": "test000.wav",
        "librispeech": "train-clean-100/101-7-0000",
        "chime3": "BGD_900101_010_BUS.CH1_0000",
    }
    clips = {
        kind: {s: part["clips"] for s, part in m["splits"].items()} for kind, m in manifests.items()
    }
    assert clips == {
        "fsdkaggle2018": {"test": 79, "train": 24},
        "librispeech": {"train-clean-100": 15},
        "chime3": {"train": 4, "validation": 4, "test": 4},
    }
    assert manifests["fsdkaggle2018"]["classes"] == sorted(tiny.CLASSES)
    for kind, manifest in manifests.items():
        assert (manifest["format"], manifest["kind"], manifest["rate"]) == (1, kind, 16_000)
        for split, part in manifest["splits"].items():
            rows = rows_of(tmp_path / kind, split)
            assert {row["split"] for row in rows} == {split}
            assert part["hours"] == pytest.approx(sum(r["seconds"] for r in rows) / 3600)
            assert part["clips"] == len(rows) == sum(shard["rows"] for shard in part["shards"])
    assert pq.ParquetFile(next((tmp_path / "chime3").glob("train-*"))).num_row_groups == 4


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_pieces_of_a_recording_side_by_side_are_what_each_split_may_hear(tmp_path, rate):
    wave = np.random.default_rng(0).integers(-9000, 9000, round(38 * rate)).astype(np.int16)
    path = tmp_path / "chime" / "BGD_150203_010_STR.CH3.wav"
    path.parent.mkdir()
    soundfile.write(path, wave, rate, "PCM_16")
    manifest = prepare("chime3", path.parent, tmp_path / "out")
    assert {s: part["clips"] for s, part in manifest["splits"].items()} == {
        "train": 4,
        "validation": 1,
        "test": 1,
    }
    for split, (low, high) in SPLIT_SPANS.items():
        rows = sorted(rows_of(tmp_path / "out", split), key=lambda row: row["id"])
        assert all(3.7 < row["seconds"] <= 10 for row in rows)
        heard = np.concatenate([decoded(row) for row in rows])
        start, stop = int(low * len(wave)), int(high * len(wave))
        if rate == 16_000:
            np.testing.assert_array_equal(heard, wave[start:stop])
        else:
            assert abs(len(heard) - (stop - start) * 16_000 / rate) < 3


def test_every_clip_stands_once_in_an_order_of_the_seed_alone(corpora_root, tmp_path):
    source = corpora_root / "FSDKaggle2018"
    orders = {}
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        prepare("fsdkaggle2018", source, tmp_path / name, "--seed", str(seed), *SMALL)
        orders[name] = [row["id"] for row in rows_of(tmp_path / name, "test")]
    listed = [f"test{n:03d}.wav" for n in range(79)]
    assert sorted(orders["a"]) == sorted(orders["c"]) == listed
    assert orders["a"] == orders["b"]
    assert orders["a"] != orders["c"]
    places = np.argsort(orders["a"])
    assert abs(np.corrcoef(places, np.arange(79))[0, 1]) < 0.4  # sorted: 1


def test_any_number_of_workers_writes_the_same_bytes(corpora_root, tmp_path):
    for count in ("1", "3"):
        source, out = corpora_root / "FSDKaggle2018", tmp_path / count
        prepare("fsdkaggle2018", source, out, *SMALL, "--workers", count)
    one, three = files_of(tmp_path / "1"), files_of(tmp_path / "3")
    assert len(one) > 10
    assert one == three


def start(*words: object) -> worlds.Rank:
    """Start `mtl-dist prepare` as a process of its own."""
    script = ["-m", "mtl_dist.cli", "prepare", *map(str, words)]
    return worlds.Rank(script, dict(os.environ), tiny.REPOSITORY)


def wait_for_shards(process: worlds.Rank, out: Path, count: int) -> list[str]:
    """Return the names of the whole shards once there are as many, before the process has ended."""
    until = time.monotonic() + 120
    while len(notes := list(out.glob(".preparing/*-of-*.json"))) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.002)
    return [f"{note.stem}.parquet" for note in notes]


def inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.glob("*.parquet")}


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_bytes_of_one_that_was_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for n in range(400):
        soundfile.write(tmp_path / "clips" / f"{n}.wav", rng.uniform(-1, 1, 66_150), 44_100)
    words = ("folder", tmp_path / "clips", tmp_path / "out", "--workers", 2, "--shard_mb", 0.2)
    prepare("folder", tmp_path / "clips", tmp_path / "whole", "--shard_mb", "0.2")
    whole = files_of(tmp_path / "whole")
    assert len(whole) > 20
    out, kept = tmp_path / "out", {}
    for more in (3, 6):
        process = start(*words)
        try:
            wait_for_shards(process, out, len(kept) + more)
            assert "OUT: another process is preparing" in refused(*words)
            family = psutil.Process(process.process.pid).children(recursive=True)
        finally:
            process.kill()
        assert len(family) == 2
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not (out / "manifest.json").exists()
        assert kept.items() <= inodes(out).items()
        noted = [f"{note.stem}.parquet" for note in out.glob(".preparing/*-of-*.json")]
        kept = {name: inodes(out)[name] for name in noted}
    assert start(*words).wait(120) == 0
    assert kept.items() <= inodes(out).items()
    assert files_of(out) == whole


def test_a_full_disk_is_an_error_and_what_is_whole_is_kept(clips, tmp_path):
    long = np.random.default_rng(1).uniform(-1, 1, 80_000)
    soundfile.write(clips / "cat" / "long.wav", long, 16_000)
    words = ("--shard_mb", "0.004", "--rows_per_group", "1", "--workers", "1")
    (tmp_path / "limited.py").write_text(
        "import resource, sys\nfrom mtl_dist import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\ncli.main(sys.argv[1:])\n"
    )
    script = [tmp_path / "limited.py", "prepare", "folder", clips, tmp_path / "out", *words]
    done = worlds.run(*map(str, script))
    assert done.returncode == 1
    assert "could not be written: File too large; the shards before it are whole" in done.stderr
    kept = inodes(tmp_path / "out")
    assert len(kept) > 1
    assert not list((tmp_path / "out").glob(".*.partial"))
    prepare("folder", clips, tmp_path / "out", *words)
    prepare("folder", clips, tmp_path / "whole", *words)
    assert kept.items() <= inodes(tmp_path / "out").items()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_than_it_was_begun_with_are_refused_by_name(
    clips, tmp_path, finished, monkeypatch
):
    out = tmp_path / "out"
    words = ("folder", clips, out, *SMALL)
    if finished:
        prepare(*words)
    else:
        write, calls = preparing.write_shard, []

        def full(*args):
            calls.append(args)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            return write(*args)

        monkeypatch.setattr(preparing, "write_shard", full)
        assert "No space left" in refused(*words)
        monkeypatch.undo()
    before = files_of(out) if finished else sorted(p.name for p in out.iterdir())
    for field, other in {
        "seed": ("--seed", 1),
        "rows_per_group": ("--rows_per_group", 3),
        "shard_mb": ("--shard_mb", 1),
    }.items():
        message = refused(*words, *other)
        assert f"error: {field}: is {other[1]!r}" in message.replace("1.0", "1")
    assert "error: FROM: holds other files" in refused(*words, "--labelled")
    (clips / "cat" / "01.wav").rename(clips / "cat" / "01b.wav")
    assert "error: FROM: holds other files than when" in refused(*words)
    (clips / "cat" / "01b.wav").rename(clips / "cat" / "01.wav")
    assert before == (files_of(out) if finished else sorted(p.name for p in out.iterdir()))
    prepare(*words)
    prepare("folder", clips, tmp_path / "whole", *SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_slip_before_anything_was_written_does_not_bind(clips, tmp_path):
    broken = tmp_path / "broken.csv"
    broken.write_text("file\na.wav\n")
    words = ("folder", clips, tmp_path / "out")
    assert "column path is missing; found ['file']" in refused(*words, "--manifest", broken)
    assert prepare(*words, "--seed", "5")["seed"] == 5


def test_a_manifest_gives_labels_and_splits(clips, tmp_path):
    table = tmp_path / "clips.csv"
    with open(table, "w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["path", "label", "split"])
        for n in range(12):
            folder = "cat" if n % 2 else "dog"
            writer.writerow([f"{folder}/{n:02d}.wav", folder, "test" if n > 8 else "train"])
    manifest = prepare("folder", clips, tmp_path / "out", "--manifest", str(table))
    assert manifest["classes"] == ["cat", "dog"]
    assert {s: part["clips"] for s, part in manifest["splits"].items()} == {"train": 9, "test": 3}
    assert all(row["label"] == row["id"].split("/")[0] for row in rows_of(tmp_path / "out"))
    assert prepare("folder", clips, tmp_path / "plain")["classes"] == []
    assert {row["label"] for row in rows_of(tmp_path / "plain")} == {None}


def spoil(clips: Path) -> dict[str, str]:
    """Break five of the twelve clips; return {file: what its reason says}."""
    (clips / "dog" / "00.wav").write_bytes(b"")
    (clips / "cat" / "01.wav").write_bytes(b"no audio at all")
    soundfile.write(clips / "dog" / "02.wav", np.array([0.1, np.nan]), 16_000, "FLOAT")
    whole = (clips / "cat" / "03.wav").read_bytes()
    (clips / "cat" / "03.wav").write_bytes(whole[: len(whole) // 2])
    buffer = io.BytesIO()
    wave = np.random.default_rng(0).uniform(-1, 1, 48_000)
    soundfile.write(buffer, wave, 16_000, "PCM_16", format="FLAC")
    (clips / "dog" / "04.wav").write_bytes(buffer.getvalue()[:50_000])
    reasons = ("cannot be read", "cannot be read", "NaN", "is truncated", "")
    names = ("dog/00.wav", "cat/01.wav", "dog/02.wav", "cat/03.wav", "dog/04.wav")
    return dict(zip(names, reasons, strict=True))


def test_bad_files_are_skipped_and_named_with_the_reason(clips, tmp_path):
    bad = spoil(clips)
    out = tmp_path / "out"
    manifest = prepare("folder", clips, out, "--max_bad_share", "0.5", *SMALL)
    skipped = {entry["file"]: entry["reason"] for entry in manifest["skipped"]}
    assert set(skipped) == set(bad)
    assert all(bad[name] in reason for name, reason in skipped.items())
    good = {f"{'cat' if n % 2 else 'dog'}/{n:02d}.wav" for n in range(5, 12)}
    assert {row["id"] for row in rows_of(out)} == good
    cli.main(["prepare", "--verify", str(out)])


def test_too_many_bad_files_are_an_error_and_nothing_is_marked_as_finished(clips, tmp_path):
    spoil(clips)
    message = refused("folder", clips, tmp_path / "out", "--max_bad_share", "0.35", *SMALL)
    assert "--max_bad_share: 5 of 12 clips cannot be used, such as" in message
    assert not (tmp_path / "out" / "manifest.json").exists()
    assert "was not prepared to its end" in refused("--verify", tmp_path / "out")
    prepare("folder", clips, tmp_path / "out", "--max_bad_share", "0.5", *SMALL)


def test_files_that_a_table_names_and_that_are_not_there_are_skipped(corpora_root, tmp_path):
    shutil.copytree(corpora_root / "FSDKaggle2018", tmp_path / "fsd")
    (tmp_path / "fsd/FSDKaggle2018.audio_test/test007.wav").unlink()
    manifest = prepare("fsdkaggle2018", tmp_path / "fsd", tmp_path / "out")
    name = "FSDKaggle2018.audio_test/test007.wav"
    assert manifest["skipped"] == [{"file": name, "reason": "is not there"}]


def test_samples_beyond_full_scale_are_clipped_and_counted(tmp_path):
    wave = np.array([0.5, 1.5, -2.0, 1.0, -1.0, 0.25])
    (tmp_path / "in").mkdir()
    soundfile.write(tmp_path / "in" / "loud.wav", np.stack([wave, wave], 1), 16_000, "FLOAT")
    assert prepare("folder", tmp_path / "in", tmp_path / "out")["clipped_samples"] == 2
    (row,) = rows_of(tmp_path / "out")
    assert decoded(row).tolist() == [16_384, 32_767, -32_768, 32_767, -32_768, 8192]


@pytest.mark.parametrize("rate", [16_000, 44_100, 11_025])
@pytest.mark.parametrize("seconds", [0.0001, 2.4, 2.6, 5.31])
def test_a_long_file_in_stretches_is_the_file_in_one(tmp_path, monkeypatch, rate, seconds):
    frames = max(1, round(seconds * rate))
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, frames)
    soundfile.write(tmp_path / "a.wav", wave, rate, "PCM_16")
    piece = Piece("a", str(tmp_path / "a.wav"), "a.wav", None, None, "train", 0, frames, rate)
    truth, samples, _ = encoding.encode(piece)
    monkeypatch.setattr(encoding, "STRETCH_SECONDS", 1)
    data, count, _ = encoding.encode(piece)
    one, many = (soundfile.read(io.BytesIO(b), dtype="int16")[0] for b in (truth, data))
    assert count == samples == max(1, round(frames * 16_000 / rate))
    assert np.abs(one.astype(int) - many).max() <= (0 if rate == 16_000 else 4)


def test_shards_hold_whole_row_groups_and_about_as_much_as_was_asked_for():
    rng = np.random.default_rng(0)
    pieces = [
        Piece(f"{n:04d}", "", "", None, None, "train", 0, int(rng.integers(8000, 240_000)), 16_000)
        for n in range(5000)
    ]
    shards = plan_shards(pieces, 0, 16, 5.0)
    planned = [piece.id for shard in shards for piece in shard.pieces]
    assert sorted(planned) == [piece.id for piece in pieces]
    assert all(len(shard.pieces) % 16 == 0 for shard in shards[:-1])
    one_group = 16 * 15 * expected_bytes([pieces[0]]) / pieces[0].seconds
    assert len(shards) == round(expected_bytes(pieces) / 5e6)
    assert all(abs(expected_bytes(shard.pieces) - 5e6) < 1.1 * one_group for shard in shards)
    assert shards[3].file == f"train-00003-of-{len(shards):05d}.parquet"


@pytest.fixture
def prepared(clips, tmp_path):
    prepare("folder", clips, tmp_path / "out", *SMALL)
    return tmp_path / "out"


def verified(out: Path, capsys) -> tuple[int, str]:
    capsys.readouterr()
    try:
        cli.main(["prepare", "--verify", str(out), "--workers", "1"])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("byte", [30, 2000], ids=["stream info", "frame"])
def test_verify_names_shard_and_row_of_a_flipped_byte(prepared, capsys, row, byte):
    assert verified(prepared, capsys)[0] == 0
    path = sorted(prepared.glob("*.parquet"))[1]
    (clip,) = pq.read_table(path).slice(row, 1).to_pylist()
    whole = bytearray(path.read_bytes())
    whole[whole.index(clip["audio"]["bytes"]) + byte] ^= 16
    path.write_bytes(whole)
    code, text = verified(prepared, capsys)
    assert code == 1
    assert f"{path.name}: blake2b is" in text
    assert f"{path.name}, row {row} ({clip['id']}): " in text
    assert text.count(", row ") == 1


def test_verify_finds_lost_cut_repeated_and_foreign_shards(prepared, capsys):
    first, second, third = sorted(prepared.glob("*.parquet"))[:3]
    kept = second.read_bytes()
    second.unlink()
    code, text = verified(prepared, capsys)
    assert (code, f"{second.name}: is not there" in text) == (1, True)
    assert "train: 10 clips" in text
    second.write_bytes(kept[:-100])
    code, text = verified(prepared, capsys)
    assert (code, f"{second.name}: cannot be read as Parquet" in text) == (1, True)
    second.write_bytes(first.read_bytes())
    code, text = verified(prepared, capsys)
    assert f"{second.name}, row 0 ({rows_of(prepared)[0]['id']}): stands in {first.name}" in text
    second.write_bytes(kept)
    shutil.copy(third, prepared / "train-00007-of-00009.parquet")
    code, text = verified(prepared, capsys)
    assert (code, "train-00007-of-00009.parquet: the manifest does not know it" in text) == (1, 1)


def zipped(root: Path, into: Path) -> Path:
    """Write the published archives of a FSDKaggle2018 folder."""
    into.mkdir()
    for part in root.iterdir():
        with zipfile.ZipFile(into / f"{part.name}.zip", "w") as archive:
            for file in part.iterdir():
                archive.write(file, f"{part.name}/{file.name}")
    return into


def test_published_archives_are_checked_and_unpacked_and_give_the_same_bytes(
    corpora_root, tmp_path, monkeypatch, capsys
):
    archives = zipped(corpora_root / "FSDKaggle2018", tmp_path / "zips")
    words = ("fsdkaggle2018", archives, tmp_path / "out")
    assert "its md5 is" in (message := refused(*words))
    assert "a8b47ff4b52022c178f88fa5c6f080d0" in message or "download it again" in message
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in archives.iterdir()}
    monkeypatch.setattr(sources, "MD5", md5)
    prepare(*words)
    assert f"rm -r {tmp_path / 'out' / 'unpacked'}" in capsys.readouterr().out
    prepare("fsdkaggle2018", corpora_root / "FSDKaggle2018", tmp_path / "folder")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "folder")
    shutil.rmtree(tmp_path / "out" / "unpacked")
    prepare(*words)  # finished: nothing is unpacked again
    assert not (tmp_path / "out" / "unpacked").exists()


def test_tars_of_unknown_md5_are_taken_with_a_note_and_broken_ones_refused(
    corpora_root, tmp_path, caplog
):
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars" / "dev-tiny.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(corpora_root / "LibriSpeech", "LibriSpeech")
    manifest = prepare("librispeech", tmp_path / "tars", tmp_path / "out")
    assert manifest["splits"]["train-clean-100"]["clips"] == 15
    assert "dev-tiny.tar.gz is taken unchecked: its md5 is not known" in caplog.text
    path.write_bytes(path.read_bytes()[:-2000])
    message = refused("librispeech", tmp_path / "tars", tmp_path / "other")
    assert "dev-tiny.tar.gz: cannot be unpacked" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["fsdkagle2018", "CLIPS", "NEW"], "KIND: 'fsdkagle2018' is not known; did you mean 'fsdkaggle2018'"),
        (["librispeech", "/gone", "NEW"], "FROM: /gone does not exist"),
        (["librispeech", "FULL", "NEW"], "is not librispeech as published: it holds neither"),
        (["chime3", "FULL/x.txt", "NEW"], "FROM: FULL/x.txt is a file; name the folder"),
        (["folder", "CLIPS", "FULL"], "OUT: FULL is not empty and not a prepared corpus"),
        (["folder", "CLIPS", "FULL/x.txt"], "OUT: FULL/x.txt is not a folder"),
        (["folder", "FULL", "NEW"], "no audio files in FULL"),
        (["folder", "CLIPS"], "KIND, FROM and OUT are needed"),
        (["folder", "CLIPS", "NEW", "--manifest", "/gone.csv"], "the file /gone.csv does not exist"),
        (["chime3", "CLIPS", "NEW", "--labelled"], "--labelled: is for the kind folder only"),
        (["folder", "CLIPS", "NEW", "--workers", "0"], "--workers: 0 is not allowed"),
        (["folder", "CLIPS", "NEW", "--rows_per_group", "0"], "--rows_per_group: 0 is not allowed"),
        (["folder", "CLIPS", "NEW", "--shard_mb", "nan"], "--shard_mb: nan is not allowed"),
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
    assert (tmp_path / "full" / "x.txt").read_text() == "mine"
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_a_worker_that_is_killed_is_an_error_that_says_how_to_go_on(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for n in range(200):
        soundfile.write(tmp_path / "clips" / f"{n}.wav", rng.uniform(-1, 1, 66_150), 44_100)
    words = ("folder", tmp_path / "clips", tmp_path / "out", "--workers", 2, "--shard_mb", 0.1)
    process = start(*words)
    wait_for_shards(process, tmp_path / "out", 2)
    os.kill(psutil.Process(process.process.pid).children()[0].pid, signal.SIGKILL)
    assert process.wait(60) == 1
    _, text = process.texts()
    assert "error: a worker was killed" in text
    assert "Traceback" not in text
