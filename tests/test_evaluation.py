"""Evaluation on several ranks: every clip exactly once, and the numbers of a single process."""

import json
import types

import hearing
import pytest
import tiny
import torch
import worlds
from accelerate import Accelerator

from mtl_dist import evaluation
from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.runtime import World

NOT_EVEN = tiny.TEST_CLIPS  # 79: no number of ranks divides it
LIMIT = 7


@pytest.fixture(scope="module")
def words(corpora_root, tmp_path_factory):
    """Tagging is scored on listed rows, the others on a few blocks of Parquet and tars, held out."""
    mixed = hearing.mixed(corpora_root, tmp_path_factory.mktemp("mixed"))
    return [*mixed, "--evaluation.max_clips", "null"]


@pytest.fixture(scope="module")
def experiment(words):
    return build_experiment(load_config(words))


@pytest.fixture(scope="module")
def truth(experiment):
    """The evaluation of one process."""
    return evaluate(experiment)


def evaluate(experiment):
    return evaluation.evaluate(Accelerator(cpu=True), experiment.build_model(), experiment, "test")


def rows_of(experiment, task: str, limit: int | None = None, world=World()) -> list:  # noqa: B008
    return list(evaluation.evaluation_rows(experiment, task, "test", limit, world))


def assert_same_metrics(found: dict, truth) -> None:
    assert set(found) == set(truth.metrics)
    for task, metrics in truth.metrics.items():
        assert set(found[task]) == set(metrics)
        for name, wanted in metrics.items():
            ours = torch.as_tensor(found[task][name], dtype=torch.float64)
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_processes_hear_every_clip_once_and_have_the_numbers_of_one(
    experiment, truth, words, tmp_path, ranks
):
    """With and without a limit, the noise included; one of three ranks has no block of the few that there are."""
    script = ["tests/workers/evaluation_worker.py", str(tmp_path), *words]
    several = ["--num_processes", str(ranks), *script]
    done = worlds.launch("two_cpu_processes", *several) if ranks > 1 else worlds.run(*script)
    assert done.returncode == 0, done.stderr[-3000:]
    told = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in range(ranks)]
    limited = build_experiment(load_config([*words, "--evaluation.max_clips", str(LIMIT)]))
    for place, wanted in enumerate((truth, evaluate(limited))):
        for task, settings in experiment.tasks.items():
            corpus = settings.config.sources[0]
            every = {f"{corpus}/{r['id']}" for r in experiment.corpora[corpus].stream("test")}
            heard = [clip for own in told for clip in own[place]["heard"][task]]
            assert (
                len(heard) == len(set(heard)) == (min(LIMIT, len(every)) if place else len(every))
            )
            assert set(heard) <= every
        for own in told:
            assert (own[place]["clips"], own[place]["bad"]) == (wanted.clips, [])
            assert_same_metrics(own[place]["metrics"], wanted)


def test_several_crops_of_a_clip_have_draws_of_their_own_and_are_averaged(words, truth):
    experiment = build_experiment(load_config([*words, "--evaluation.crops", "3"]))
    task = experiment.tasks["noise_reduction"]
    arguments = (experiment, task, rows_of(experiment, "noise_reduction"), [])
    scores = []
    for (_, row), (_, (alone,)) in zip(
        evaluation.evaluation_batches(*arguments, crops=3),
        evaluation.evaluation_batches(*arguments),
        strict=True,
    ):
        assert torch.equal(row[0].inputs, alone.inputs)
        assert len({tuple(batch.inputs[0].tolist()) for batch in row}) == 3
        for batch in row:
            clean, noise = batch.targets[0].double(), (batch.inputs - batch.targets)[0].double()
            scores.append(float(10 * torch.log10(clean.square().sum() / noise.square().sum())))
    result = evaluate(experiment)
    found = float(result.metrics["noise_reduction"]["si_sdr_noisy"])
    assert found == pytest.approx(sum(scores) / len(scores), abs=0.5)  # SI-SDR lets the scale go
    assert result.clips == truth.clips
    tagging = types.SimpleNamespace(metrics={"audio_tagging": truth.metrics["audio_tagging"]})
    assert_same_metrics({"audio_tagging": result.metrics["audio_tagging"]}, tagging)


def test_evaluation_says_the_same_twice_and_leaves_the_model_in_training(experiment, truth):
    model = experiment.build_model()
    again = evaluation.evaluate(Accelerator(cpu=True), model, experiment, "test")
    assert again.numbers() == truth.numbers()
    assert model.training


def test_a_limit_takes_the_same_clips_every_time_whatever_the_world(experiment, words):
    for task in ("audio_tagging", "noise_reduction"):
        every = rows_of(experiment, task)
        noise = [{c: b.row.id for c, b in row.backgrounds.items()} for row in every]
        for ranks in (1, 2, 3):
            shares = [rows_of(experiment, task, LIMIT, World(rank, ranks)) for rank in range(ranks)]
            for place, wanted in enumerate(every[:LIMIT]):
                row = shares[place % ranks][place // ranks]
                assert row.id == wanted.id
                assert {c: b.row.id for c, b in row.backgrounds.items()} == noise[place]
    assert len({str(beside) for beside in noise}) > 1
    other = build_experiment(load_config([*words, "--data.split_seed", "1"]))
    ours, theirs = (rows_of(e, "audio_tagging", LIMIT) for e in (experiment, other))
    assert [row.id for row in ours] != [row.id for row in theirs]


def test_the_mean_is_that_of_the_clips_one_by_one(experiment, truth):
    """Brute force: every test clip alone through the model, MAP@3 by sorting."""
    task, model = experiment.tasks["audio_tagging"], experiment.build_model()
    rows, total = rows_of(experiment, "audio_tagging"), 0.0
    assert len(rows) == NOT_EVEN
    for row in rows:
        clips = experiment.reader.windows(row, task.crop_samples)
        batch = task.prepare(clips, None)
        with torch.no_grad():
            logits = model.heads.heads["audio_tagging"](model.trunk(batch.inputs), batch.valid)
        scores = logits.softmax(dim=1).mean(dim=0).tolist()
        rank = sorted(range(len(scores)), key=lambda k: -scores[k]).index(row.label)
        total += 1 / (rank + 1) if rank < 3 else 0.0
    found = float(truth.metrics["audio_tagging"]["map@3"])
    assert found == pytest.approx(total / len(rows), rel=1e-6)
