"""What happens to audio files at URLs: a bad one is a counted skip as on a disk, one that changed ends the run by name."""

import dataclasses
import itertools
import shutil

import far_audio
import fsspec
import numpy as np
import pytest
import soundfile
import tiny
import worlds
from entry import enter, entries, refused
from far_audio import CHIME
from hub_server import RESERVED, Fault, HubServer

from mtl_dist.audio.reading import BadClipError, open_clip, read_frames
from mtl_dist.config import load_config
from mtl_dist.corpora import CORPORA
from mtl_dist.corpora.chime3 import Chime3
from mtl_dist.corpora.folder import Folder
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World
from mtl_dist.streams.retry import Remote, ShardError
from mtl_dist.streams.sources import Source
from mtl_dist.streams.table import Table

FAST = Remote(timeout_seconds=5, patience_seconds=30, first_wait_seconds=0.05)
LARGE = 300_000


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The Hub, empty."""
    server = HubServer(tmp_path_factory.mktemp("hub"), RESERVED.getsockname()[1])
    yield server
    server.close()


numbers = itertools.count()


@pytest.fixture
def noise(server):
    """A data set of its own with the recordings: the Hub, its name and its folder."""
    server.reset()
    repo = f"someone/noise-{next(numbers)}"
    return server, repo, far_audio.write_recordings(server.folder / repo)


def recordings(folder) -> dict:
    return {path.name[-11:-8]: path for path in folder.rglob("BGD_*.wav")}


def of_hub(repo: str, **kwargs):
    return Chime3(sources=[Source(path=repo)], remote=dataclasses.replace(FAST), **kwargs).load(
        "chime3", 0
    )


VANISHED = {
    "gone": (lambda path: path.unlink(), "HTTP 404 .*it is not there"),
    "replaced": (
        lambda path: path.write_bytes(path.read_bytes() + bytes(2)),
        "bytes and had .*start again",
    ),
    "cut": (lambda path: path.write_bytes(path.read_bytes()[:-2]), "bytes and had .*start again"),
    "emptied": (lambda path: path.write_bytes(b""), "HTTP 416 .*start again"),
}


@pytest.mark.parametrize("how", VANISHED)
def test_a_recording_that_is_not_what_was_listed_is_named_with_rank_corpus_and_reason(noise, how):
    _, repo, folder = noise
    corpus = of_hub(repo, environments=["BUS"])
    corpus.shards.rank = 3
    change, reason = VANISHED[how]
    path = recordings(folder)["BUS"]
    change(path)
    name = f"{repo}/data/audio/16kHz/backgrounds/{path.name}"
    with pytest.raises(
        ShardError, match=rf"rank 3 on .*corpus corpora\.chime3, {name}: .*{reason}"
    ):
        far_audio.draws(corpus, 1)


def test_what_no_retry_cures_in_the_middle_of_a_flac_is_not_taken_for_a_bad_clip(noise):
    server, repo, _ = noise
    corpus = of_hub(repo, environments=["STR"])
    far_audio.draws(corpus, 1)
    server.faults.append(Fault("status", path="STR", times=1000))
    corpus.shards.remote.patience_seconds = 0.5
    with pytest.raises(ShardError, match=r"STR\.CH1\.flac: HTTP 503 .*gave up after attempt"):
        far_audio.draws(corpus, 2)


def bad_files() -> dict[str, bytes]:
    rng = np.random.default_rng(1)
    system = fsspec.filesystem("memory")
    whole = {}
    for kind, subtype in (
        ("wav", "PCM_16"),
        ("wav24", "PCM_24"),
        ("flac", "PCM_16"),
        ("nan", "FLOAT"),
    ):
        wave = 0.3 * rng.normal(size=LARGE).clip(-3, 3)
        wave[LARGE // 2] = np.nan if kind == "nan" else 0
        with system.open(f"/made/{kind}", "wb") as file:
            soundfile.write(file, wave, 16_000, subtype, format="FLAC" if kind == "flac" else "WAV")
        whole[kind] = system.cat_file(f"/made/{kind}")
    return {
        "empty.wav": b"",
        "header only.wav": whole["wav"][:44],
        "half.wav": whole["wav"][: len(whole["wav"]) // 2],
        "half 24.wav": whole["wav24"][: len(whole["wav24"]) // 2],
        "half.flac": whole["flac"][: len(whole["flac"]) // 2],
        "text.wav": b"# Notes\n" * 100_000,
        "nan.wav": whole["nan"],
    }


def test_a_bad_file_is_bad_for_the_reason_that_it_has_on_a_disk(tmp_path):
    def reason(row: dict) -> str:
        with pytest.raises(BadClipError) as caught, open_clip(row["audio"]) as file:
            read_frames(file, 0, file.frames)
        return caught.value.reason.replace(str(tmp_path), "")

    for name, data in bad_files().items():
        (tmp_path / name).write_bytes(data)
    url = far_audio.to_memory(tmp_path, "bad")
    far = Folder(sources=[Source(path=url)], test_share=0, validation_share=0).load("folder", 0)
    here = Folder(root=str(tmp_path), test_share=0, validation_share=0).load("folder", 0)
    read = Table(far.splits["train"], {"folder": far.shards}).reader(held=1)
    reasons = {
        row["id"]: (reason(row), reason(read(n))) for n, row in enumerate(here.splits["train"])
    }
    assert len(reasons) == 7
    for clip, (of_disk, of_url) in reasons.items():
        assert of_disk.partition("(")[0] == of_url.partition("(")[0], clip
        if "half" in clip:
            assert "truncated" in of_url or "cannot be read as audio" in of_url


def words(root, url: str, *more: str) -> list[str]:
    heard = ["--train.tasks", "[next_step]", "--train.main_task", "next_step"]
    heard += ["--tasks.next_step.sources", "[unlabelled_folder]"]
    heard += ["--corpora.unlabelled_folder.sources", f"[{{path: '{url}'}}]"]
    return tiny.tiny_words(root, *heard, *more)


@pytest.fixture
def clips(tmp_path):
    fsspec.filesystem("memory").store.clear()
    return far_audio.to_memory(far_audio.write_clips(tmp_path / "clips"), "clips")


def test_a_run_skips_and_counts_bad_files_and_ends_by_name_when_one_vanishes(tmp_path, clips):
    system = fsspec.filesystem("memory")
    names = sorted(system.find("/clips"))
    for name in names[::3]:
        system.pipe_file(name, b"# Notes\n" * 100)
    run = ["--run.dir", str(tmp_path / "run"), "--data.max_bad_share", "0.9", "--train.rounds", "6"]
    ended = enter(*words(tmp_path, clips, *run))
    assert ended.code == 0, ended.text
    bad = entries(tmp_path / "run", "bad_files")
    assert bad[-1]["total"] > 0
    named = {
        message.split(": cannot be read as audio")[0] for e in bad for message in e["messages"]
    }
    assert named
    assert named <= {f"memory://{name}" for name in names[::3]}

    experiment = build_experiment(load_config(words(tmp_path, clips)))
    system.rm("/clips", recursive=True)
    stream = experiment.rounds(World(), 1, 0, dict.fromkeys(experiment.tasks, 0))
    assert (
        "corpus corpora.unlabelled_folder, memory:///clips/dog"
        in next(stream.rounds(0, False)).failure
    )


def change_size(system, name: str) -> None:
    system.pipe_file(name, system.cat_file(name) + b"x")


CHANGED = {
    "changed": change_size,
    "is new": lambda system, name: system.pipe_file(name.replace("03", "99"), b"x"),
    "is gone": lambda system, name: system.rm_file(name),
}


@pytest.mark.parametrize("how", CHANGED)
def test_files_that_changed_since_the_checkpoint_are_refused_by_name(tmp_path, clips, how):
    run = ["--run.dir", str(tmp_path / "run"), "--train.rounds", "2", "--run.resume", "auto"]
    assert enter(*words(tmp_path, clips, *run)).code == 0
    CHANGED[how](fsspec.filesystem("memory"), "/clips/dog/deep/03.wav")
    run[3] = "4"
    name = "dog/deep/99.wav" if how == "is new" else "dog/deep/03.wav"
    assert f"source 0: {name} {how} since the checkpoint" in refused(*words(tmp_path, clips, *run))


def test_another_content_of_the_same_size_is_known_by_what_the_hub_calls_it(noise):
    _, repo, _ = noise
    saved = of_hub(repo).shards.fingerprint()
    assert len(saved) == 4
    assert all(len(digest.partition("-")[2]) == 40 for digest in saved.values())
    of_hub(repo).shards.refuse_changes(saved)
    name = "source 0: BGD_900101_010_CAF.CH1.wav"
    with pytest.raises(ShardError, match=f"{name} changed since"):
        of_hub(repo).shards.refuse_changes(saved | {name: saved[name][:-1]})


@pytest.mark.parametrize("kind", ["librispeech", "fsdkaggle2018"])
def test_a_corpus_that_is_more_than_its_audio_files_is_refused_with_the_remedy(clips, kind):
    with pytest.raises(ValueError, match=r"corpora\.x\.sources\[0\]: .*read from a disk.*prepare"):
        CORPORA[kind](sources=[Source(path=clips)]).load("x", 0)


def test_audio_files_beside_shards_and_other_names_are_refused(clips):
    system = fsspec.filesystem("memory")
    with pytest.raises(ValueError, match="none of the 12 recordings is named as CHiME-3"):
        Chime3(sources=[Source(path=f"{clips}/dog")]).load("chime3", 0)
    with pytest.raises(ValueError, match=r"corpora\.folder\.sources\[0\]: 00.wav: no label"):
        Folder(sources=[Source(path=f"{clips}/dog/deep")], labelled=True).load("folder", 0)
    system.pipe_file("/clips/metadata.parquet", b"PAR1")
    assert len(Folder(sources=[Source(path=clips)]).listing("folder").rows) == 24
    system.pipe_file("/clips/train.parquet", b"PAR1")
    with pytest.raises(
        ValueError, match=r"audio files and .*\.parquet in .*by a source of its own"
    ):
        Folder(sources=[Source(path=clips)]).load("folder", 0)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_launched_run_with_noise_of_the_hub_is_that_with_noise_of_a_folder(
    noise, corpora_root, tmp_path
):
    server, _, folder = noise
    shutil.copytree(folder, server.folder / CHIME)
    learned = []
    for where in (
        ["--corpora.chime3.root", str(folder)],
        ["--corpora.chime3.sources", f"[{{path: {CHIME}}}]"],
    ):
        run = tmp_path / str(len(learned))
        more = ["--run.dir", str(run), "--data.workers", "2", "--train.rounds", "12"]
        done = worlds.launch(
            "two_cpu_processes", "mtl_dist/train.py", *tiny.tiny_words(corpora_root, *more, *where)
        )
        assert done.returncode == 0, done.stderr
        kept = ("loss", "count", "grad_norm", "round")
        learned.append(
            [{k: v for k, v in e.items() if k.startswith(kept)} for e in entries(run, "round")]
        )
    assert learned[0] == learned[1]
    assert len(learned[0]) == 12
    lists = [line for line in server.log if "/tree/" in line]
    assert 0 < len(lists) == len(set(lists))
    drawn = [line for line in server.log if "/storage/" in line]
    headers = [line for line in drawn if "bytes=0-" in line]
    print(len(drawn), "requests,", len(headers), "of them for headers,", server.bytes_sent, "bytes")
    assert len(headers) <= 4 * (2 * 2 + 2)
