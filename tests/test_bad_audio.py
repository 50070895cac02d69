"""What a disk can do to audio: bad files are counted skips, too many an error, and no run is lost."""

import io
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny
import worlds
from entry import enter, entries, refused, tagging_words
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.audio.reading import BadClipError, open_clip, read_frames
from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment


@pytest.fixture
def root(tmp_path, corpora_root):
    """A folder of corpora of which FSDKaggle2018 may be spoilt."""
    shutil.copytree(corpora_root / "FSDKaggle2018", tmp_path / "FSDKaggle2018")
    return tmp_path


def paths_of(words: list[str], split: str) -> list[str]:
    """Return the files of a split of FSDKaggle2018."""
    corpus = build_experiment(load_config(words)).corpora["fsdkaggle2018"]
    return [row["audio"]["path"] for row in corpus.stream(split)]


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
        text, no_rate = b"# Notes\n" * 50, whole[:24] + bytes(4) + whole[28:]
        others = {"text": text, "sample rate 0": no_rate}
        path.write_bytes(others[how] if how in others else whole[: kept[how]])


BAD_FILES = (
    *("zero length", "header only", "truncated WAV", "truncated FLAC"),
    *("NaN", "Inf", "sample rate 0", "text"),
)


def test_bad_files_are_skipped_counted_and_named_and_the_run_goes_to_its_end(root):
    """All eight kinds among 24 clips: named in metrics.jsonl, counted in TensorBoard, absent from nothing else."""
    words = tagging_words(root, root / "run", "--data.max_bad_share", "0.5", "--train.epochs", "2")
    words += [
        "--train.rounds",
        "null",
        "--evaluation.max_clips",
        "null",
        "--train.global_batch",
        "3",
    ]
    paths = paths_of(words, "train")[:7] + paths_of(words, "validation")[:1]
    for path, how in zip(paths, BAD_FILES, strict=True):
        spoil(Path(path), how)
    ended = enter(*words)
    assert ended.code == 0, ended.text

    found = entries(root / "run", "bad_files")
    named = {message.split(": ")[0] for entry in found for message in entry["messages"]}
    assert named == set(paths[:7])
    assert found[-1]["total"] == 14  # seven files, two epochs
    assert [e["total"] for e in found] == sorted(e["total"] for e in found)
    (in_validation, *_) = entries(root / "run", "bad_files_in_validation")
    assert in_validation["total"] == 1
    assert paths[7] in in_validation["messages"][0]

    events = EventAccumulator(str(root / "run" / "tensorboard")).Reload()
    assert [e.value for e in events.Scalars("data/bad_files")] == [e["total"] for e in found]
    assert events.Scalars("data/bad_files_in_validation")[0].value == 1
    texts = [
        e.tensor_proto.string_val[0].decode() for e in events.Tensors("data/bad_files/text_summary")
    ]
    assert all(any(path in text for text in texts) for path in paths[:7])
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
    paths = paths_of(words, "validation")
    spoil(Path(paths[0]), "text")
    error = refused(*words)
    assert f"1 of {len(paths)} clips could not be used" in error
    assert paths[0] in error


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


def wave_file(form: str) -> bytes:
    """A file of 1,600 samples; of WAV the header has 44 bytes."""
    file, wave = io.BytesIO(), np.random.default_rng(3).uniform(-0.5, 0.5, 1600)
    soundfile.write(file, wave, 16_000, "PCM_16", format=form)
    return file.getvalue()


def read_whole(audio: dict) -> np.ndarray:
    with open_clip(audio) as file:
        return read_frames(file, 0, file.frames)


def forms(data: bytes, tmp_path) -> list[dict]:
    """The same audio as bytes and as a file."""
    (tmp_path / "a.wav").write_bytes(data)
    path = str(tmp_path / "a.wav")
    return [{"bytes": data, "path": path}, {"bytes": None, "path": path}]


@pytest.mark.parametrize("more", [2, 8, 44])
def test_a_size_that_is_too_large_by_up_to_a_header_is_read(tmp_path, more):
    data = bytearray(wave_file("WAV"))
    for place in (4, 40):  # of the whole, of the samples
        data[place : place + 4] = struct.pack(
            "<I", int.from_bytes(data[place : place + 4], "little") + more
        )
    truth = soundfile.read(io.BytesIO(wave_file("WAV")), dtype="float32")[0]
    for audio in forms(bytes(data), tmp_path):
        np.testing.assert_array_equal(read_whole(audio), truth)


SPOILT_HEADERS = {
    "sample rate 0": ("WAV", slice(24, 28), bytes(4)),
    "no channels": ("WAV", slice(22, 24), bytes(2)),
    "no bits": ("WAV", slice(34, 36), bytes(2)),
    "an unknown format": ("WAV", slice(20, 22), b"\x99\x99"),
    "garbage after RIFF": ("WAV", slice(4, 44), np.random.default_rng(4).bytes(40)),
    "FLAC of sample rate 0": ("FLAC", slice(18, 21), bytes(3)),
    "FLAC without its header": ("FLAC", slice(4, 42), bytes(38)),
}


@pytest.mark.parametrize("how", SPOILT_HEADERS)
def test_a_spoilt_header_is_a_bad_clip_by_name_and_nothing_is_printed(tmp_path, capfd, how):
    form, place, bad = SPOILT_HEADERS[how]
    data = bytearray(wave_file(form))
    data[place] = bad
    for audio in forms(bytes(data), tmp_path):
        with pytest.raises(BadClipError, match=r"a\.wav: "):
            read_whole(audio)
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("form", ["WAV", "FLAC"])
def test_whatever_stands_in_a_header_is_read_or_a_bad_clip(tmp_path, capfd, form):
    rng, whole, refused_ = np.random.default_rng(5), wave_file(form), 0
    for _ in range(300):
        data = bytearray(whole)
        for place in rng.integers(0, 48, size=rng.integers(1, 4)):
            data[place] = rng.integers(256)
        for audio in forms(bytes(data), tmp_path):
            try:
                assert read_whole(audio).ndim == 1
            except BadClipError:
                refused_ += 1
    assert 0 < refused_ < 600
    assert capfd.readouterr() == ("", "")
