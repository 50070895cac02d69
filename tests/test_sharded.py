"""Corpora in shards: the same clips as the folders they were made from, in an order of their own that nothing changes."""

import dataclasses
import itertools
import json
import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sharded
import tiny
import worlds

from mtl_dist.config import ConfigError, load_config
from mtl_dist.corpora.noise import NoiseBank
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World
from mtl_dist.streams.keys import generator
from mtl_dist.streams.shards import Shards

ROUNDS = 8


@pytest.fixture(scope="module")
def prepared(corpora_root, tmp_path_factory):
    """All three tiny corpora, prepared."""
    return sharded.prepare(corpora_root, tmp_path_factory.mktemp("prepared"))


@pytest.fixture(scope="module")
def experiment(prepared):
    return build_experiment(load_config(tiny.tiny_words(prepared)))


@pytest.fixture(scope="module")
def truth(experiment):
    """Eight rounds of one rank without workers, more than two epochs of audio_tagging."""
    return sharded.heard(experiment, World(), ROUNDS, workers=0)


def test_a_prepared_corpus_has_the_clips_splits_and_labels_of_its_folder(
    experiment, tiny_experiment
):
    for name in ("fsdkaggle2018", "librispeech"):
        ours, theirs = experiment.corpora[name], tiny_experiment.corpora[name]
        assert ours.classes == theirs.classes
        for split in ("train", "validation", "test"):
            rows = [
                dict(zip(c.splits[split]["id"], c.splits[split]["label"], strict=True))
                for c in (ours, theirs)
            ]
            assert rows[0] == rows[1]
            assert len(rows[0])


def test_every_clip_comes_once_an_epoch(experiment, truth):
    for task in experiment.tasks:
        wanted = sorted(experiment.table(task)["id"])
        seen = [clip for round_ in truth for clip, _ in round_[task]]
        for start in range(0, len(seen) - len(wanted) + 1, len(wanted)):
            assert sorted(seen[start : start + len(wanted)]) == wanted


@pytest.mark.parametrize(("ranks", "workers"), [(1, 3), (2, 0), (2, 2), (4, 1)])
def test_ranks_and_workers_change_nothing(experiment, truth, ranks, workers):
    worlds_ = [World(rank=rank, size=ranks) for rank in range(ranks)]
    assert truth == sharded.joined([sharded.heard(experiment, w, ROUNDS, workers) for w in worlds_])


@pytest.mark.parametrize("stopped", [1, 3, 6])
def test_a_stop_and_two_stops_with_other_worlds_change_nothing(experiment, truth, stopped):
    first = sharded.heard(experiment, World(), stopped, workers=2)
    then = [sharded.heard(experiment, World(rank, 2), 1, 0, stopped) for rank in range(2)]
    rest = [
        sharded.heard(experiment, World(rank, 4), ROUNDS - stopped - 1, 1, stopped + 1)
        for rank in range(4)
    ]
    assert truth == first + sharded.joined(then) + sharded.joined(rest)


@pytest.mark.slow
@pytest.mark.timeout(120)
def test_real_processes_hear_the_same(prepared, truth, tmp_path):
    worker = str(tiny.REPOSITORY / "tests/workers/stream_worker.py")
    more = [str(tmp_path), str(ROUNDS), "2", "0", *tiny.tiny_words(prepared)]
    ended = worlds.launch("two_cpu_processes", worker, *more, timeout=100.0)
    assert ended.returncode == 0, ended.stderr
    told = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    assert truth == sharded.joined(told)


@pytest.fixture
def blocks_read(monkeypatch):
    """[(corpus, block)] of all blocks read from now on."""
    seen, read = [], Shards.read

    def noting(shards, block):
        seen.append((shards.corpus, int(block)))
        return read(shards, block)

    monkeypatch.setattr(Shards, "read", noting)
    return seen


