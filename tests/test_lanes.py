"""The order of clips: those of a step, and all that is drawn for them, hang on (seed, corpora, step), not on the world."""

import collections
import io
import itertools
import json
import time

import hearing
import kinds
import numpy as np
import pyarrow as pa
import pytest
import soundfile
import worlds
from datasets import IterableDataset

from mtl_dist.audio.clips import ClipReader
from mtl_dist.config import load_config
from mtl_dist.data import noise, streams
from mtl_dist.data.columns import FEATURES, Columns
from mtl_dist.data.faults import DataError
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Blocks, Lane, Part
from mtl_dist.data.loader import ClipStream, RoundStream
from mtl_dist.data.sources import Source, open_source
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World

ALONE, ROUNDS, BATCH = World(), 10, 12
SPEECH = "librispeech+fsdkaggle2018"
SIZES = [3, 1, 4, 0, 5, 2, 7]


def in_memory(sizes: list[int], name: str = "memory", source: int = 0) -> Part:
    """A stream in memory whose shards have so many rows."""

    def rows(shards):
        for shard in shards:
            for n in range(sizes[shard]):
                audio = {"bytes": kinds.flac(n), "path": None}
                yield {"id": f"{shard}-{n}", "audio": audio, "speaker": str(source)}

    stream = IterableDataset.from_generator(rows, gen_kwargs={"shards": [*range(len(sizes))]})
    files = streams.StreamFiles.open([name], stream, Columns.of(stream, {}))
    part = Part(corpus=name, split="train", files=files, blocks=files.blocks(), source=source)
    part.clips = sum(sizes)
    return part


def dealt(sizes: list[int], lanes: int, key: tuple, count: int) -> list[list[tuple[int, str]]]:
    """The truth: shuffled packs of blocks, dealt card by card to players in turn, at least `count` rows each.

    The rows of a card, which is a table, are shuffled by its own key.
    """
    hands, player, epoch = [[] for _ in range(lanes)], itertools.cycle(range(lanes)), 0
    while min(map(len, hands)) < count:
        for block in generator(*key, "blocks", epoch).permutation(len(sizes)).tolist():
            order = generator(*key, epoch, "rows", block, 0).permutation(sizes[block])
            hands[next(player)].extend((epoch, f"memory/{block}-{n}") for n in order)
        epoch += 1
    return hands


def rounds_of(experiment, number, ranks=1, workers=0, first=0, positions=None) -> list[dict]:
    """All ranks' rounds, one rank after the other."""
    return hearing.joined(
        [
            hearing.heard(
                experiment.rounds(World(rank, ranks), 1, first, hearing.numbered(positions or {})),
                number,
                workers,
            )
            for rank in range(ranks)
        ]
    )


@pytest.fixture(scope="module")
def words(corpora_root, tmp_path_factory):
    return hearing.mixed(corpora_root, tmp_path_factory.mktemp("mixed"))


@pytest.fixture(scope="module")
def experiment(words):
    return build_experiment(load_config(words))


@pytest.fixture(scope="module")
def truth(experiment):
    """Ten rounds of one rank without workers, more than an epoch of every corpus."""
    return rounds_of(experiment, ROUNDS)


