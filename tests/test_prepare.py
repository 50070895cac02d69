"""`mtl-dist prepare`: the prepared samples are the published ones, and the bytes do not know how they came about."""

import argparse
import csv
import hashlib
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import huggingface_hub
import numpy as np
import pyarrow.parquet as pq
import pytest
import soundfile
import soxr
import tiny
from datasets import load_dataset
from hub_fixtures import TOKEN

from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import open_clip, sounding_span
from mtl_dist.data import archives, prepare, shards
from mtl_dist.data.columns import AUDIO
from mtl_dist.data.corpora.corpus import SPLIT_SPANS
from mtl_dist.data.corpora.folder import Folder
from mtl_dist.data.sources import Source

FOLDERS = {"fsdkaggle2018": "FSDKaggle2018", "librispeech": "LibriSpeech", "chime3": "CHiME3"}
SMALL = ("--rows_per_shard", "6", "--rows_per_group", "2")


def run(*words: object) -> None:
    """Run `mtl-dist prepare` in this process, with two workers unless told otherwise."""
    parser = argparse.ArgumentParser()
    prepare.add_prepare(parser.add_subparsers())
    options, overrides = parser.parse_known_args(["prepare", *map(str, words)])
    options.act(options, overrides)


def prepared(kind: str, source: Path, out: Path, *words: object) -> dict:
    """Prepare, and return the manifest."""
    run(kind, source, out, *words)
    return json.loads((out / "manifest.json").read_text())


def counts(manifest: dict) -> dict[str, int]:
    return {split: part["clips"] for split, part in manifest["splits"].items()}


def rows_of(out: Path, split: str = "*") -> list[dict]:
    files = sorted(out.glob(f"{split}-*.parquet"))
    return [row for file in files for row in pq.read_table(file).to_pylist()]


def decoded(row: dict) -> np.ndarray:
    samples, rate = soundfile.read(io.BytesIO(row["audio"]["bytes"]), dtype="int16")
    assert (rate, row["seconds"]) == (16_000, len(samples) / 16_000)
    return samples


def files_of(out: Path) -> dict[str, bytes]:
    """Everything that is in OUT, but for unpacked archives."""
    return {p.name: p.read_bytes() for p in out.iterdir() if p.name != "unpacked"}


def write_clips(folder: Path, clips: int = 12, seconds: float = 0.1) -> Path:
    """Write clips with labels by folder."""
    rng = np.random.default_rng(0)
    for n in range(clips):
        path = folder / ("cat" if n % 2 else "dog") / f"{n:02d}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, rng.uniform(-0.5, 0.5, int(seconds * 16_000)), 16_000, "PCM_16")
    return folder


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


@pytest.mark.parametrize("encoding", ["flac", "wav"])
def test_samples_and_their_sounding_span_are_what_soundfile_and_soxr_say(
    corpora_root, tmp_path, encoding
):
    for kind, count in (("fsdkaggle2018", 24 + 79), ("librispeech", 15)):
        source, out = corpora_root / FOLDERS[kind], tmp_path / kind
        prepared(kind, source, out, *SMALL, "--encoding", encoding)
        paths = {p.stem: p for p in source.rglob("*.*") if p.suffix in (".wav", ".flac")}
        rows = rows_of(out)
        assert len({row["id"] for row in rows}) == len(rows) == len(paths) == count
        for row in rows:
            wave, rate = soundfile.read(paths[Path(row["id"]).stem], dtype="float32")
            if rate != 16_000:
                wave = soxr.resample(wave, rate, 16_000, quality="HQ")
            truth = np.rint(wave * 32_768).clip(-32_768, 32_767).astype(int)
            samples = decoded(row)
            assert abs(len(samples) - len(truth)) <= 1
            n = min(len(samples), len(truth))
            assert np.abs(samples[:n] - truth[:n]).max() <= (0 if rate == 16_000 else 1)
            with open_clip(row["audio"]) as file:
                span = sounding_span(file, ClipReader.silence_db)
            assert (row["sound_start"], row["sound_stop"]) == span
            assert row["silence_db"] == ClipReader.silence_db
            assert row["audio"]["path"] == f"{row['id']}.{encoding}"


