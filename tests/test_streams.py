"""The stream laws: the clips and draws of round k are a function of (seed, task, k) and of nothing else."""

import itertools

import numpy as np
import pytest
import soundfile
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mtl_dist.config import load_config
from mtl_dist.corpora.base import make_corpus
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World
from mtl_dist.streams.batches import keyed_generators, prepare
from mtl_dist.streams.keys import generator
from mtl_dist.streams.order import Order
from mtl_dist.streams.rounds import RoundStream

GLOBAL_BATCH = 8
ALONE = World()


def stream(experiment, world=ALONE, accumulation=1, first_round=0, batch=GLOBAL_BATCH):
    return RoundStream(
        tasks=experiment.tasks,
        tables={name: experiment.table(name) for name in experiment.tasks},
        reader=experiment.reader,
        seed=0,
        world=world,
        global_batch=batch,
        accumulation=accumulation,
        first_round=first_round,
        positions=dict.fromkeys(experiment.tasks, first_round * batch),
    )


def first(stream, number: int, workers: int = 0) -> list:
    rounds = stream.rounds(workers, pin_memory=False)
    found = list(itertools.islice(rounds, number))
    rounds.close()
    return found


def flat(*shares) -> dict:
    """Join the ranks' shares of one round: {task: (ids, inputs, targets, valid)} in the order of the positions."""
    joined = {}
    for name in shares[0].micro_batches:
        micro = [m for share in shares for m in share.micro_batches[name]]
        tensors = [torch.cat(parts) for parts in zip(*(m.batch for m in micro), strict=True)]
        joined[name] = ([clip for m in micro for clip in m.ids], *tensors)
    return joined


def assert_equal_rounds(found: dict, truth: dict) -> None:
    assert set(found) == set(truth)
    for name in truth:
        assert found[name][0] == truth[name][0]
        for ours, theirs in zip(found[name][1:], truth[name][1:], strict=True):
            assert torch.equal(ours, theirs), name


@pytest.fixture(scope="module")
def truth(tiny_experiment):
    """Eight rounds of one rank without workers, more than two epochs of audio_tagging's 21 clips."""
    return [flat(r) for r in first(stream(tiny_experiment), 8)]


def toy_table(rows: int):
    listed = [{"id": str(i), "path": "none", "label": None, "split": "train"} for i in range(rows)]
    return make_corpus("toy", listed).splits["train"]


BLOCKS = st.lists(st.integers(1, 5), min_size=1, max_size=9).map(
    lambda sizes: np.repeat(np.arange(len(sizes)), sizes)
)
"""Tables of blocks of different sizes: the block of every row."""


@given(
    blocks=BLOCKS, lanes=st.integers(1, 7), epochs=st.integers(1, 3), start=st.integers(0, 10**9)
)
@settings(max_examples=50, deadline=None)
def test_every_row_comes_exactly_once_an_epoch(blocks, lanes, epochs, start):
    order = Order(blocks, lanes, (0, "task"))
    rows, begin = len(order), start // len(blocks) * len(blocks)
    seen = [row for _, row in order.rows(iter(range(begin, begin + epochs * rows)))]
    for epoch in range(epochs):
        assert sorted(seen[epoch * rows : (epoch + 1) * rows]) == list(range(rows))


