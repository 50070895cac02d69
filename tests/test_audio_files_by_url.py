"""Laws of audio files at URLs: the clips, noise and rounds of the same files in a folder, by few requests."""

import dataclasses
import pickle

import far_audio
import fsspec
import numpy as np
import pytest
import sharded
import soundfile
import tiny
from far_audio import CHIME, KINDS, SAMPLES, SECONDS
from hub_server import RESERVED, Fault, HubServer

from mtl_dist import health
from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import open_clip, stored_bytes
from mtl_dist.config import load_config
from mtl_dist.corpora.chime3 import Chime3
from mtl_dist.corpora.folder import Folder
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World
from mtl_dist.streams import audio_files
from mtl_dist.streams.keys import generator
from mtl_dist.streams.retry import Remote
from mtl_dist.streams.sources import Source
from mtl_dist.streams.table import Table

FAST = Remote(timeout_seconds=0.5, patience_seconds=20, first_wait_seconds=0.05)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The Hub with the recordings."""
    folder = tmp_path_factory.mktemp("hub")
    far_audio.write_recordings(folder / CHIME)
    server = HubServer(folder, RESERVED.getsockname()[1])
    yield server
    server.close()


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    return far_audio.write_clips(tmp_path_factory.mktemp("clips"))


@pytest.fixture
def hub(server):
    server.reset()
    return server


def of_hub(remote: Remote = FAST, path: str = CHIME, **kwargs):
    return Chime3(sources=[Source(path=path)], remote=remote, **kwargs).load("chime3", 0)


def of_folder(hub, **kwargs):
    return Chime3(root=str(hub.folder / CHIME), **kwargs).load("chime3", 0)


def storage(hub) -> list[str]:
    return [line for line in hub.log if "/storage/" in line]


@pytest.mark.parametrize(
    "path", [CHIME, f"hf://datasets/{CHIME}/data/audio", f"hf://datasets/{CHIME}/**/BGD_*"]
)
def test_the_recordings_of_the_hub_are_those_of_a_folder_listed_without_a_request_for_each(
    hub, path
):
    theirs, ours = (
        of_folder(hub, environments=["STR", "BUS"]),
        of_hub(path=path, environments=["STR", "BUS"]),
    )
    assert far_audio.rows_of(ours) == far_audio.rows_of(theirs)
    assert len(ours.splits["train"]) == 2
    assert not [line for line in hub.log if "BGD_" in line]
    lists = [line for line in hub.log if "/tree/" in line]
    assert len(lists) == len(set(lists)) <= 3


def test_noise_is_bit_for_bit_that_of_a_folder(hub):
    ours, theirs = (far_audio.draws(corpus, 24) for corpus in (of_hub(), of_folder(hub)))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert len({wave.tobytes() for wave in ours}) == 24


def test_a_draw_is_two_requests_and_one_once_the_recording_is_known(hub):
    corpus = of_hub(environments=["BUS", "CAF"])
    hub.reset()
    far_audio.draws(corpus, 30)
    asked = storage(hub)
    headers = [line for line in asked if "bytes=0-" in line]
    assert len(headers) == len(set(headers)) == 2
    assert len(asked) == 30 + 2
    size = (hub.folder / CHIME / "data/audio/16kHz/backgrounds" / next(iter(KINDS))).stat().st_size
    assert 2 * SAMPLES < audio_files.PIECE
    assert hub.bytes_sent <= 1.25 * len(asked) * audio_files.PIECE < 30 * size / 10


@pytest.mark.parametrize(("environment", "most"), [("PED", 3), ("STR", 8)])
def test_other_recordings_take_the_pieces_that_libsndfile_asks_for(hub, environment, most):
    corpus = of_hub(environments=[environment])
    far_audio.draws(corpus, 1)
    hub.reset()
    far_audio.draws(corpus, 10)
    print(environment, len(storage(hub)) / 10, "requests a draw", hub.bytes_sent / 10, "bytes")
    assert len(storage(hub)) <= most * 10


def test_a_small_file_is_one_request_and_nothing_is_asked_before_it_is_read(hub, clips):
    repo = hub.folder / "someone/clips"
    repo.mkdir(parents=True)
    for path in clips.glob("dog/deep/*"):
        (repo / path.name).write_bytes(path.read_bytes())
    corpus = Folder(sources=[Source(path="someone/clips")], remote=FAST).load("folder", 0)
    table = Table(corpus.splits["train"], {"folder": corpus.shards})
    hub.reset()
    rows = [*map(table.reader(held=1), range(len(table)))]
    assert hub.log == []
    sizes = [stored_bytes(row["audio"]) for row in rows]
    for row in rows:
        ClipReader().crop(row, 3_200, generator("crop"))
    assert len(storage(hub)) == len(rows) >= 8
    assert hub.bytes_sent == sum(sizes)


def test_a_crop_of_a_long_clip_that_ends_in_silence_is_three_requests(hub):
    folder = hub.folder / "someone/long"
    folder.mkdir(parents=True)
    wave = np.concatenate([0.1 * np.ones(30 * far_audio.RATE), np.zeros(3 * far_audio.RATE // 2)])
    soundfile.write(folder / "long.wav", wave, far_audio.RATE)
    corpus = Folder(sources=[Source(path="someone/long")], remote=FAST).load("folder", 0)
    read = Table(corpus.splits["train"], {"folder": corpus.shards}).reader(held=1)
    hub.reset()
    for number in range(5):
        ClipReader().crop(read(0), SAMPLES, generator(number))
    assert len(storage(hub)) == 1 + 2 * 5
    assert hub.bytes_sent <= 1.25 * len(storage(hub)) * audio_files.PIECE


def test_clips_of_any_url_have_the_names_labels_splits_and_samples_of_a_folder(clips):
    url = far_audio.to_memory(clips, "clips")
    settings = {"labelled": True, "validation_share": 0.2, "test_share": 0.2}
    theirs = Folder(root=str(clips), **settings).load("folder", 0)
    for path in (f"{clips}/**/*.*", url, f"{url}/*/deep/*", f"{url}/**/*.*"):
        ours = Folder(sources=[Source(path=path)], **settings).load("folder", 0)
        assert far_audio.rows_of(ours) == far_audio.rows_of(theirs)
        assert ours.classes == theirs.classes == ["dog", "dog-toy"]
    for split, rows in theirs.splits.items():
        read = Table(ours.splits[split], {"folder": ours.shards}).reader(held=1)
        assert len(rows) > 3
        for number, row in enumerate(rows):
            cut = [ClipReader().crop(r, 2_000, generator(number)) for r in (row, read(number))]
            np.testing.assert_array_equal(cut[0].wave, cut[1].wave)
            with open_clip(row["audio"]) as here, open_clip(read(number)["audio"]) as there:
                assert here.frames == there.frames
    one = Folder(sources=[Source(path=f"{url}/dog/deep/00.wav")]).listing("folder").rows
    assert [(row["id"], row["path"]) for row in one] == [
        ("00.wav", f"{url[:9]}/clips/dog/deep/00.wav")
    ]


def test_a_split_is_what_the_source_says(hub, clips):
    for split, label in (("train", "dog"), ("test", "dog-toy")):
        repo = hub.folder / "someone/divided" / split
        repo.mkdir(parents=True)
        for path in clips.glob(f"{label}/deep/*"):
            (repo / path.name).write_bytes(path.read_bytes())
    sources = [Source(path="someone/divided", split=split) for split in ("train", "test")]
    corpus = Folder(sources=sources, remote=FAST).load("folder", 0)
    ids = {split: rows["id"][:] for split, rows in corpus.splits.items()}
    assert [len(ids[split]) for split in ("train", "validation", "test")] == [12, 0, 12]
    assert all(clip.startswith("folder/test/") for clip in ids["test"])


def words(corpora_root, clips, *more: str) -> list[str]:
    tasks = ["--train.tasks", "[next_step, noise_reduction]", "--train.main_task", "next_step"]
    heard = ["--tasks.next_step.sources", "[unlabelled_folder]"]
    heard += ["--tasks.noise_reduction.sources", "[unlabelled_folder]"]
    return tiny.tiny_words(corpora_root, *tasks, *heard, *more)


@pytest.fixture(scope="module")
def far(server, corpora_root, clips):
    sources = [
        "--corpora.chime3.sources",
        f"[{{path: {CHIME}}}]",
        "--corpora.unlabelled_folder.sources",
    ]
    url = far_audio.to_memory(clips, "clips")
    return build_experiment(
        load_config(words(corpora_root, clips, *sources, f"[{{path: '{url}'}}]"))
    )


@pytest.fixture(scope="module")
def truth(server, corpora_root, clips):
    """Rounds of the same files in folders."""
    roots = ["--corpora.chime3.root", str(server.folder / CHIME)]
    roots += ["--corpora.unlabelled_folder.root", str(clips)]
    return sharded.heard(
        build_experiment(load_config(words(corpora_root, clips, *roots))), World(), 6, 0
    )


@pytest.mark.parametrize(("ranks", "workers"), [(1, 0), (1, 3), (2, 0)])
def test_rounds_are_those_of_folders_on_any_number_of_ranks_and_workers(far, truth, ranks, workers):
    worlds = [World(rank=rank, size=ranks) for rank in range(ranks)]
    assert truth == sharded.joined([sharded.heard(far, world, 6, workers) for world in worlds])


def test_the_bytes_of_a_round_are_those_of_its_clips(far):
    stream = far.rounds(World(), 1, 0, dict.fromkeys(far.tasks, 0)).rounds(0, pin_memory=False)
    read = next(stream).read["unlabelled_folder"]
    assert read.clips == 8
    sizes = [file.size for file in far.shards()["unlabelled_folder"].alone.by_path.values()]
    assert 8 * min(sizes) <= read.stored_bytes <= 8 * max(sizes)


def test_sources_of_any_kind_mix_by_weight(clips):
    url = far_audio.to_memory(clips / "dog", "more/far")
    sources = [Source(path=url, weight=3), Source(path=str(clips / "dog-toy"), weight=1)]
    with pytest.raises(ValueError, match="12 ids stand twice"):
        Folder(sources=sources).load("folder", 0)
    sources[0].path = "memory://more"
    corpus = Folder(sources=sources).load("folder", 0)
    table = Table(corpus.splits["train"], {"folder": corpus.shards}, {"folder": corpus.weights})
    (far, places), (_, others) = table.dealt(8)
    assert (len(places), len(others)) == (6, 2)
    assert all("://" in table.rows[int(row)]["audio"]["path"] for row in far)


def test_what_is_listed_is_sent_to_other_ranks_and_needs_no_request_there(hub):
    corpus = of_hub(environments=["BUS"])
    path = corpus.splits["train"][0]["audio"]["path"]
    hub.reset()
    sent = pickle.loads(pickle.dumps(corpus.shards))
    assert hub.log == []
    with open_clip(sent.clip(path)) as file:
        assert file.frames == SECONDS * far_audio.RATE
    assert len(storage(hub)) == 1


def test_a_cache_answers_later_draws_by_pieces_of_a_mebibyte(hub, tmp_path):
    kept = dataclasses.replace(FAST, cache=str(tmp_path), cache_gigabytes=0.1)
    first = far_audio.draws(of_hub(kept), 12)
    hub.reset()
    again = far_audio.draws(of_hub(kept), 12)
    assert storage(hub) == []
    for one, other, plain in zip(first, again, far_audio.draws(of_folder(hub), 12), strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, plain)


def test_the_beginnings_that_are_kept_are_bounded(hub, monkeypatch):
    monkeypatch.setattr(audio_files, "BEGINNINGS", 2)
    corpus = of_hub()
    far_audio.draws(corpus, 12)
    kept = corpus.shards.alone._beginnings
    assert [len(data) for data in kept.values()] == [audio_files.PIECE] * 2


FAULTS = {
    "503": Fault("status", path="BUS"),
    "503 of the Hub": Fault("status", "resolve", path="BUS"),
    "cut": Fault("cut", path="BUS", skip=1),
    "stall": Fault("stall", path="BUS", skip=1),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_the_network_is_cured_and_said(hub, fault, caplog):
    corpus = of_hub(environments=["BUS"])
    hub.faults.append(dataclasses.replace(FAULTS[fault]))
    (ours,) = far_audio.draws(corpus, 1)
    np.testing.assert_array_equal(ours, far_audio.draws(of_folder(hub, environments=["BUS"]), 1)[0])
    assert hub.faults[0].times == 0
    assert f"{CHIME}/data/audio/16kHz/backgrounds/BGD_900101_010_BUS.CH1.wav" in caplog.text
    assert "attempt 1, again in" in caplog.text


def test_doctor_hears_a_clip_of_it(far):
    findings = list(health.data(far.config))
    assert [finding.verdict for finding in findings] == ["ok", "ok"], findings
    fsspec.filesystem("memory").rm("/clips", recursive=True)
    assert [finding.verdict for finding in health.data(far.config)] == ["FAIL", "ok"]
