"""Runs on whole clips: what is scored, planned, resumed, and skipped."""

import json

import big_batch
import hearing
import numpy as np
import pytest
import soundfile
import tiny
import torch
import whole
import worlds
from entry import enter, entries
from safetensors.torch import load_file
from test_bad_audio import BAD_FILES, spoil

from mtl_dist import cli, evaluation, footprint
from mtl_dist.runtime import World


@pytest.fixture(scope="module")
def root(corpora_root, tmp_path_factory):
    return whole.write_uneven(corpora_root, tmp_path_factory.mktemp("uneven"))


@pytest.fixture(scope="module")
def experiment(root):
    return whole.build(root)


def test_tagging_is_scored_on_whole_clips_and_on_the_single_crops_of_runs_with_crops(
    experiment, root
):
    crops = whole.build(root, "--tasks.audio_tagging.crop_seconds", "data")
    task = experiment.tasks["audio_tagging"]
    arguments = "audio_tagging", "test", None, World()
    rows = list(evaluation.evaluation_rows(experiment, *arguments))
    ours, theirs = (
        list(evaluation.evaluation_batches(e, e.tasks["audio_tagging"], rows, []))
        for e in (experiment, crops)
    )
    accelerator, model = big_batch.cpu_accelerator(), experiment.build_model().eval()
    assert crops.tasks["audio_tagging"].crop_samples == 1600
    seen = set()
    for row, (_, (batch,)), (_, (cropped,)) in zip(rows, ours, theirs, strict=True):
        clip, single = batch.valid.tolist()[:-1], int(batch.valid[-1])
        seen.add(len(cropped.valid))
        everything = experiment.reader.windows(row, task.crop_samples)
        assert clip == [len(window.wave) for window in everything]
        assert single == cropped.valid[-1] <= 1600
        assert torch.equal(batch.inputs[-1, :single], cropped.inputs[-1, :single])
        with torch.no_grad():
            outputs = evaluation.forward(accelerator, model, "audio_tagging", batch, 16)
            hidden = model.trunk(torch.from_numpy(everything[0].wave[None]))
            logits = model.heads.heads["audio_tagging"].layers(hidden.mean(dim=2))
        torch.testing.assert_close(outputs[:1], logits, rtol=1e-5, atol=1e-6)
    assert max(seen) > 2  # windows of a clip, where it is cut


def test_self_supervised_tasks_are_scored_on_crops_of_the_usual_length(experiment):
    task = experiment.tasks["upsampling"]
    rows = evaluation.evaluation_rows(experiment, "upsampling", "test", None, World())
    batches = list(evaluation.evaluation_batches(experiment, task, rows, []))
    assert len(batches) > 2
    assert all(batch.valid.tolist() == [1600] for _, (batch,) in batches)


def test_the_plan_is_that_of_the_longest_clips(root, capsys, experiment):
    share = sum(
        4 * (2 if whole.TAIL[name] or name == "next_step" else 1) * (1920 + whole.TAIL[name]) + 8
        for name in whole.TAIL
    )
    assert footprint.round_bytes(experiment.tasks, 1) == share + 8  # a label, too
    cli.main(["plan", *whole.words(root), "--gpus-per-node", "2"])
    assert "longest clip" in (shown := capsys.readouterr().out)
    assert "0.12 s" in shown


def run(root, folder, *more: str, ranks: int = 1) -> dict[int, dict]:
    """Train four rounds; return what metrics.jsonl says of each."""
    options = ["--run.dir", str(folder), "--train.rounds", "4", "--train.validate_every", "2"]
    every = whole.words(root, *options, "--train.micro_batch", "4", *more)
    if ranks == 1:
        ended = enter(*every)
        assert ended.code == 0, ended.text
    else:
        done = worlds.launch("two_cpu_processes", "mtl_dist/train.py", *every)
        assert done.returncode == 0, done.stderr[-3000:]
    keep = ("loss/", "count/", "total", "grad_norm", "clips", "audio_seconds")
    return {
        e["round"]: {k: v for k, v in e.items() if k.startswith(keep)}
        for e in entries(folder, "round")
    }


def test_a_resumed_run_equals_one_without_a_break_one_in_slices_and_one_of_two_processes(
    root, tmp_path
):
    wanted = run(root, tmp_path / "whole")
    assert list(wanted) == [1, 2, 3, 4]
    run(root, tmp_path / "parts", "--train.stop_after_rounds", "2")
    assert run(root, tmp_path / "parts", "--run.resume", "auto") == wanted
    ours, theirs = (
        load_file(tmp_path / name / "checkpoints" / "round_00000004" / "model.safetensors")
        for name in ("parts", "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    parts = (
        ["--model.kernel", "eager", "--memory.recompute", "block"],
        ["--memory.slice_seconds", "0.02"],
    )
    run(root, tmp_path / "changed", "--train.stop_after_rounds", "2", *parts[0])
    changed = run(root, tmp_path / "changed", "--run.resume", "auto", *parts[1])
    for number, numbers in wanted.items():
        assert changed[number] == pytest.approx(numbers, rel=1e-4)
    found = run(root, tmp_path / "two", "--data.workers", "2", ranks=2)
    for number, numbers in wanted.items():
        assert found[number] == pytest.approx(numbers, rel=1e-4)
    results = [
        json.loads((tmp_path / name / "results.json").read_text())["test"]["audio_tagging"]
        for name in ("two", "whole")
    ]
    assert results[0] == pytest.approx(results[1], rel=1e-4)


def test_bad_files_are_skipped_counted_and_named(corpora_root, tmp_path):
    root = whole.write_uneven(corpora_root, tmp_path)
    rows = hearing.training_rows(whole.build(root), "audio_tagging")
    paths = [row.audio["path"] for _, row in rows][-len(BAD_FILES) :]
    rng = np.random.default_rng(0)
    for path, how in zip(paths, BAD_FILES, strict=True):
        soundfile.write(path, rng.uniform(-0.5, 0.5, 4000), 16_000, "PCM_16")
        spoil(tiny.Path(path), how)
    ended = enter(
        *whole.words(root, "--run.dir", str(tmp_path / "run"), "--train.tasks", "[audio_tagging]"),
        *("--train.rounds", "2"),
    )
    assert ended.code == 0, ended.text
    assert "audio_tagging (whole clips of up to 0.12 s)" in ended.text
    named = {
        m.split(": ")[0] for e in entries(tmp_path / "run", "bad_files") for m in e["messages"]
    }
    assert named >= set(paths)
    assert all(np.isfinite(e["loss/total"]) for e in entries(tmp_path / "run", "round"))
