"""What a corpus holds, and which clip is in which split: on the real sample, the made-up corpora and tiny ones."""

import collections
import csv
import filecmp
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import tiny

from mtl_dist.audio.clips import Background
from mtl_dist.data.corpora import CORPORA, synthetic
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.data.sources import SPLITS

SAMPLE = Path(os.environ.get("MTL_DIST_SAMPLE", "no sample"))
"""A folder with a small sample of real audio, and the script unpack.py, which lays it out as published."""


@pytest.fixture(scope="session")
def real(tmp_path_factory):
    """The real sample, laid out as published."""
    if not (SAMPLE / "unpack.py").is_file():
        pytest.skip("MTL_DIST_SAMPLE names no sample of real audio")
    out = tmp_path_factory.mktemp("real")
    subprocess.run([sys.executable, SAMPLE / "unpack.py", out], check=True, capture_output=True)
    return out


def load(kind: str, split_seed: int = 0, **settings):
    settings = {k: str(v) if k in ("root", "manifest") else v for k, v in settings.items()}
    return CORPORA[kind](**settings).open(kind, split_seed)


def rows(corpus, split: str) -> list[dict]:
    return list(corpus.stream(split)) if corpus.parts[split] else []


def ids(corpus, split: str) -> set[str]:
    return {row["id"] for row in rows(corpus, split)}


def sizes(corpus) -> dict[str, int]:
    found = {split: len(ids(corpus, split)) for split in SPLITS}
    assert found == {split: corpus.clips(split) for split in SPLITS}
    return found


def labels_of(table) -> dict[str, str]:
    with open(table, newline="", encoding="utf-8") as lines:
        return {row["fname"]: row["label"] for row in csv.DictReader(lines)}


def test_fsdkaggle2018_has_every_row_of_the_published_tables_with_its_label(real):
    corpus = load("fsdkaggle2018", root=real / "FSDKaggle2018")
    meta = real / "FSDKaggle2018" / "FSDKaggle2018.meta"
    train = labels_of(meta / "train_post_competition.csv")
    test = labels_of(meta / "test_post_competition_scoring_clips.csv")
    assert (len(train), len(test)) == (221, 79)
    assert corpus.classes == sorted(set(train.values()))
    found = {row["id"]: row["label"] for split in SPLITS for row in rows(corpus, split)}
    assert found == train | test
    assert ids(corpus, "test") == test.keys()
    assert all(soundfile.info(row["audio"]["path"]) for row in rows(corpus, "train"))
    _, row = next(Lane(Blocks(corpus.parts["train"]), 1, 0, ()))
    assert corpus.classes[row.label] == found[row.id.removeprefix("fsdkaggle2018/")]


def test_a_tenth_of_every_label_is_set_aside_by_split_seed_alone(real):
    root = real / "FSDKaggle2018"
    first, again, other = (load("fsdkaggle2018", seed, root=root) for seed in (0, 0, 1))
    train = labels_of(root / "FSDKaggle2018.meta" / "train_post_competition.csv")
    held = [train[clip] for clip in ids(first, "validation")]
    of_label = collections.Counter(train.values())
    assert collections.Counter(held) == {k: max(1, round(n / 10)) for k, n in of_label.items()}
    assert not ids(first, "validation") & ids(first, "train")
    assert len(ids(first, "validation") | ids(first, "train")) == len(train)
    assert ids(first, "validation") == ids(again, "validation")
    assert ids(first, "validation") != ids(other, "validation")


def test_a_share_of_every_label_is_trained_on_and_a_smaller_one_is_part_of_a_larger(real):
    root = real / "FSDKaggle2018"
    train = labels_of(root / "FSDKaggle2018.meta" / "train_post_competition.csv")
    every = load("fsdkaggle2018", root=root)
    of_label = collections.Counter(train[clip] for clip in ids(every, "train"))
    larger = ids(every, "train")
    for share in (0.5, 0.2, 0.01):
        corpus = load("fsdkaggle2018", root=root, train_share=share)
        kept = ids(corpus, "train")
        wanted = {label: max(1, round(share * count)) for label, count in of_label.items()}
        assert collections.Counter(train[clip] for clip in kept) == wanted
        assert kept < larger
        assert corpus.classes == every.classes
        assert [ids(corpus, s) for s in SPLITS[1:]] == [ids(every, s) for s in SPLITS[1:]]
        larger = kept
    other = load("fsdkaggle2018", 1, root=root, train_share=0.01)
    assert ids(other, "train") != kept


def test_librispeech_sets_speakers_aside_and_takes_all_others(real):
    corpus = load("librispeech", root=real / "LibriSpeech", heldout_share=0.1)
    speakers = {s: {row["speaker"] for row in rows(corpus, s)} for s in SPLITS}
    assert [len(speakers[split]) for split in SPLITS] == [251 - 26 - 26, 26, 26]
    assert len(set.union(*speakers.values())) == 251  # so no speaker is in two of them


