"""`mtl-dist prepare`: the prepared samples are the published ones, and the bytes do not know how they came about."""

import csv
import hashlib
import io
import shutil
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import tiny
from preparation import FOLDERS, SMALL, decoded, files_of, prepare, refused, rows_of, write_clips

from mtl_dist.audio.reading import open_clip, read_stretch
from mtl_dist.corpora.noise import SPLIT_SPANS
from mtl_dist.preparing import encoding, sources
from mtl_dist.preparing.pieces import Piece, expected_bytes, plan_shards


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


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
