"""Whole clips: batches of unequal clips have the clips and the gradient of each clip alone, however they are split."""

import big_batch
import hearing
import numpy as np
import pytest
import soundfile
import torch
import whole
import worlds
from safetensors.torch import load_file

from mtl_dist import footprint
from mtl_dist.audio.clips import Background, ClipReader, Row
from mtl_dist.data.batches import keyed_generators
from mtl_dist.data.keys import generator
from mtl_dist.round import run_round
from mtl_dist.runtime import World

LAW, LAW_OF_BIASES = 1e-5, 1e-4
"""torch adds up a bias' gradient frame after frame in float32; exact it is in float64."""


@pytest.fixture(scope="module")
def root(corpora_root, tmp_path_factory):
    return whole.write_uneven(corpora_root, tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def experiment(root):
    return whole.build(root)


@pytest.fixture(scope="module")
def truth(experiment):
    """{task: {clip: its batch alone}} of the first round."""
    return {
        name: {m.ids[0]: m.batch for m in whole.alone(experiment, name, list(clips))}
        for name, clips in clips_of(experiment, whole.rounds(experiment, 1)).items()
    }


def clips_of(experiment, shares) -> dict[str, dict[str, tuple]]:
    """{task: {clip: its row of a batch}} of one round, of all ranks."""
    found = {}
    for name in experiment.tasks:
        micro = [m for share in shares for m in share.micro_batches[name]]
        ids = [clip for m in micro for clip in m.ids]
        rows = [row for m in micro for row in zip(*m.batch, strict=True)]
        assert len(set(ids)) == len(ids) == whole.BATCH
        found[name] = dict(zip(ids, rows, strict=True))
    return found


def gradient(model, steps: list[dict], counts: dict[str, float]) -> dict[str, torch.Tensor]:
    """Accumulate a model's gradient over micro-steps {task: batch}."""
    model.zero_grad()
    for step in steps:
        losses = model(step).items()
        sum(big_batch.WEIGHTS[n] * total / counts[n] for n, (total, _) in losses).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_law(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name in wanted:
        limit = LAW_OF_BIASES if name.endswith("bias") else LAW
        assert big_batch.worst_error({name: found[name]}, {name: wanted[name]}) < limit, name


@pytest.mark.parametrize(
    ("ranks", "workers", "accumulation"), [(1, 0, 1), (1, 3, 4), (2, 2, 2), (4, 1, 1)]
)
def test_any_split_has_the_clips_of_each_alone(experiment, truth, ranks, workers, accumulation):
    shares = [
        whole.rounds(experiment, 1, World(rank, ranks), workers, accumulation)[0]
        for rank in range(ranks)
    ]
    found = clips_of(experiment, shares)
    assert len({int(batch.valid) for batch in truth["audio_tagging"].values()}) > 6
    for name, clips in truth.items():
        assert found[name].keys() == clips.keys()
        for clip, batch in clips.items():
            (inputs, targets, valid), length = found[name][clip], batch.inputs.shape[1]
            assert valid == batch.valid[0]
            assert torch.equal(inputs[:length], batch.inputs[0])
            assert not inputs[length:].any()
            if targets.ndim:
                assert not targets[length:].any()
            assert torch.equal(targets[:length] if targets.ndim else targets, batch.targets[0])


def test_micro_batches_are_sorted_and_end_with_their_longest_clip(experiment):
    (round_,) = whole.rounds(experiment, 1, accumulation=8)
    for name, micro in round_.micro_batches.items():
        lengths = [length for m in micro for length in m.batch.valid.tolist()]
        assert lengths == sorted(lengths, reverse=True)
        assert [m.batch.inputs.shape[1] for m in micro] == [
            max(1, int(m.batch.valid.max())) + whole.TAIL[name] for m in micro
        ]


@pytest.mark.parametrize("slices", ["null", "0.0007", "0.02"])
def test_the_gradient_is_that_of_every_clip_alone_in_float64(experiment, truth, root, slices):
    model = whole.build(root, "--memory.slice_seconds", slices).build_model().double()
    wanted = whole.true_gradients(model, experiment, {n: list(clips) for n, clips in truth.items()})
    for accumulation in (1, 2) if slices == "0.0007" else (1, 2, 8):
        (round_,) = whole.rounds(experiment, 1, accumulation=accumulation)
        steps = [
            {name: m.batch._replace(inputs=m.batch.inputs.double())}
            for name, micro in round_.micro_batches.items()
            for m in micro
        ]
        counts = {
            name: sum(float(experiment.tasks[name].count(m.batch)) for m in micro)
            for name, micro in round_.micro_batches.items()
        }
        found = gradient(model, steps, counts)
        assert big_batch.worst_error(found, wanted) < 1e-12, accumulation


@pytest.mark.parametrize("schedule", ["round_robin", "joint"])
def test_the_step_of_a_round_is_that_of_every_clip_alone(experiment, truth, schedule):
    engine = big_batch.engine(big_batch.cpu_accelerator(), experiment, big_batch.NAMES, None)
    before, _ = engine.full_state()
    wanted = whole.true_gradients(
        engine.bare, experiment, {n: list(clips) for n, clips in truth.items()}
    )
    (round_,) = whole.rounds(experiment, 1, accumulation=4)
    run_round(engine, experiment.tasks, round_, schedule=schedule)
    after, _ = engine.full_state()
    step = {n: (before[n].double() - after[n].double()) / big_batch.RATE for n in before}
    assert_law(step, wanted)


@pytest.mark.parametrize(
    ("engine", "slices"),
    [
        ("", "null"),
        ("fsdp2_", "0.02"),
        pytest.param("zero3_", "null", marks=pytest.mark.deepspeed),
        pytest.param("zero3_", "0.02", marks=pytest.mark.deepspeed),
    ],
)
def test_two_processes_with_two_workers_have_the_gradient_of_every_clip_alone(
    experiment, truth, root, tmp_path, engine, slices
):
    script = "tests/workers/whole_clips_worker.py"
    words = [str(root), str(tmp_path), "--memory.slice_seconds", slices]
    done = worlds.launch(f"{engine}two_cpu_processes", script, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    ids = {name: list(clips) for name, clips in truth.items()}
    model = big_batch.build(experiment, big_batch.NAMES)
    wanted = whole.true_gradients(model, experiment, ids)
    found = load_file(tmp_path / "gradients.safetensors")
    for schedule in ("round_robin", "joint"):
        ours = {n.partition("/")[2]: g for n, g in found.items() if n.startswith(schedule)}
        assert_law(ours, wanted)


def test_a_clip_is_whole_unless_it_is_longer_than_the_longest(experiment):
    task, reader = experiment.tasks["audio_tagging"], experiment.reader
    assert task.crop_samples == whole.LONGEST * 16_000
    long = 0
    for _, row in hearing.training_rows(experiment, "audio_tagging"):
        ours = [
            hearing.batch_of(experiment, "audio_tagging", [(epoch, row)], bad=None).batch
            for epoch in range(3)
        ]
        (everything,) = reader.windows(row, 10**6) if int(ours[0].valid) else [reader.absent(row)]
        assert int(ours[0].valid) == min(len(everything.wave), task.crop_samples)
        if len(everything.wave) > task.crop_samples:
            long += 1
            assert not torch.equal(ours[0].inputs, ours[1].inputs)
        else:
            assert all(np.array_equal(b.inputs[0, : b.valid], everything.wave) for b in ours)
    assert long


@pytest.mark.parametrize("name", big_batch.NAMES)
def test_a_batch_of_absent_clips_counts_nothing_and_changes_nothing(experiment, name):
    row = Row(id="a", audio={"path": None, "bytes": b""})
    micro = hearing.batch_of(experiment, name, [(0, row)] * 3, bad=3)
    assert micro.batch.inputs.shape == (3, 1 + whole.TAIL[name])
    model = experiment.build_model()
    ((total, count),) = model({name: micro.batch}).values()
    total.backward()
    assert (float(total), float(count)) == (0.0, 0.0)
    assert all(not p.grad.any() for p in model.parameters())


def test_lengths_that_are_equal_by_chance_change_no_number_of_trunk_passes(experiment):
    model, passes = experiment.build_model(), []
    model.trunk.register_forward_hook(lambda *_: passes.append(1))
    task = experiment.tasks["audio_tagging"]
    batch = footprint.batch_of(task, 2)
    model(
        {"audio_tagging": batch, "next_step": footprint.batch_of(experiment.tasks["next_step"], 2)}
    )
    assert len(passes) == 2


def test_noise_shorter_than_a_clip_is_repeated_at_the_drawn_snr(experiment, tmp_path):
    path = tmp_path / "long.wav"
    soundfile.write(path, np.random.default_rng(0).uniform(-0.5, 0.5, 16_000 * 5), 16_000)
    _, recording = next(experiment.streams()[1].noise_lanes(0, 0, {})["chime3"])
    beside = {"chime3": Background(recording, 16_000)}
    row = Row(id="a", audio={"path": str(path), "bytes": None}, backgrounds=beside)
    clip = ClipReader().crop(row, 10**6, generator("crop"))
    assert len(clip.wave) == 16_000 * 5
    task = experiment.tasks["noise_reduction"]
    batch = task.prepare([clip], keyed_generators(0, task.name, 0))
    noise = (batch.inputs - batch.targets)[0, : 16_000 * 5].double()
    target = batch.targets[0, : 16_000 * 5].double()
    ratio = 10 * torch.log10(target.square().sum() / noise.square().sum())
    assert 10 <= ratio <= 15
    assert (noise.view(50, -1).square().mean(dim=1) > 0).all()