@pytest.mark.parametrize("kind", FOLDERS)
def test_the_folder_loads_as_a_data_set_with_the_splits_of_its_manifest(
    corpora_root, tmp_path, kind
):
    out = tmp_path / "out"
    manifest = prepared(kind, corpora_root / FOLDERS[kind], out, *SMALL)
    counts = {split: part["clips"] for split, part in manifest["splits"].items()}
    assert (
        counts
        == {
            "fsdkaggle2018": {"train": 21, "validation": 3, "test": 79},
            "librispeech": {"train.clean.100": 9, "validation": 3, "test": 3},
            "chime3": {"train": 4, "validation": 4, "test": 4},
        }[kind]
    )
    assert (manifest["format"], manifest["kind"], manifest["rate"]) == (2, kind, 16_000)
    assert manifest["classes"] == (sorted(tiny.CLASSES) if kind == "fsdkaggle2018" else [])
    assert set(load_dataset(str(out), streaming=True)) == set(manifest["splits"])
    for split, part in manifest["splits"].items():
        rows = list(load_dataset(str(out), split=split, streaming=True).decode(False))
        assert rows == rows_of(out, split.replace(".", "-"))
        assert part["hours"] == pytest.approx(sum(len(decoded(r)) for r in rows) / 16_000 / 3600)
        for file in part["files"]:
            there = pq.ParquetFile(out / file["file"]).metadata
            assert (file["rows"], file["row_groups"]) == (there.num_rows, there.num_row_groups)
            assert there.num_rows <= 6
            assert there.num_row_groups == -(-there.num_rows // 2)


def test_speakers_of_validation_and_test_are_not_trained_on(corpora_root, tmp_path):
    source = tmp_path / "LibriSpeech"
    shutil.copytree(corpora_root / "LibriSpeech", source)
    words = ("--heldout_share", "0.4")
    prepared("librispeech", source, tmp_path / "held", *words)
    speakers = {
        s: {row["speaker"] for row in rows_of(tmp_path / "held", s)}
        for s in ("train*", "v*", "test")
    }
    assert [len(found) for found in speakers.values()] == [1, 2, 2]
    assert len(set.union(*speakers.values())) == 5
    for split in ("dev-clean", "test-other"):
        shutil.copytree(source / "train-clean-100", source / split)
    manifest = prepared("librispeech", source, tmp_path / "published", *words)
    assert counts(manifest) == {"train.clean.100": 15, "validation": 15, "test": 15}
    assert all(r["id"].startswith("dev-clean/") for r in rows_of(tmp_path / "published", "v*"))
    words = ("--splits", "train-clean-100", "dev-clean")
    manifest = prepared("librispeech", source, tmp_path / "chosen", *words)
    assert counts(manifest) == {"train.clean.100": 12, "validation": 15, "test": 3}


@pytest.mark.parametrize("rate", [16_000, 44_100])
def test_the_pieces_of_a_recording_side_by_side_are_what_each_split_may_hear(tmp_path, rate):
    wave = np.random.default_rng(0).integers(-9000, 9000, round(38 * rate)).astype(np.int16)
    path = tmp_path / "chime" / "BGD_150203_010_STR.CH3.wav"
    path.parent.mkdir()
    soundfile.write(path, wave, rate, "PCM_16")
    manifest = prepared("chime3", path.parent, tmp_path / "out")
    assert manifest["settings"]["encoding"] == "wav"
    assert counts(manifest) == {"train": 4, "validation": 1, "test": 1}
    for split, (low, high) in SPLIT_SPANS.items():
        rows = sorted(rows_of(tmp_path / "out", split), key=lambda row: row["id"])
        assert all(3.7 < row["seconds"] <= 10 for row in rows)
        heard = np.concatenate([decoded(row) for row in rows])
        start, stop = int(low * len(wave)), int(high * len(wave))
        if rate == 16_000:
            np.testing.assert_array_equal(heard, wave[start:stop])
        else:
            assert abs(len(heard) - (stop - start) * 16_000 / rate) < 3


def test_the_order_is_one_of_the_seed_and_the_bytes_do_not_know_the_workers(corpora_root, tmp_path):
    source, orders = corpora_root / "FSDKaggle2018", {}
    for name, seed, workers in (("a", 0, 1), ("b", 0, 3), ("c", 1, 2)):
        words = (*SMALL, "--seed", seed, "--workers", workers)
        prepared("fsdkaggle2018", source, tmp_path / name, *words)
        orders[name] = [row["id"] for row in rows_of(tmp_path / name, "test")]
    assert len(files_of(tmp_path / "a")) > 10
    assert files_of(tmp_path / "a") == files_of(tmp_path / "b")
    assert sorted(orders["a"]) == sorted(orders["c"]) == [f"test{n:03d}.wav" for n in range(79)]
    assert orders["a"] != orders["c"]
    assert abs(np.corrcoef(np.argsort(orders["a"]), np.arange(79))[0, 1]) < 0.4  # sorted: 1


@pytest.mark.parametrize("rate", [16_000, 44_100, 11_025])
@pytest.mark.parametrize("seconds", [0.0001, 2.4, 2.6, 5.31])
def test_a_long_file_in_stretches_is_the_file_in_one(tmp_path, monkeypatch, rate, seconds):
    frames = max(1, round(seconds * rate))
    wave, path = np.random.default_rng(0).uniform(-0.5, 0.5, frames), tmp_path / "a.wav"
    soundfile.write(path, wave, rate, "PCM_16")
    audio = {"path": str(path), "bytes": None}
    truth, samples, _ = shards.encode(audio, 0, 0, "flac")
    monkeypatch.setattr(shards, "STRETCH_SECONDS", 1)
    data, count, _ = shards.encode(audio, 0, 0, "flac")
    one, many = (soundfile.read(io.BytesIO(b), dtype="int16")[0] for b in (truth, data))
    assert count == samples == max(1, round(frames * 16_000 / rate))
    assert np.abs(one.astype(int) - many).max() <= (0 if rate == 16_000 else 4)


def test_a_manifest_and_folders_give_labels_and_splits(clips, tmp_path):
    table = tmp_path / "clips.csv"
    with open(table, "w", newline="") as lines:
        writer = csv.writer(lines)
        writer.writerow(["path", "label", "split"])
        for n in range(12):
            folder = "cat" if n % 2 else "dog"
            writer.writerow([f"{folder}/{n:02d}.wav", folder, "test" if n > 8 else "train"])
    for name, words in (
        ("table", ["--manifest", table]),
        ("folders", ["--labelled"]),
        ("none", []),
    ):
        manifest = prepared("folder", clips, tmp_path / name, *words)
        assert counts(manifest) == ({"train": 9, "test": 3} if name == "table" else {"train": 12})
        assert manifest["classes"] == ([] if name == "none" else ["cat", "dog"])
        for row in rows_of(tmp_path / name):
            assert row["label"] == (None if name == "none" else row["id"].split("/")[0])


def test_published_archives_are_checked_and_unpacked_and_give_the_same_bytes(
    corpora_root, tmp_path, monkeypatch
):
    words, zips = ("fsdkaggle2018", tmp_path / "zips", tmp_path / "out"), tmp_path / "zips"
    zips.mkdir()
    for part in (corpora_root / "FSDKaggle2018").iterdir():
        with zipfile.ZipFile(zips / f"{part.name}.zip", "w") as archive:
            for file in part.iterdir():
                archive.write(file, f"{part.name}/{file.name}")
    with pytest.raises(
        ValueError, match=r"its md5 is \w+, that of the published file \w+; download"
    ):
        run(*words)
    md5 = {p.name: hashlib.md5(p.read_bytes()).hexdigest() for p in zips.iterdir()}
    monkeypatch.setattr(archives, "MD5", md5)
    prepared(*words)
    prepared("fsdkaggle2018", corpora_root / "FSDKaggle2018", tmp_path / "folder")
    assert files_of(tmp_path / "out") == files_of(tmp_path / "folder")
    shutil.rmtree(tmp_path / "out" / "unpacked")
    prepared(*words)  # finished: nothing is unpacked again
    assert not (tmp_path / "out" / "unpacked").exists()


def test_tars_of_unknown_md5_are_taken_with_a_note_and_broken_ones_refused(
    corpora_root, tmp_path, caplog
):
    (tmp_path / "tars").mkdir()
    path = tmp_path / "tars" / "tiny.tar.gz"
    with tarfile.open(path, "w:gz") as archive:
        archive.add(corpora_root / "LibriSpeech", "LibriSpeech")
    manifest = prepared("librispeech", tmp_path / "tars", tmp_path / "out")
    assert manifest["splits"]["train.clean.100"]["clips"] == 9
    assert "tiny.tar.gz is taken unchecked: its md5 is not known" in caplog.text
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(ValueError, match=r"tiny\.tar\.gz: cannot be unpacked"):
        run("librispeech", tmp_path / "tars", tmp_path / "other")


def test_a_prepared_folder_is_uploaded_and_an_error_shows_no_token(clips, tmp_path, monkeypatch):
    calls, failing = [], []

    class Api:
        def create_repo(self, **words):
            if failing:
                raise OSError("401: Bearer hf_abc is not valid (hf_Secret1)\nmore")
            calls.append(words)

        upload_folder = create_repo

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    prepared("folder", clips, tmp_path / "out", "--push_to_hub", "me/clips")
    run("--verify", tmp_path / "out", "--push_to_hub", "me/clips")
    assert [call["repo_type"] for call in calls] == ["dataset"] * 4
    assert calls[0] == calls[2]
    assert (calls[0]["private"], calls[0]["exist_ok"]) == (True, True)
    assert calls[1]["folder_path"] == tmp_path / "out"
    failing.append(True)
    with pytest.raises(ValueError, match="--push_to_hub: me/clips could not be uploaded") as error:
        run("--verify", tmp_path / "out", "--push_to_hub", "me/clips")
    assert not any(secret in str(error.value) for secret in ("hf_abc", "hf_Secret1", "\n"))


def test_what_was_uploaded_is_a_data_set_of_the_hub_that_is_trained_on_by_its_id(
    clips, hub, tmp_path, monkeypatch
):
    """Through huggingface_hub's own client; uploaded anew, shards that are there no longer are gone there, too."""
    out, name, hub.token = tmp_path / "out", "me/uploaded", TOKEN
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(ValueError, match="me/uploaded could not be uploaded") as error:
        prepared("folder", clips, out, "--labelled", "--push_to_hub", name)
    assert "hf_wrong" not in str(error.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    (hub.folder / name).mkdir(parents=True)
    (hub.folder / name / "train-00009-of-00010.parquet").write_bytes(b"of an earlier preparation")
    run("--verify", out, "--push_to_hub", name)
    there = {path.name: path.read_bytes() for path in (hub.folder / name).iterdir()}
    assert there == {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    rows = rows_of(out)
    loaded = load_dataset(name, streaming=True)["train"].cast_column("audio", AUDIO)
    assert sorted(row["id"] for row in loaded) == sorted(row["id"] for row in rows)
    corpus = Folder(sources=[Source(path=name)], validation_share=0, test_share=0).open("mine", 0)
    found = {row["id"]: (row["audio"]["bytes"], row["label"]) for row in corpus.stream("train")}
    assert found == {row["id"]: (row["audio"]["bytes"], row["label"]) for row in rows}