@pytest.mark.parametrize(
    ("lanes", "ranks", "workers"), [(12, 1, 0), (12, 3, 2), (4, 2, 0), (2, 2, 1)]
)
def test_a_stream_in_memory_comes_as_cards_are_dealt(tiny_experiment, lanes, ranks, workers):
    stream = ClipStream(["next_step"], ["memory"], [in_memory(SIZES)], {}, lanes=lanes, weights={})
    tasks = {"next_step": tiny_experiment.tasks["next_step"]}
    common = {"tasks": tasks, "streams": [stream], "reader": tiny_experiment.reader, "seed": 7}
    found = hearing.joined(
        [
            hearing.heard(
                RoundStream(**common, world=World(rank, ranks), global_batch=BATCH, accumulation=1),
                6,
                workers,
            )
            for rank in range(ranks)
        ]
    )
    each = BATCH // lanes
    hands = dealt(SIZES, lanes, (7, "memory"), 6 * each)
    for number, ids in enumerate(hearing.ids(found, "next_step")):
        own = [clip for hand in hands for _, clip in hand[number * each : (number + 1) * each]]
        assert ids == own


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_worlds_of_processes_hear_the_same_rounds_also_one_after_the_other(words, truth, tmp_path):
    """Each hears ten rounds from the start, and goes on where another one has stopped; one has written that."""
    saved, first = tmp_path / "positions.json", 2
    saved.write_text(json.dumps(truth[first - 1]["positions"]))
    for ranks, workers, stop in ((1, 3, 4), (2, 0, 5), (2, 2, 7), (3, 1, 9), (4, 1, 10)):
        out = tmp_path / f"{ranks}-{workers}"
        out.mkdir()
        script = ["tests/workers/stream_worker.py", str(out), str(workers), str(first), str(stop)]
        script += [str(saved), *words]
        several = ["--num_processes", str(ranks), *script]
        launched = ranks > 1
        done = worlds.launch("two_cpu_processes", *several) if launched else worlds.run(*script)
        assert done.returncode == 0, done.stderr[-3000:]
        told = [json.loads((out / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
        whole, rest = (hearing.joined(list(shares)) for shares in zip(*told, strict=True))
        assert whole == truth
        assert rest == truth[first:stop]
        saved.write_text(json.dumps(rest[-1]["positions"]))
        first = stop


@pytest.mark.parametrize("fewest", [128, 1])
def test_a_lane_goes_on_at_any_clip(words, monkeypatch, fewest):
    """Between the row groups of a block, too, and in the last block of an epoch."""
    monkeypatch.setattr(streams, "FEWEST_BLOCKS", fewest)
    rows, last = set(), 0
    for stream in build_experiment(load_config(words)).streams():
        for number in range(0, 12, 3):
            lane, walked = stream.lane(number, 0, {}), []
            for epoch, row in itertools.islice(lane, 16):
                walked.append((lane.position, epoch, row.id))
            for (position, epoch, _), (_, *wanted) in itertools.pairwise(walked):
                again, found = next(stream.lane(number, 0, {stream.name: {number: position}}))
                assert [again, found.id] == wanted
                rows.add(position[2])
                last += position[1] == len(lane.own(epoch)) - 1 and epoch == wanted[0]
    assert last
    assert (max(rows) > 7) == (fewest == 1)


def test_a_lane_may_give_several_clips_a_step_and_stop_anywhere(words):
    experiment = build_experiment(load_config([*words, "--data.lanes", "4"]))
    truth = rounds_of(experiment, 6)
    assert {len(own) for own in truth[0]["positions"].values()} == {4}
    for stop, ranks, workers in ((1, 2, 3), (3, 4, 0), (5, 1, 1)):
        positions = truth[stop - 1]["positions"]
        rest = rounds_of(experiment, 6 - stop, ranks, workers, stop, positions)
        assert rest == truth[stop:]


@pytest.mark.parametrize("fewest", [128, 1])
def test_every_clip_comes_once_an_epoch(words, monkeypatch, fewest):
    """Of row groups, alone or together, of tars, of listed rows; also where rows are left out."""
    monkeypatch.setattr(streams, "FEWEST_BLOCKS", fewest)
    experiment = build_experiment(load_config(words))
    heard = collections.defaultdict(list)
    for stream in experiment.streams():
        for number in range(stream.lanes):
            beside = stream.noise_lanes(number, 0, {})
            for name, lane in {stream.name: stream.lane(number, 0, {}), **beside}.items():
                for epoch, row in itertools.takewhile(lambda pair: pair[0] < 3, lane):
                    heard[stream.name, name, epoch].append(row.id)
    corpora = experiment.corpora
    wanted = {
        name: sorted(
            f"{corpus}/{row['id']}"
            for corpus in name.split("+")
            for row in corpora[corpus].stream("train")
        )
        for name in ("fsdkaggle2018", SPEECH, "chime3")
    }
    assert len(wanted["chime3"]) == 7
    assert len(heard) == 3 * 4
    for (_, name, _), ids in heard.items():
        times = noise.NOISE_CUTS if name == "chime3" else 1
        assert sorted(ids) == sorted(wanted[name] * times)
    assert heard[SPEECH, SPEECH, 0] != heard[SPEECH, SPEECH, 1]


def test_tasks_with_the_same_sources_hear_the_same_clips_and_a_row_is_read_once(words, monkeypatch):
    opened, read = [], []
    open_row, read_block = ClipReader.open, streams.StreamFiles.read
    monkeypatch.setattr(
        ClipReader, "open", lambda self, row: opened.append(row.id) or open_row(self, row)
    )
    monkeypatch.setattr(
        streams.StreamFiles, "read", lambda *what: read.append(what[1:]) or read_block(*what)
    )
    reads = []
    for names in ("next_step,upsampling,noise_reduction", "upsampling,noise_reduction"):
        chosen = ["--train.tasks", f"[{names}]", "--train.main_task", "upsampling"]
        experiment = build_experiment(load_config([*words, *chosen]))
        opened.clear(), read.clear()
        found = rounds_of(experiment, 4)
        for task in names.split(","):
            assert hearing.ids(found, task) == hearing.ids(found, "upsampling")
        assert opened == [*itertools.chain(*hearing.ids(found, "upsampling"))]
        reads.append(list(read))
    assert reads[0] == reads[1]


def test_the_noise_in_a_clip_is_of_the_recording_beside_it(experiment):
    """Which lies at its place in a lane of noise; training hears the first 80% of it."""
    (round_,) = itertools.islice(experiment.rounds(ALONE, 1, 0, {}).rounds(0, False), 1)
    (micro,) = round_.micro_batches["noise_reduction"]
    (stream,) = (s for s in experiment.streams() if s.name == SPEECH)
    names = {
        row["id"]: row["audio"]["bytes"] for row in experiment.corpora["chime3"].stream("train")
    }
    for number, (noisy, clean, valid) in enumerate(zip(*micro.batch, strict=True)):
        _, row = next(stream.noise_lanes(number, 0, {})["chime3"])
        wave, _ = soundfile.read(io.BytesIO(names[row.id.removeprefix("chime3/")]))
        wave = wave[: int(0.8 * len(wave))]
        noise = (noisy - clean)[:valid].double().numpy()
        windows = np.lib.stride_tricks.sliding_window_view(wave, len(noise))
        cosines = windows @ noise / np.linalg.norm(windows, axis=1) / np.linalg.norm(noise)
        assert cosines.max() > 0.999


def test_weights_give_exact_shares_of_every_step_and_each_source_its_own_epochs(tiny_experiment):
    parts = [in_memory([2, 3, 1], source=0), in_memory([5] * 8, source=1)]
    stream = ClipStream(["next_step"], ["memory"], parts, {}, lanes=12, weights={"memory": [1, 2]})
    lanes = [stream.lane(n, 0, {}) for n in range(12)]
    assert [lane.blocks.parts for lane in lanes] == [parts[:1]] * 4 + [parts[1:]] * 8
    for own, total in ((lanes[:4], 6), (lanes[4:], 40)):
        epochs = collections.Counter(
            (epoch, row.id)
            for lane in own
            for epoch, row in itertools.takewhile(lambda pair: pair[0] < 3, lane)
        )
        assert len(epochs) == 3 * total
        assert set(epochs.values()) == {1}
    with pytest.raises(ValueError, match=r"sources\[0\]: 0 of 12 lanes by its weight"):
        ClipStream(["next_step"], ["memory"], parts, {}, lanes=12, weights={"memory": [1, 99]})


class Counted:
    """Rows in memory, as many as train-clean-360 and more, in blocks of 16."""

    rows, size = 148_688, 16

    def blocks(self) -> np.ndarray:
        files = np.arange(-(-self.rows // self.size))
        return np.stack([files, np.zeros_like(files)], axis=1)

    def name(self, file: int, part: int) -> str:
        return f"block {file}"

    def read(self, file: int, part: int):
        numbers = range(file * self.size, min(self.rows, (file + 1) * self.size))
        nothing = {
            field.name: pa.nulls(len(numbers), field.type) for field in FEATURES.arrow_schema
        }
        yield pa.table(nothing | {"id": pa.array(map(str, numbers))})


def test_1024_ranks_hear_everything_once_and_each_starts_at_once(tiny_experiment):
    files, ranks, lanes = Counted(), 1024, 4096
    part = Part(corpus="many", split="train", files=files, blocks=files.blocks(), clips=files.rows)
    stream = ClipStream(["next_step"], ["many"], [part], {}, lanes=lanes, weights={})
    blocks = stream.groups[0][0]
    seen, began = [], time.perf_counter()
    for rank in range(ranks):
        rounds = RoundStream(
            tasks={}, streams=[stream], reader=tiny_experiment.reader, seed=0,
            world=World(rank, ranks), global_batch=lanes, accumulation=1,
        )  # fmt: skip
        own = [stream.lane(number, 0, {}) for _, number in rounds.own_lanes(0, 1)]
        assert len(own) == 4
        seen += [np.concatenate([lane.own(epoch) for lane in own]) for epoch in (0, 3)]
        if rank == 0:
            ids = [next(lane)[1].id for lane in own]
            print(f"one rank of {ranks} starts in {1e3 * (time.perf_counter() - began):.1f} ms")
            assert len(set(ids)) == 4
    for epoch in (0, 1):
        assert sorted(np.concatenate(seen[epoch::2])) == list(range(len(blocks)))
    rows = [
        row.id
        for number in range(0, lanes, 64)
        for _, row in itertools.takewhile(lambda p: p[0] < 1, stream.lane(number, 0, {}))
    ]
    assert len(set(rows)) == len(rows) >= 16 * (lanes // 64) * 2


def test_positions_are_those_of_the_clips_that_were_taken_not_of_those_read_ahead(
    experiment, truth
):
    rounds = experiment.rounds(ALONE, 1, 0, {}).rounds(2, pin_memory=False)
    for number in range(2):
        round_ = next(rounds)
        until = time.monotonic() + 60
        while rounds.ahead() < 2 and time.monotonic() < until:
            time.sleep(0.01)
        assert rounds.ahead() >= 2
        assert round_.positions == hearing.numbered(truth[number]["positions"])
    rounds.close()


def test_blocks_without_clips_are_passed_over_and_a_stream_of_none_but_such_is_an_error():
    blocks = Blocks([in_memory([0] * 40 + [2])])
    for number in range(6):  # whichever lane gets the block, and however late
        found = [row.id for _, row in itertools.islice(Lane(blocks, 6, number, (number,)), 4)]
        assert [sorted(found[:2]), sorted(found[2:])] == [["memory/40-0", "memory/40-1"]] * 2
    part = in_memory([0, 0, 0, 1])
    part.blocks = part.blocks[:3]
    with pytest.raises(
        DataError, match=r"host .*, corpus memory: none of its 3 blocks holds a clip"
    ):
        next(Lane(Blocks([part]), 2, 0, (0,)))
    with pytest.raises(ValueError, match="holds no clips, nor do the others of 3 files"):
        in_memory([0, 0, 0])
    with pytest.raises(ValueError, match="holds no clips"):
        Blocks([])


def test_a_row_group_of_many_rows_is_read_some_at_a_time(tmp_path):
    sound, many = kinds.flac(0), 2 * streams.MOST_ROWS + 100
    rows = [{"id": str(n), "audio": {"bytes": sound, "path": None}} for n in range(many)]
    path = str(kinds.parquet(tmp_path / "a.parquet", rows, group=many))
    (files,) = open_source(Source(path=path)).values()
    assert [len(table) for table in files.read(0, 0)] == [streams.MOST_ROWS] * 2 + [100]
    part = Part(corpus="many", split="train", files=files, blocks=files.blocks())
    heard = [row.id for epoch, row in itertools.islice(Lane(Blocks([part]), 1, 0, (0,)), many)]
    assert sorted(heard) == sorted(f"many/{n}" for n in range(many))


def test_more_lanes_than_blocks_cost_no_walk_through_epochs_that_have_none_for_a_lane():
    blocks = Blocks([in_memory([1])])
    lane = Lane(blocks, 100_000, 99_999, (0,))
    began = time.perf_counter()
    assert [epoch for epoch, _ in itertools.islice(lane, 2)] == [99_999, 199_999]
    assert time.perf_counter() - began < 1