def test_librispeech_reads_the_splits_that_are_named_and_only_those(tmp_path):
    for split in ("train-clean-100", "train-other-500", "dev-clean", "test-other"):
        tiny.write_librispeech(tmp_path, split)
    one = load("librispeech", root=tmp_path, splits=["train-other-500"])
    both = load("librispeech", root=tmp_path, splits=["train-clean-100", "train-other-500"])
    total = tiny.SPEAKERS * tiny.UTTERANCES
    assert sum(sizes(one).values()) == total
    assert {clip.split("/")[0] for clip in ids(one, "train")} == {"train-other-500"}
    assert sum(sizes(both).values()) == 2 * total
    named = ["train-other-500", "dev-clean", "test-other"]
    sided = load("librispeech", root=tmp_path, splits=named)
    for side, split in zip(SPLITS, named, strict=True):
        assert {clip.split("/")[0] for clip in ids(sided, side)} == {split}
        assert sizes(sided)[side] == total
    half = load("librispeech", root=tmp_path, splits=named[:2])
    assert {clip.split("/")[0] for clip in ids(half, "validation")} == {"dev-clean"}
    held = {row["speaker"] for row in rows(half, "test")}
    assert held
    assert held.isdisjoint({row["speaker"] for row in rows(half, "train")})


@pytest.mark.parametrize(("small", "large"), [(0.1, 0.3), (0.2, 0.6)])
def test_hours_of_a_folder_are_by_headers_and_a_smaller_one_is_contained_in_a_larger(
    real, small, large
):
    parts = {h: load("librispeech", root=real / "LibriSpeech", hours=h) for h in (small, large)}
    for hours, corpus in parts.items():
        lengths = [soundfile.info(row["audio"]["path"]).duration for row in rows(corpus, "train")]
        (part,) = corpus.parts["train"]
        block = part.files.size * max(lengths)
        assert 0 <= sum(lengths) - hours * 3600 < block
        assert f"{sum(lengths) / 3600:.2f} h of training audio taken" in corpus.describe()
    assert ids(parts[small], "train") < ids(parts[large], "train")
    assert ids(parts[small], "validation") == ids(parts[large], "validation")


def test_hours_takes_the_same_utterances_for_one_split_seed_and_others_for_another(real):
    first, again, other = (
        load("librispeech", seed, root=real / "LibriSpeech", hours=0.1) for seed in (0, 0, 1)
    )
    assert ids(first, "train") == ids(again, "train")
    assert len(ids(first, "train") & ids(other, "train")) < len(ids(first, "train")) / 2


def test_more_hours_than_there_are_is_an_error_that_says_how_many_there_are(corpora_root):
    with pytest.raises(
        ValueError, match=r"corpora\.librispeech\.hours: 100 h asked for, but .*0\.00 h"
    ):
        load("librispeech", root=corpora_root / "LibriSpeech", hours=100)


def test_fewer_than_three_speakers_cannot_be_split(tmp_path):
    tiny.write_librispeech(tmp_path)
    for speaker in ("103", "104", "105"):
        shutil.rmtree(tmp_path / "train-clean-100" / speaker)
    with pytest.raises(ValueError, match="6 FLAC files of 2 speakers"):
        load("librispeech", root=tmp_path)


def test_chime3_backgrounds_are_found_by_environment_and_channel(tmp_path):
    names = [f"BGD_150203_010_{e}.CH{c}" for e in ("BUS", "CAF", "BTH") for c in range(1, 7)]
    for name in [*names, "F01_050C0101_BUS.CH1"]:
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(100), 16_000)
    assert len(ids(load("chime3", root=tmp_path), "train")) == 12
    one = load("chime3", root=tmp_path, environments=["BTH"], channels=[2, 5])
    assert ids(one, "train") == {f"BGD_150203_010_BTH.CH{c}" for c in (2, 5)}
    with pytest.raises(ValueError, match=r"environments \['STR'\].*there: \['BTH', 'BUS', 'CAF'\]"):
        load("chime3", root=tmp_path, environments=["STR"])


def test_the_noise_that_a_split_hears_is_of_its_own_part_of_the_recording(tmp_path):
    """A ramp from 0 to 1 tells where a stretch was cut."""
    ramp = np.linspace(0.0, 1.0, 16_000, dtype=np.float32)
    soundfile.write(tmp_path / "BGD_1_1_BUS.wav", ramp, 16_000, "FLOAT")
    corpus, heard = load("chime3", root=tmp_path), {}
    for split in SPLITS:
        _, row = next(Lane(Blocks(corpus.noise(split)), 1, 0, ()))
        noise = Background(row, 16_000)
        draws = [noise.cut(1000, np.random.default_rng(seed)) for seed in range(200)]
        heard[split] = min(d.min() for d in draws), max(d.max() for d in draws)
    assert 0.0 <= heard["train"][0] < 0.05
    assert 0.75 < heard["train"][1] < 0.8 <= heard["validation"][0]
    assert heard["validation"][1] < 0.9 <= heard["test"][0]