def test_an_epoch_reads_each_block_once_but_for_the_ends_of_lanes(experiment, blocks_read):
    table, batch = experiment.table("audio_tagging"), experiment.config.train.global_batch
    tasks = {"audio_tagging": experiment.tasks["audio_tagging"]}
    only = dataclasses.replace(experiment, tasks=tasks)
    sharded.heard(only, World(), len(table) // batch, workers=0)
    blocks = len(set(table.blocks()))
    assert blocks - batch <= len(blocks_read) <= blocks + batch


def test_round_1000000_is_reached_by_reading_one_block_a_lane(experiment, blocks_read):
    far = 1_000_000
    (round_,) = sharded.heard(experiment, World(), 1, workers=0, first=far)
    batch = experiment.config.train.global_batch
    of_clips = [b for b in blocks_read if b[0] != "corpora.chime3"]
    assert len(of_clips) <= batch * len(round_)
    again = [sharded.heard(experiment, World(rank, 2), 1, 0, far) for rank in range(2)]
    assert [round_] == sharded.joined(again)


def test_noise_in_pieces_is_drawn_from_the_pieces_of_its_split(experiment, blocks_read):
    corpus = experiment.corpora["chime3"]
    bank = NoiseBank(corpus, 16_000)
    for split in ("train", "validation", "test"):
        blocks_read.clear()
        for number in range(20):
            assert bank.draw(50, split, generator(number, split)).shape == (50,)
        drawn = {block for _, block in blocks_read}
        assert len(drawn) > 1
        assert drawn <= set(corpus.splits[split]["block"])


@pytest.mark.slow
def test_a_shard_that_changed_since_the_checkpoint_is_refused_by_its_name(prepared, tmp_path):
    root = tmp_path / "LibriSpeech"
    shutil.copytree(prepared / "LibriSpeech", root)
    words = tiny.tiny_words(prepared, "--corpora.librispeech.root", str(root))
    words += ["--run.dir", str(tmp_path / "run"), "--run.resume", "auto", "--train.rounds"]
    first = worlds.launch("one_cpu", "mtl_dist/train.py", *words, "2")
    assert first.returncode == 0, first.stderr
    victim = sorted(root.glob("*.parquet"))[0]
    pq.write_table(pq.read_table(victim), victim, row_group_size=2)
    refused = worlds.launch("one_cpu", "mtl_dist/train.py", *words, "4")
    assert refused.returncode == 1
    assert f"{victim.name} changed since the checkpoint was written" in refused.stderr
    shutil.copyfile(prepared / "LibriSpeech" / victim.name, victim)
    again = worlds.launch("one_cpu", "mtl_dist/train.py", *words, "4")
    assert again.returncode == 0, again.stderr
    assert "(round 2)" in again.stderr


def test_parquet_of_ones_own_is_read_by_its_columns(prepared, tmp_path):
    files = sorted((prepared / "FSDKaggle2018").glob("*.parquet"))
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    renamed = [
        {"sound": row["audio"], "name": row["id"], "tag": row["label"], "split": row["split"]}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(renamed), tmp_path / "mine.parquet", row_group_size=4)
    columns = "columns: {audio: sound, id: name, label: tag}"
    corpus = ["--corpora.folder.sources", f"[{{path: {tmp_path}/mine.parquet, {columns}}}]"]
    task = ["--tasks.audio_tagging.sources", "[folder]", "--train.tasks", "[audio_tagging]"]
    experiment = build_experiment(load_config(tiny.tiny_words(prepared, *corpus, *task)))
    splits = experiment.corpora["folder"].splits
    assert {clip.split("/")[1] for part in splits.values() for clip in part["id"]} == {
        row["id"] for row in rows
    }
    (round_, *_) = sharded.heard(experiment, World(), 1, workers=0)
    assert len(round_["audio_tagging"]) == experiment.config.train.global_batch


def test_a_row_without_bytes_is_a_bad_clip_with_its_name(prepared, tmp_path):
    root = tmp_path / "FSDKaggle2018"
    root.mkdir()
    for path in (prepared / "FSDKaggle2018").iterdir():
        if path.name.startswith("train"):
            table = pq.read_table(path).to_pylist()
            for row in table:
                row["audio"]["bytes"] = None
            schema = pq.read_schema(path)
            pq.write_table(pa.Table.from_pylist(table, schema), root / path.name, row_group_size=3)
        else:
            (root / path.name).symlink_to(path)
    more = ["--corpora.fsdkaggle2018.root", str(root), "--train.tasks", "[audio_tagging]"]
    experiment = build_experiment(load_config(tiny.tiny_words(prepared, *more)))
    stream = experiment.rounds(World(), 1, 0, {"audio_tagging": 0}).rounds(0, pin_memory=False)
    (round_,) = itertools.islice(stream, 1)
    assert len(round_.bad) == experiment.config.train.global_batch
    assert all(
        "holds no bytes" in message and ".parquet, row group" in message for message in round_.bad
    )
    assert not round_.micro_batches["audio_tagging"][0].batch.valid.any()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corpora.librispeech.splits", "[dev-clean]"], "dev-clean is not in"),
        (["--corpora.librispeech.root", "{}/CHiME3"], "was prepared as 'chime3'"),
        (
            ["--corpora.librispeech.sources", "[{{path: {}/none.parquet}}]"],
            "none.parquet does not exist",
        ),
    ],
)
def test_what_is_wrong_with_shards_is_named(prepared, words, message):
    with pytest.raises(ConfigError, match=message):
        build_experiment(
            load_config(tiny.tiny_words(prepared, *[w.format(prepared) for w in words]))
        )