@given(blocks=BLOCKS, lanes=st.integers(1, 7), start=st.integers(0, 20), step=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_any_positions_have_the_rows_of_the_whole_order(blocks, lanes, start, step):
    order = Order(blocks, lanes, (0, "task"))
    whole, places = list(order.rows(iter(range(90)))), range(start, 90, step)
    assert list(order.rows(iter(places))) == [whole[n] for n in places]


@given(blocks=BLOCKS, lanes=st.integers(1, 7))
@settings(max_examples=50, deadline=None)
def test_a_lane_reads_block_after_block_and_shares_only_its_first_and_last(blocks, lanes):
    order = Order(blocks, lanes, (0, "task"))
    rows = order.permutation(0)
    visits = [[b for b, _ in itertools.groupby(blocks[rows[lane::lanes]])] for lane in range(lanes)]
    if blocks.max() + 1 < len(blocks):
        assert all(len(seen) == len(set(seen)) for seen in visits)
        inner = [block for seen in visits for block in seen[1:-1]]
        assert len(inner) == len(set(inner))
        assert sum(map(len, visits)) <= blocks.max() + lanes


def test_the_lanes_of_1024_ranks_are_disjoint_and_complete():
    blocks = np.repeat(np.arange(9_293), 16)[:148_688]
    order = Order(blocks, 1024 * 4, (0, "next_step"))
    epoch = order.permutation(3)
    of_rank = [
        epoch[[n for r in range(4) for n in range(rank * 4 + r, len(epoch), 4096)]]
        for rank in range(1024)
    ]
    assert sorted(np.concatenate(of_rank)) == list(range(148_688))


def test_every_clip_comes_exactly_once_an_epoch_through_the_rounds(tiny_experiment, truth):
    for name in tiny_experiment.tasks:
        wanted = sorted(tiny_experiment.table(name)["id"])
        seen = [clip for round_ in truth for clip in round_[name][0]]
        for start in range(0, len(seen) - len(wanted) + 1, len(wanted)):
            assert sorted(seen[start : start + len(wanted)]) == wanted


def test_epochs_and_tasks_have_orders_of_their_own(tiny_experiment):
    table = tiny_experiment.table("next_step")
    orders = [
        Order(table.blocks(), 4, (seed, name)).permutation(epoch).tolist()
        for seed, name, epoch in [(0, "a", 0), (0, "a", 1), (0, "b", 0), (1, "a", 0)]
    ]
    assert len(set(map(tuple, orders))) == 4


@pytest.mark.parametrize("workers", [1, 3])
def test_loader_workers_change_nothing(tiny_experiment, truth, workers):
    found = first(stream(tiny_experiment), 8, workers)
    for number, (round_, wanted) in enumerate(zip(found, truth, strict=True)):
        assert round_.number == number
        assert_equal_rounds(flat(round_), wanted)


@pytest.mark.parametrize(("ranks", "accumulation"), [(1, 2), (1, 8), (2, 1), (2, 4), (4, 2)])
def test_ranks_and_accumulation_change_nothing(tiny_experiment, truth, ranks, accumulation):
    worlds = [World(rank=rank, size=ranks) for rank in range(ranks)]
    shares = [first(stream(tiny_experiment, world, accumulation), 8) for world in worlds]
    for share in shares[0]:
        sizes = {len(m.ids) for ms in share.micro_batches.values() for m in ms}
        assert sizes == {GLOBAL_BATCH // ranks // accumulation}
    for parts, wanted in zip(zip(*shares, strict=True), truth, strict=True):
        assert_equal_rounds(flat(*parts), wanted)


@pytest.mark.parametrize("stopped", [1, 2, 5, 7])
def test_a_stream_that_goes_on_at_any_round_equals_the_whole(tiny_experiment, truth, stopped):
    rest = first(stream(tiny_experiment, first_round=stopped), 8 - stopped)
    assert [r.number for r in rest] == list(range(stopped, 8))
    for round_, wanted in zip(rest, truth[stopped:], strict=True):
        assert_equal_rounds(flat(round_), wanted)


def test_going_on_with_other_ranks_and_workers_equals_the_whole(tiny_experiment, truth):
    worlds = [World(rank=rank, size=2) for rank in range(2)]
    streams = [stream(tiny_experiment, world, 2, first_round=3) for world in worlds]
    shares = [first(s, 5, workers=2) for s in streams]
    for parts, wanted in zip(zip(*shares, strict=True), truth[3:], strict=True):
        assert_equal_rounds(flat(*parts), wanted)


def test_a_corpus_smaller_than_a_round_repeats_with_fresh_crops(tiny_experiment):
    names = tiny_experiment.table("audio_tagging")["id"]
    (round_,) = first(stream(tiny_experiment, batch=2 * len(names)), 1)
    ids, inputs, _, _ = flat(round_)["audio_tagging"]
    assert sorted(ids[: len(names)]) == sorted(ids[len(names) :]) == sorted(names)
    crops = {clip: [inputs[i] for i, c in enumerate(ids) if c == clip] for clip in names}
    assert sum(not torch.equal(a, b) for a, b in crops.values()) > len(names) / 3


def test_clips_and_seconds_of_the_ranks_add_up(tiny_experiment, truth):
    shares = [first(stream(tiny_experiment, World(rank, 2)), 1)[0] for rank in (0, 1)]
    assert sum(share.clips for share in shares) == 4 * GLOBAL_BATCH
    heard = sum(int(valid.sum()) for _, _, _, valid in truth[0].values()) / 16_000
    assert sum(share.audio_seconds for share in shares) == pytest.approx(heard)


def draws_of(experiment, task: str, epoch: int, seed: int = 0) -> torch.Tensor:
    rows = [(epoch, row) for row in experiment.table("next_step")]
    batch, bad = prepare(experiment.tasks[task], rows, experiment.reader, seed)
    assert bad == []
    return batch.batch.inputs


def test_draws_differ_between_epochs_and_seeds(tiny_experiment):
    base = draws_of(tiny_experiment, "noise_reduction", 0)
    assert torch.equal(base, draws_of(tiny_experiment, "noise_reduction", 0))
    for other in ({"epoch": 1}, {"epoch": 0, "seed": 1}):
        found = draws_of(tiny_experiment, "noise_reduction", **other)
        assert not any(torch.equal(a, b) for a, b in zip(base, found, strict=True))


def test_tasks_crop_the_same_clip_at_places_of_their_own(tiny_experiment):
    crops = [draws_of(tiny_experiment, "next_step", 0)]
    task = tiny_experiment.tasks["upsampling"]
    rows = [(0, row) for row in tiny_experiment.table("next_step")]
    crops.append(prepare(task, rows, tiny_experiment.reader, 0)[0].batch.targets)
    differing = sum(not torch.equal(a, b) for a, b in zip(*crops, strict=True))
    assert differing > len(rows) / 2


def test_clips_draw_places_of_their_own():
    keyed = keyed_generators(0, "task", 0)
    places = [int(keyed(f"clip {i}", "crop").integers(10**6)) for i in range(200)]
    assert len(set(places)) > 195


def test_a_bad_file_keeps_its_place_and_changes_no_other_clip(tmp_path):
    whole = build_experiment(load_config(tiny.tiny_words(tiny.write_corpora(tmp_path))))
    before = [flat(r) for r in first(stream(whole), 3)]
    rows = {row["id"]: row["audio"]["path"] for row in whole.table("next_step")}
    victim = next(clip for clip, path in sorted(rows.items()) if path.endswith("flac"))
    with open(rows[victim], "wb") as file:
        file.write(b"no audio")
    broken = first(stream(whole), 3)
    assert sum(rows[victim] in message for r in broken for message in r.bad) > 0
    for found, wanted in zip(map(flat, broken), before, strict=True):
        for name in wanted:
            assert found[name][0] == wanted[name][0]
            for i, clip in enumerate(wanted[name][0]):
                if clip == victim:
                    assert int(found[name][3][i]) == 0
                    assert not found[name][1][i].any()
                else:
                    assert torch.equal(found[name][1][i], wanted[name][1][i])


def test_only_the_stretch_that_is_needed_is_read(tiny_experiment, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 60), 16_000)
    row = {"id": "long", "audio": {"path": str(path), "bytes": None}, "label": -1, "split": "train"}
    taken, read = [], soundfile.SoundFile.read

    def counted(self, frames=-1, *more, **named):
        taken.append(frames)
        return read(self, frames, *more, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(soundfile.SoundFile, "read", counted)
        tiny_experiment.reader.crop(row, 800, generator(0))
    assert 800 <= sum(taken) < 16_000 * 4


def test_equal_keys_draw_equally_and_others_do_not():
    assert generator(1, "a").integers(2**62) == generator(1, "a").integers(2**62)
    keys = [(1, "a"), (1, "b"), (2, "a"), (1, "a", ""), ("1a",), (1, "a", 0), (11, ""), (1, 1)]
    assert len({int(generator(*key).integers(2**62)) for key in keys}) == len(keys)


def test_draws_of_different_keys_are_not_correlated():
    first_, second = (generator(0, "clip", i).normal(size=20_000) for i in (1, 2))
    assert abs(np.corrcoef(first_, second)[0, 1]) < 5 / np.sqrt(20_000)
    starts = np.array([generator(0, "clip", i).uniform() for i in range(2_000)])
    counts, _ = np.histogram(starts, bins=10, range=(0, 1))
    assert ((counts - 200) ** 2 / 200).sum() < 33.7  # chi-square of 9 degrees, 1 in 10,000


def test_a_stream_without_clips_is_refused():
    with pytest.raises(ValueError, match="no clips"):
        Order(np.zeros(0, np.int64), 1, (0, "task"))
