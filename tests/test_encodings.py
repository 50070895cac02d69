"""How a clip is stored changes how fast it is read, and nothing else: FLAC or WAV, its sounding span known or heard."""

import io
import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import sharded
import soundfile
import tiny

from mtl_dist import cli
from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import BadClipError, WaveFile, open_clip, read_frames, sounding_span
from mtl_dist.config import load_config
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.runtime import World


def encoded(wave: np.ndarray, container: str, subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, wave, 16_000, subtype, format=container)
    return buffer.getvalue()


def opened(data: bytes):
    return open_clip({"path": "a.wav", "bytes": data})


@pytest.mark.parametrize("channels", [1, 2])
def test_a_wav_in_memory_is_read_as_libsndfile_reads_it(channels):
    data = encoded(np.random.default_rng(0).uniform(-1, 1, (5000, channels)), "WAV")
    whole = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)[0].mean(axis=1)
    with opened(data) as file:
        assert isinstance(file, WaveFile)
        assert (file.frames, file.samplerate) == (5000, 16_000)
        for start, frames in ((0, 5000), (4321, 12), (17, 1000), (1017, 3)):
            np.testing.assert_array_equal(
                read_frames(file, start, frames), whole[start : start + frames]
            )


@pytest.mark.parametrize("subtype", ["PCM_24", "FLOAT", "ULAW"])
def test_other_wavs_are_left_to_libsndfile(subtype):
    data = encoded(np.random.default_rng(0).uniform(-1, 1, 500), "WAV", subtype)
    with opened(data) as file:
        assert not isinstance(file, WaveFile)
        assert len(read_frames(file, 100, 400)) == 400


def test_a_wav_that_lost_its_end_is_refused_by_name():
    data = encoded(np.zeros(5000), "WAV")[:-4000]
    with pytest.raises(BadClipError, match=r"a\.wav: is truncated"), opened(data):
        pass


@pytest.fixture(scope="module")
def quiet_ends(tmp_path_factory):
    """LibriSpeech-like utterances between stretches of digital silence of their own lengths."""
    root, rng = tmp_path_factory.mktemp("quiet"), np.random.default_rng(0)
    tiny.write_librispeech(root)
    for path in root.rglob("*.flac"):
        sound = soundfile.read(path)[0]
        ends = (np.zeros(int(n)) for n in rng.integers(0, 30_000, 2))
        soundfile.write(path, np.concatenate([next(ends), sound, next(ends)]), 16_000)
    return root


def spoken(root, corpora_root, *words: str) -> dict[str, str]:
    """What a rank hears of each clip in the first epoch of next-step prediction."""
    first: dict[str, str] = {}
    for told in sharded.heard(experiment_of(root, corpora_root, *words), World(), 3, workers=0):
        for clip, digest in told["next_step"]:
            first.setdefault(clip, digest)
    return first


def experiment_of(root, corpora_root, *words: str) -> Experiment:
    """Next-step prediction alone, on the speech below `root`."""
    chosen = ["--train.tasks", "[next_step]", "--train.main_task", "next_step"]
    chosen += ["--tasks.next_step.sources", "[librispeech]"]
    chosen += ["--corpora.librispeech.root", str(root), *words]
    return build_experiment(load_config([*tiny.tiny_words(corpora_root), *chosen]))


@pytest.mark.parametrize("encoding", ["flac", "wav"])
def test_clips_sound_the_same_whatever_they_are_stored_as(
    quiet_ends, corpora_root, tmp_path, encoding, monkeypatch
):
    folder, out = spoken(quiet_ends, corpora_root), tmp_path / "out"
    words = ["--encoding", encoding, "--rows_per_group", "3", "--workers", "1"]
    cli.main(["prepare", "librispeech", str(quiet_ends), str(out), *words])
    rows = [
        row for file in sorted(out.glob("*.parquet")) for row in pq.read_table(file).to_pylist()
    ]
    assert {row["audio"]["bytes"][:4] for row in rows} == {
        b"fLaC" if encoding == "flac" else b"RIFF"
    }
    assert len({(row["sound_start"], row["sound_stop"]) for row in rows}) > 10
    listens = []
    monkeypatch.setattr(
        "mtl_dist.audio.clips.sounding_span", lambda *a: listens.append(a) or (0, a[0].frames)
    )
    assert spoken(out, corpora_root) == folder
    assert not listens
    assert spoken(out, corpora_root, "--data.silence_db", "-50") != folder  # heard anew
    assert listens


def test_verify_finds_a_span_that_is_not_the_sounds(quiet_ends, tmp_path, capsys):
    out = tmp_path / "out"
    cli.main(["prepare", "librispeech", str(quiet_ends), str(out), "--workers", "1"])
    (file,) = out.glob("*.parquet")
    table = pq.read_table(file)
    place = table.column_names.index("sound_start")
    table = table.set_column(place, "sound_start", [[0] * len(table)])
    pq.write_table(table, file, compression="NONE")
    with pytest.raises(SystemExit):
        cli.main(["prepare", "--verify", str(out), "--workers", "1"])
    assert "'sound_start'" in capsys.readouterr().out


def test_chime3_is_prepared_as_wav_and_what_was_begun_as_flac_is_not_mixed(corpora_root, tmp_path):
    out = tmp_path / "out"
    words = ["prepare", "chime3", str(corpora_root / "CHiME3"), str(out), "--workers", "1"]
    cli.main(words)
    assert json.loads((out / "manifest.json").read_text())["settings"]["encoding"] == "wav"
    with pytest.raises(SystemExit, match="encoding: is 'flac' and was 'wav'"):
        cli.main([*words, "--encoding", "flac"])


def test_a_known_span_is_used_only_at_its_own_level():
    wave = np.concatenate([np.zeros(8000), np.full(8000, 0.5), np.zeros(8000)]).astype(np.float32)
    row = {"id": "a", "label": -1, "split": "train", "silence_db": -60.0}
    row |= {"sound_start": 9000, "sound_stop": 9500}
    row["audio"] = {"path": "a", "bytes": encoded(wave, "FLAC")}
    rng = np.random.default_rng(0)
    assert len(ClipReader().crop(row, 32_000, rng).wave) == 500
    assert len(ClipReader(silence_db=-50.0).crop(row, 32_000, rng).wave) == 8000


def test_a_span_is_heard_once_by_all_workers_and_crops_stay_the_same(
    quiet_ends, corpora_root, monkeypatch
):
    """A file is 15 to 30 thousand samples of silence and 1,600 to 8,000 of sound: a wrong span would be another crop."""
    folder = experiment_of(quiet_ends, corpora_root)
    listens = []

    def once(file, silence_db):
        listens.append(file)
        return sounding_span(file, silence_db)

    monkeypatch.setattr("mtl_dist.audio.clips.sounding_span", once)
    first = sharded.heard(folder, World(), 4, workers=2)
    assert not listens  # but in the workers
    assert all(folder.reader.spans["librispeech"][: len(folder.table("next_step"))])
    assert sharded.heard(folder, World(), 4, workers=0) == first
    assert not listens
