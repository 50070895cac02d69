"""What can be wrong with what `mtl-dist prepare` is given: one line that names it, or a counted skip."""

import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import soundfile
from preparation import SMALL, decoded, prepare, refused, rows_of, write_clips

from mtl_dist import cli


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


def test_a_slip_before_anything_was_written_does_not_bind(clips, tmp_path):
    broken = tmp_path / "broken.csv"
    broken.write_text("file\na.wav\n")
    words = ("folder", clips, tmp_path / "out")
    assert "column path is missing; found ['file']" in refused(*words, "--manifest", broken)
    assert prepare(*words, "--seed", "5")["seed"] == 5


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
