"""Evaluation on several ranks: every clip exactly once, and the numbers of a single process."""

import json
import types

import pytest
import tiny
import torch
import worlds
from accelerate import Accelerator

from mtl_dist import evaluation
from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment

NOT_EVEN = tiny.TEST_CLIPS  # 79: no number of ranks divides it


@pytest.fixture(scope="module")
def experiment(corpora_root):
    words = ["--evaluation.max_clips", "null"]
    return build_experiment(load_config(tiny.tiny_words(corpora_root, *words)))


@pytest.fixture(scope="module")
def truth(experiment):
    """The evaluation of one process."""
    return evaluation.evaluate(Accelerator(cpu=True), experiment.build_model(), experiment, "test")


def assert_same_metrics(found: dict, truth) -> None:
    assert set(found) == set(truth.metrics)
    for task, metrics in truth.metrics.items():
        assert set(found[task]) == set(metrics)
        for name, wanted in metrics.items():
            ours = torch.as_tensor(found[task][name], dtype=torch.float64)
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-12)


def every_clip_once(experiment, heard: dict) -> None:
    for task in experiment.tasks:
        ids = experiment.evaluation_table(task, "test")["id"]
        assert sorted(heard[task]) == sorted(ids)


def test_one_process_hears_every_clip_once(experiment):
    with pytest.MonkeyPatch.context() as patch:
        heard = tiny.listen(experiment, patch.setattr)
        accelerator = Accelerator(cpu=True)
        result = evaluation.evaluate(accelerator, experiment.build_model(), experiment, "test")
    every_clip_once(experiment, heard)
    assert result.clips["audio_tagging"] == NOT_EVEN
    assert result.bad == []


def test_79_clips_on_two_processes_are_heard_once_and_give_the_single_process_numbers(
    experiment, truth, corpora_root, tmp_path
):
    script = "tests/workers/evaluation_worker.py"
    done = worlds.launch("two_cpu_processes", script, str(corpora_root), str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"rank_{rank}.json").read_text()) for rank in (0, 1)]
    every_clip_once(
        experiment, {t: ranks[0]["heard"][t] + ranks[1]["heard"][t] for t in experiment.tasks}
    )
    assert {len(rank["heard"]["audio_tagging"]) for rank in ranks} == {39, 40}
    for rank in ranks:
        assert rank["clips"] == truth.clips
        assert_same_metrics(rank["metrics"], truth)


def test_several_crops_of_a_clip_have_draws_of_their_own_and_are_averaged(corpora_root, truth):
    words = ["--evaluation.max_clips", "null", "--evaluation.crops", "3"]
    experiment = build_experiment(load_config(tiny.tiny_words(corpora_root, *words)))
    task, table = (
        experiment.tasks["noise_reduction"],
        experiment.evaluation_table("noise_reduction", "test"),
    )
    arguments = (experiment, task, table, list(range(len(table))), [])
    scores = []
    for row, (alone,) in zip(
        evaluation.evaluation_batches(*arguments, crops=3),
        evaluation.evaluation_batches(*arguments),
        strict=True,
    ):
        assert torch.equal(row[0].inputs, alone.inputs)
        assert len({tuple(batch.inputs[0].tolist()) for batch in row}) == 3
        for batch in row:
            clean, noise = batch.targets[0].double(), (batch.inputs - batch.targets)[0].double()
            scores.append(float(10 * torch.log10(clean.square().sum() / noise.square().sum())))
    result = evaluation.evaluate(
        Accelerator(cpu=True), experiment.build_model(), experiment, "test"
    )
    found = float(result.metrics["noise_reduction"]["si_sdr_noisy"])
    assert found == pytest.approx(sum(scores) / len(scores), abs=0.5)  # SI-SDR lets the scale go
    assert result.clips == truth.clips
    assert_same_metrics(
        {"audio_tagging": result.metrics["audio_tagging"]}, _only(truth, "audio_tagging")
    )


@pytest.mark.parametrize("size", [3, 5])
def test_any_number_of_ranks_gives_the_single_process_numbers(experiment, truth, monkeypatch, size):
    """The ranks one after another: what each would send is kept, and the last gets it all."""
    sent: list[list] = []

    def collect(accelerator, items):
        sent.append(items)
        return items

    monkeypatch.setattr(evaluation, "collect", collect)
    model, autocast = experiment.build_model(), Accelerator(cpu=True).autocast
    for rank in range(size):
        accelerator = types.SimpleNamespace(
            process_index=rank,
            num_processes=size,
            device="cpu",
            autocast=autocast,
            is_main_process=False,
        )
        evaluation.evaluate(accelerator, model, experiment, "test")
    for place, task in enumerate(experiment.tasks):
        total = evaluation.Sums()
        parts = sent[place :: len(experiment.tasks)]
        for ((sums, _, _),) in parts:
            total.add(sums)
        assert sum(clips for ((_, clips, _),) in parts) == truth.clips[task]
        assert_same_metrics({task: total.means()}, _only(truth, task))


def _only(truth, task: str):
    return types.SimpleNamespace(metrics={task: truth.metrics[task]})


def test_evaluation_says_the_same_twice_and_leaves_the_model_in_training(experiment, truth):
    model = experiment.build_model()
    again = evaluation.evaluate(Accelerator(cpu=True), model, experiment, "test")
    assert again.numbers() == truth.numbers()
    assert model.training


def test_a_limit_takes_the_same_clips_every_time(experiment):
    table = experiment.evaluation_table("audio_tagging", "test")
    rows = evaluation.fixed_rows(table, None, 0)
    assert sorted(rows) == list(range(NOT_EVEN))
    assert evaluation.fixed_rows(table, 10, 0) == rows[:10]
    assert evaluation.fixed_rows(table, 10, 1) != rows[:10]


def test_the_mean_is_that_of_the_clips_one_by_one(experiment, truth):
    """Brute force: every test clip alone through the model, MAP@3 by sorting."""
    task, model = experiment.tasks["audio_tagging"], experiment.build_model()
    table = experiment.evaluation_table("audio_tagging", "test")
    total = 0.0
    for row in table:
        clips = experiment.reader.windows(row, task.crop_samples)
        batch = task.prepare(clips, None)
        with torch.no_grad():
            logits = model.heads.heads["audio_tagging"](model.trunk(batch.inputs), batch.valid)
        scores = logits.softmax(dim=1).mean(dim=0).tolist()
        rank = sorted(range(len(scores)), key=lambda k: -scores[k]).index(row["label"])
        total += 1 / (rank + 1) if rank < 3 else 0.0
    found = float(truth.metrics["audio_tagging"]["map@3"])
    assert found == pytest.approx(total / len(table), rel=1e-6)