@pytest.fixture
def clips(tmp_path):
    """Folder of clips of two labels: LABEL/sub/n.wav."""
    for label in ("cat", "dog"):
        (tmp_path / label / "sub").mkdir(parents=True)
        for number in range(10):
            soundfile.write(tmp_path / label / "sub" / f"{number}.wav", np.ones(100) / 2, 8000)
    (tmp_path / "notes.txt").write_text("not audio")
    return tmp_path


def test_a_folder_gives_labels_by_its_first_level_or_none_at_all(clips):
    labelled = load("folder", root=clips, labelled=True)
    assert labelled.classes == ["cat", "dog"]
    assert sizes(labelled) == {"train": 16, "validation": 2, "test": 2}
    assert all(row["id"].split("/")[0] == row["label"] for row in rows(labelled, "test"))
    plain = load("folder", root=clips)
    assert plain.classes == []
    assert {row["label"] for row in rows(plain, "train")} == {None}


@pytest.mark.parametrize("columns", [("path",), ("path", "label"), ("path", "label", "split")])
def test_a_manifest_gives_paths_relative_to_itself_with_or_without_label_and_split(clips, columns):
    splits = ["train"] * 12 + ["validation"] * 3 + ["test"] * 5
    lines = [
        {"path": f"{label}/sub/{n}.wav", "label": label, "split": splits[2 * n + (label == "dog")]}
        for n in range(10)
        for label in ("cat", "dog")
    ]
    with open(clips / "clips.csv", "w", newline="") as table:
        writer = csv.DictWriter(table, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(lines)
    corpus = load("folder", manifest=clips / "clips.csv")
    assert corpus.classes == (["cat", "dog"] if "label" in columns else [])
    expected = (12, 3, 5) if "split" in columns else (16, 2, 2)
    assert tuple(sizes(corpus).values()) == expected
    (clips / "elsewhere").mkdir()
    (clips / "clips.csv").rename(clips / "elsewhere" / "clips.csv")
    moved = load("folder", manifest=clips / "elsewhere" / "clips.csv", root=clips)
    assert ids(moved, "train") == ids(corpus, "train")


SMALL = dict(TRAIN_PER_CLASS=3, TEST_PER_CLASS=1, SPEAKERS=3, UTTERANCES=1, BACKGROUND_SECONDS=1)


def make_small(cache: str) -> str:
    """Make the synthetic corpora with fewer clips; called in processes of their own."""
    os.environ["MTL_DIST_CACHE"] = cache
    for name, value in SMALL.items():
        setattr(synthetic, name, value)
    return str(synthetic.synthesise())


def test_processes_that_make_the_synthetic_corpora_at_once_leave_one_whole_copy(tmp_path):
    caches = [str(tmp_path / name) for name in ("one", "one", "other")]
    with multiprocessing.get_context("spawn").Pool(2) as pool:
        first, second, other = pool.map(make_small, caches, chunksize=1)
    assert first == second
    assert [path.name for path in (tmp_path / "one").iterdir()] == [
        f"synthetic-{synthetic.VERSION}"
    ]
    files = [str(p.relative_to(first)) for p in Path(first).rglob("*") if p.is_file()]
    equal, different, missing = filecmp.cmpfiles(first, other, files, shallow=False)
    assert len(equal) == 8 * (3 + 1) + 2 + 3 + 4
    assert (different, missing) == ([], [])


def test_the_synthetic_corpora_are_read_by_the_real_readers_in_the_published_layout(
    tmp_path, monkeypatch
):
    for name, value in SMALL.items():
        monkeypatch.setattr(synthetic, name, value)
    monkeypatch.setenv("MTL_DIST_CACHE", str(tmp_path))
    fsd = load("fsdkaggle2018", root="synthetic")
    root = tmp_path / f"synthetic-{synthetic.VERSION}" / "FSDKaggle2018"
    assert sizes(load("fsdkaggle2018", root=root)) == sizes(fsd)
    assert sizes(fsd) == {"train": 16, "validation": 8, "test": 8}
    assert len(fsd.classes) == 8
    assert sizes(load("librispeech", root="synthetic")) == {"train": 1, "validation": 1, "test": 1}
    backgrounds = ids(load("chime3", root="synthetic"), "train")
    assert {name.split("_")[-1] for name in backgrounds} == {
        f"{environment}.CH1" for environment in ("BUS", "CAF", "PED", "STR")
    }
    info = soundfile.info(rows(fsd, "train")[0]["audio"]["path"])
    assert (info.samplerate, info.channels, info.subtype) == (44_100, 1, "PCM_16")