def weighted(prepared, *weights) -> list[str]:
    """Words for next_step on both halves of LibriSpeech's shards, mixed by weight."""
    files = sorted((prepared / "LibriSpeech").glob("*.parquet"))
    chosen = zip((files[0], files[-1]), weights, strict=True)
    listed = ", ".join(f"{{path: {file}, weight: {weight}}}" for file, weight in chosen)
    corpus = ["--corpora.librispeech.root", "null", "--corpora.librispeech.sources", f"[{listed}]"]
    task = ["--train.tasks", "[next_step]", "--train.main_task", "next_step"]
    return tiny.tiny_words(
        prepared,
        *corpus,
        *task,
        "--tasks.next_step.sources",
        "[librispeech]",
        "--train.global_batch",
        "8",
    )


def test_sources_are_mixed_by_weight_in_every_round_on_any_ranks(prepared):
    experiment = build_experiment(load_config(weighted(prepared, 3, 1)))
    table = experiment.table("next_step")
    source = dict(
        zip(
            table["id"][:],
            experiment.corpora["librispeech"].shards.source[table["block"][:]],
            strict=True,
        )
    )
    truth = sharded.heard(experiment, World(), ROUNDS, workers=0)
    for round_ in truth:
        assert [int(source[clip]) for clip, _ in round_["next_step"]] == [0] * 6 + [1] * 2
    for number, places in ((0, slice(0, 6)), (1, slice(6, 8))):
        wanted = sorted(clip for clip, of in source.items() if of == number)
        seen = [clip for round_ in truth for clip, _ in round_["next_step"][places]]
        for start in range(0, len(seen) - len(wanted) + 1, len(wanted)):
            assert sorted(seen[start : start + len(wanted)]) == wanted
    ranks = [sharded.heard(experiment, World(rank, 2), ROUNDS - 2, 2, first=2) for rank in (0, 1)]
    assert truth[2:] == sharded.joined(ranks)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ((1000, 1), "0 of a round's 8 by its weight"),
        ((1, "null"), "every source a weight, or none"),
    ],
)
def test_weights_that_cannot_be_kept_are_refused(prepared, weights, message):
    with pytest.raises(ConfigError, match=message):
        build_experiment(load_config(weighted(prepared, *weights)))
