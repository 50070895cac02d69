"""Laws of sources: the clips and the rounds are the same from any kind of source, and kinds mix in one corpus."""

import csv
import shutil

import pytest
import sharded
import soundfile
import tars
import tiny
from entry import enter, entries

from mtl_dist import cli
from mtl_dist.config import ConfigError, load_config
from mtl_dist.corpora import CORPORA
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source

ROUNDS = 8
SPEAKERS = {"folder": range(101, 104), "prepared": range(104, 108), "tars": range(108, 113)}
NEXT_STEP = (
    "--train.tasks [next_step] --train.main_task next_step --tasks.next_step.sources [librispeech]"
)


def seconds(path) -> float:
    return soundfile.info(path).duration


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """LibriSpeech of 12 speakers as published."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tiny, "SPEAKERS", 12)
        return tiny.write_librispeech(tmp_path_factory.mktemp("published") / "LibriSpeech")


def prepare(kind: str, root, out):
    small = ["--rows_per_group", "3", "--shard_mb", "0.02", "--workers", "1"]
    cli.main(["prepare", kind, str(root), str(out), *small])
    return out


@pytest.fixture(scope="module")
def every(published, tmp_path_factory):
    """{kind of source: all of LibriSpeech in it}."""
    out = tmp_path_factory.mktemp("every")
    with open(out / "clips.csv", "w", newline="") as lines:
        table = csv.writer(lines)
        table.writerow(["file", "name", "reader", "seconds"])
        for path in sorted(published.glob("*/*/*/*.flac")):
            table.writerow([path, f"{path.parts[-4]}/{path.stem}", path.parts[-3], seconds(path)])
    return {
        "folder": published,
        "prepared": prepare("librispeech", published, out / "prepared"),
        "tars": tars.pack_librispeech(published, out / "tars", seconds=seconds),
        "csv": out / "clips.csv",
    }


COLUMNS = {"csv": "columns: {audio: file, id: name, speaker: reader}"}


def words(published, *sources: str, more: str = "") -> list[str]:
    """Words of next_step on LibriSpeech out of these sources."""
    listed = [f"--corpora.librispeech.sources=[{', '.join(f'{{{s}}}' for s in sources)}]"]
    return tiny.tiny_words(published, *NEXT_STEP.split(), *listed, *more.split())


def experiment_of(*args, **kwargs):
    return build_experiment(load_config(words(*args, **kwargs)))


@pytest.fixture(scope="module")
def experiments(published, every):
    return {
        kind: experiment_of(published, f"path: {path}, {COLUMNS.get(kind, '')}")
        for kind, path in every.items()
    }


def by_epoch(experiment, rounds: list[dict]) -> list[dict[str, str]]:
    """Return {clip: digest of its tensors} of every epoch of next_step that the rounds hold in full."""
    heard = [clip for round_ in rounds for clip in round_["next_step"]]
    count = len(experiment.table("next_step"))
    starts = range(0, len(heard) - count + 1, count)
    return [dict(heard[start : start + count]) for start in starts]


def test_every_kind_of_source_has_the_same_clips_splits_and_tensors(experiments):
    truth = None
    for experiment in experiments.values():
        told = sharded.heard(experiment, World(), 20, workers=0)
        found = sharded.splits_of(experiment.corpora["librispeech"]), by_epoch(experiment, told)
        assert len(found[1]) >= 2
        assert all(len(epoch) == len(experiment.table("next_step")) for epoch in found[1])
        truth = truth or found
        assert found == truth


@pytest.mark.parametrize(("ranks", "workers"), [(1, 3), (2, 0), (2, 2)])
def test_ranks_and_workers_change_nothing_for_tars(experiments, ranks, workers):
    experiment = experiments["tars"]
    truth = sharded.heard(experiment, World(), ROUNDS, workers=0)
    first = sharded.heard(experiment, World(), 3, workers=0)
    rest = [
        sharded.heard(experiment, World(rank, ranks), ROUNDS - 3, workers, 3)
        for rank in range(ranks)
    ]
    assert truth == first + sharded.joined(rest)


@pytest.mark.parametrize("hours", [0.0005, 0.0012])
def test_hours_take_the_same_clips_from_every_kind(published, every, hours, tmp_path, monkeypatch):
    def taken_from(path, **mapping) -> list[str]:
        source = Source(path=str(path), columns=mapping)
        corpus = CORPORA["librispeech"](sources=[source], hours=hours).load("librispeech", 0)
        return sorted(corpus.splits["train"]["id"])

    durations = {
        f"librispeech/{p.parts[-4]}/{p.stem}": seconds(p) for p in published.rglob("*.flac")
    }

    def reach(clips: list[str]) -> bool:
        lengths = [durations[clip] for clip in clips]
        return sum(lengths) - max(lengths) < hours * 3600 <= sum(lengths)

    found = taken_from(every["folder"])
    assert reach(found)
    assert taken_from(every["tars"]) == taken_from(every["prepared"]) == found
    assert taken_from(every["csv"], audio="file", id="name", speaker="reader") == found
    silent = tars.pack_librispeech(published, tmp_path / "silent")  # says no durations
    read, read_block = [], Shards.read
    monkeypatch.setattr(Shards, "read", lambda s, block: read.append(block) or read_block(s, block))
    assert reach(taken_from(silent))
    assert 0 < len(read) == len(set(read))


@pytest.fixture(scope="module")
def thirds(published, tmp_path_factory):
    """Sources of three kinds, each of other speakers."""
    out, roots = tmp_path_factory.mktemp("thirds"), {}
    for kind, speakers in SPEAKERS.items():
        roots[kind] = out / kind / "LibriSpeech"
        for speaker in speakers:
            tree = f"train-clean-100/{speaker}"
            shutil.copytree(published / tree, roots[kind] / tree)
    roots["prepared"] = prepare("librispeech", roots["prepared"], out / "shards")
    roots["tars"] = tars.pack_librispeech(roots["tars"], out / "packed")
    return roots


def kind_of(clip: str) -> str:
    speaker = int(clip.split("/")[-1].split("-")[0])
    return next(kind for kind, speakers in SPEAKERS.items() if speaker in speakers)


def test_kinds_of_sources_are_mixed_by_weight_in_every_round_on_any_ranks(published, thirds):
    weights = {"folder": 1, "prepared": 2, "tars": 5}
    sources = [f"path: {thirds[kind]}, weight: {weights[kind]}" for kind in weights]
    experiment = experiment_of(published, *sources, more="--train.global_batch 8")
    truth = sharded.heard(experiment, World(), ROUNDS, workers=0)
    for round_ in truth:
        kinds = [kind_of(clip) for clip, _ in round_["next_step"]]
        assert kinds == ["folder"] + ["prepared"] * 2 + ["tars"] * 5
    for kind in weights:
        wanted = sorted(c for c in experiment.table("next_step")["id"] if kind_of(c) == kind)
        seen = [c for round_ in truth for c, _ in round_["next_step"] if kind_of(c) == kind]
        for start in range(0, len(seen) - len(wanted) + 1, len(wanted)):
            assert sorted(seen[start : start + len(wanted)]) == wanted
    ranks = [sharded.heard(experiment, World(rank, 2), ROUNDS - 2, 2, first=2) for rank in (0, 1)]
    assert truth[2:] == sharded.joined(ranks)


def test_kinds_of_sources_without_weights_give_every_clip_once_an_epoch(published, thirds):
    experiment = experiment_of(published, *(f"path: {path}" for path in thirds.values()))
    epochs = by_epoch(experiment, sharded.heard(experiment, World(), 20, workers=0))
    wanted = sorted(experiment.table("next_step")["id"])
    assert {kind_of(clip) for clip in wanted} == set(SPEAKERS)
    assert len(epochs) >= 2
    assert all(sorted(epoch) == wanted for epoch in epochs)
    whole = experiment_of(published, f"path: {published}")
    assert sharded.splits_of(experiment.corpora["librispeech"]) == sharded.splits_of(
        whole.corpora["librispeech"]
    )


def test_clips_without_a_speaker_are_refused_where_speakers_are_held_out(published, tmp_path):
    path = tars.pack(tmp_path / "a.tar", [("x.flac", b"x")])
    with pytest.raises(
        ConfigError, match=r"1 clips have no speaker, such as librispeech/x.*columns"
    ):
        experiment_of(published, f"path: {published}", f"path: {path}")
    bare = [(f"{p.stem}.flac", p.read_bytes()) for p in sorted(published.glob("*/*/*/*.flac"))]
    named = experiment_of(published, f"path: {tars.pack(tmp_path / 'b.tar', bare)}")
    assert (
        len(named.corpora["librispeech"].splits["test"]) == 9
    )  # 3 of 12 speakers, by the clips' names


def test_a_sample_without_audio_is_a_bad_clip_with_its_name(published, tmp_path):
    files = [(f"{n}-1-1.txt", b"x") for n in range(12)] + [("99-1-1.flac", b"not audio")]
    path = tars.pack(tmp_path / "a.tar", files)
    experiment = experiment_of(published, f"path: {path}")
    stream = experiment.rounds(World(), 1, 0, {"next_step": 0}).rounds(0, pin_memory=False)
    bad = next(stream).bad
    assert len(bad) == experiment.config.train.global_batch
    assert all("a.tar, samples 0 to 12, row" in message for message in bad)
    assert sum("holds no bytes" in message for message in bad) >= len(bad) - 1


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_a_run_on_mixed_sources_trains_stops_and_goes_on(published, thirds, tmp_path):
    sources = [f"path: {path}, weight: 1" for path in thirds.values()]
    run, whole = tmp_path / "run", tmp_path / "whole"
    more = "--data.workers 2 --run.resume auto --train.rounds 6"
    for folder, stops in ((whole, [6]), (run, [3, 6])):
        for stop in stops:
            there = f"{more} --run.dir {folder} --train.stop_after_rounds {stop}"
            ended = enter(*words(published, *sources, more=there))
            assert ended.code == 0, ended.text
    losses = [[e["loss/next_step"] for e in entries(folder, "round")] for folder in (whole, run)]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 6
