"""`mtl-dist plan` against independent truths: a real model and Adam, a written checkpoint, real activations, plan_rounds."""

import contextlib
import json
import re

import pyarrow.parquet as pq
import pytest
import tiny
import torch
from test_checkpoint import engine_after

from mtl_dist import activations, checkpoint, cli, footprint
from mtl_dist.checkpoint import TrainState
from mtl_dist.config import ConfigError, load_config
from mtl_dist.experiment import plan_rounds
from mtl_dist.footprint import ENGINES, ModelSize

NOTHING = ModelSize(shapes=[torch.Size([30, 10]), torch.Size([1, 7])], largest_unit=20)


def plan(capsys, *words: str) -> tuple[int, dict]:
    """Return the exit code of `mtl-dist plan --json` and what it printed."""
    try:
        cli.main(["plan", "--json", *words])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, json.loads(capsys.readouterr().out)


def test_parameters_gradients_and_adam_are_those_of_a_model_that_is_there(tiny_experiment):
    engine = engine_after(tiny_experiment, steps=1)
    parameters = list(engine.bare.parameters())
    state = footprint.state_bytes(footprint.size_of(engine.bare), "ddp", "no", 1, 4)
    assert state["parameters"] == state["gradients"] == sum(p.nbytes for p in parameters)
    states = engine.inner_optimizer.state.values()
    assert state["optimizer"] == sum(s[k].nbytes for s in states for k in ("exp_avg", "exp_avg_sq"))


def test_a_checkpoint_takes_what_the_plan_says(tiny_experiment, tmp_path):
    engine = engine_after(tiny_experiment, steps=1)
    path = checkpoint.save(tmp_path, *engine.full_state(), TrainState(round=1), "", {})
    written = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    planned = footprint.checkpoint_bytes(footprint.size_of(engine.bare))
    assert planned == pytest.approx(written, rel=0.05)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_followed_without_numbers_are_those_of_real_tensors(tiny_experiment, precision):
    real, tasks = tiny_experiment.build_model(), tiny_experiment.tasks
    meter = activations.Meter(tiny_experiment.build_model, tasks, precision)
    batches = {name: footprint.batch_of(task, 5) for name, task in tasks.items()}
    alone = [activations.peak_bytes(real, {n: b}, precision) for n, b in batches.items()]
    assert [meter.of((name,), 5) for name in tasks] == pytest.approx(alone, rel=0.02)
    assert meter.micro_step("round_robin", 5) == pytest.approx(max(alone), rel=0.02)
    together = activations.peak_bytes(real, batches, precision)
    assert meter.micro_step("joint", 5) == pytest.approx(together, rel=0.02)
    assert max(alone) < 0.9 * together <= 0.9 * 1.1 * sum(alone)


def test_the_peak_of_one_product_is_counted_by_hand():
    class Product(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1000))

        def forward(self, batches):
            return {"x": ((batches["x"] * self.weight).exp().sum(), None)}

    # product, exp's result and the sum live until backward; then ones are expanded, exp's and the product's gradients follow
    peak = activations.peak_bytes(Product(), {"x": torch.ones(1000)}, "no")
    vector = 4 * 1000
    assert 2 * vector < peak < 4 * vector + 100
    assert activations.peak_bytes(Product(), {"x": torch.ones(7, 1000)}, "no") > 6 * peak


class Sliced(torch.autograd.Function):
    """A sum of exp(x * w) whose forward makes the gradients itself, slice by slice."""

    @staticmethod
    def forward(ctx, x, weight, slices):
        total, gradient = x.new_zeros(()), torch.zeros_like(weight)
        for part in x.chunk(slices):
            with torch.enable_grad():
                leaf = weight.detach().requires_grad_()
                value = (part * leaf).exp().sum()
            total, gradient = total + value.detach(), gradient + torch.autograd.grad(value, leaf)[0]
        ctx.save_for_backward(gradient)
        return total

    @staticmethod
    def backward(ctx, up):
        return None, up * ctx.saved_tensors[0], None


@pytest.mark.parametrize("follow", [contextlib.nullcontext, activations.pretended])
def test_gradients_that_a_forward_makes_by_itself_are_followed(follow):
    class Model(torch.nn.Module):
        def __init__(self, slices):
            super().__init__()
            self.weight, self.slices = torch.nn.Parameter(torch.ones(1000)), slices

        def forward(self, batches):
            return {"x": (Sliced.apply(batches["x"], self.weight, self.slices), None)}

    with follow():
        peaks = [
            activations.peak_bytes(Model(slices), {"x": torch.ones(64, 1000)}, "no")
            for slices in (1, 2, 64)
        ]
    row = 4 * 1000  # x, of which the slices are views, and of a slice exp and its gradient
    for slices, peak in zip((1, 2, 64), peaks, strict=True):
        assert peak == pytest.approx((64 + 2 * 64 / slices) * row, abs=6 * row)


@pytest.mark.parametrize("engine", ENGINES)
def test_what_an_engine_shards_is_divided_and_the_rest_is_not(engine):
    """Parameters of 10^5 elements or fewer are left out: ZeRO-3 keeps them whole."""
    large = ModelSize(shapes=[torch.Size([1000, 301]), torch.Size([407, 1000])], largest_unit=1000)
    one, four = (footprint.state_bytes(large, engine, "no", ranks, 4) for ranks in (1, 4))
    for what in ("parameters", "optimizer"):
        if what in ENGINES[engine].shards:
            assert one[what] / 4 <= four[what] <= 1.01 * one[what] / 4  # odd shapes do not divide
        else:
            assert four[what] == one[what]
    assert four["gradients"] >= 4 * large.elements  # whole until they are reduced


def test_fsdp2_holds_the_largest_chunk_of_every_parameter():
    tensors = [torch.zeros(shape) for shape in NOTHING.shapes]
    largest = sum(torch.chunk(tensor, 4)[0].numel() for tensor in tensors)
    assert footprint.shard_elements(NOTHING, "fsdp2", 4) == largest


def test_one_micro_step_lets_fsdp2_keep_gradients_in_shards():
    one, two = (footprint.state_bytes(NOTHING, "fsdp2", "no", 4, n)["gradients"] for n in (1, 2))
    assert one == 4 * footprint.shard_elements(NOTHING, "fsdp2", 4)
    assert two == 4 * NOTHING.elements


def test_an_evaluation_counts_where_it_needs_more_than_training(capsys):
    """Shards of 1/64 and small activations are less than a copy of the whole model."""
    words = "--config paper --clips 640 --nodes 8 --gpus-per-node 8 --precision no".split()
    words += "--engine fsdp2 --model.channels 512 --model.blocks 1 --train.schedule joint".split()
    words += "--train.tasks [audio_tagging] --train.global_batch 64 --data.crop_seconds".split()
    _, facts = plan(capsys, *words, "0.001")
    assert facts["evaluation_bytes"] == 4 * facts["parameters"]
    kept = facts["memory"]["parameters"] + facts["memory"]["optimizer"]
    training = sum(facts["memory"].values())
    assert facts["memory_bytes"] == max(training, kept + facts["evaluation_bytes"])
    assert facts["memory_bytes"] > training


def test_the_arithmetic_is_that_of_the_run(corpora_root, tiny_experiment, capsys):
    words = tiny.tiny_words(corpora_root, "--train.micro_batch", "1")
    code, facts = plan(capsys, "--nodes", "1", "--gpus-per-node", "2", *words)
    clips = tiny_experiment.clips("audio_tagging")
    truth = plan_rounds(load_config(words), clips, 2)
    assert code == 0
    assert (facts["micro_batch"], facts["accumulation"]) == (truth.micro_batch, truth.accumulation)
    assert (facts["rounds"], facts["rounds_per_epoch"]) == (truth.rounds, truth.rounds_per_epoch)
    assert facts["micro_steps"] == 4 * truth.accumulation


def test_what_lanes_hold_is_a_row_group_each(corpora_root, tmp_path, capsys):
    """By the sizes of the first row group of a prepared corpus; rows that are listed hold no audio."""
    shards = tmp_path / "shards"
    cli.main(["prepare", "librispeech", str(corpora_root / "LibriSpeech"), str(shards)])
    capsys.readouterr()
    first = min(shards.glob("*train*.parquet"))
    truth = sum(
        len(a["bytes"]) for a in pq.ParquetFile(first).read_row_group(0)["audio"].to_pylist()
    )
    words = tiny.tiny_words(
        corpora_root, "--train.tasks", "[next_step]", "--train.main_task", "next_step"
    )
    words += [
        "--tasks.next_step.sources",
        "[librispeech]",
        "--corpora.librispeech.root",
        str(shards),
    ]
    for lanes, ranks in (("null", 1), ("2", 1), ("4", 2)):
        world = ["--nodes", "1", "--gpus-per-node", str(ranks)]
        facts = plan(capsys, *world, *words, "--data.lanes", lanes)[1]
        assert facts["lanes"] == (4 if lanes == "null" else int(lanes))
        assert facts["lane_bytes"] == facts["lanes"] * truth // ranks
    listed = plan(capsys, *tiny.tiny_words(corpora_root))[1]
    assert listed["lane_bytes"] == 0


def test_the_longest_patience_is_shown(corpora_root, capsys):
    words = tiny.tiny_words(corpora_root, "--run.timeout_seconds", "90")
    for more, seconds in (([], 45), (["--remote.patience_seconds", "20"], 20)):
        cli.main(["plan", *words, *more])
        assert re.search(rf"longest patience +{seconds} s", capsys.readouterr().out)


def test_ranks_that_do_not_divide_are_reported_with_the_nearest_nodes_that_do(capsys):
    words = ["--config", "paper", "--clips", "8526", "--gpus-per-node", "8"]
    code, facts = plan(capsys, *words, "--nodes", "16", "--model.blocks", "1")
    with pytest.raises(ConfigError) as error:
        plan_rounds(load_config(["--config", "paper"]), 8526, 128)
    assert code == 1
    assert facts["problems"] == [f"{error.value}; or 6 nodes of 8 processes"]
    code, facts = plan(capsys, *words, "--nodes", "4", "--model.blocks", "1")
    assert facts["problems"][0].endswith("or 3 or 6 nodes of 8 processes")


def test_memory_that_does_not_do_names_the_micro_batch_that_does(corpora_root, capsys):
    words = ["--precision", "no", *tiny.tiny_words(corpora_root)]
    _, facts = plan(capsys, *words)
    half = facts["memory_bytes"] - 2 * max(facts["activation_bytes_per_clip"].values())
    code, smaller = plan(capsys, *words, "--memory-gib", str(half * 1.05 / 0.9 / 2**30))
    assert code == 1
    assert "--train.micro_batch 2 with accumulation 2" in smaller["problems"][0]
    taken = ["--memory-gib", str(half * 1.05 / 0.9 / 2**30), "--train.micro_batch", "2"]
    assert plan(capsys, *words, *taken)[0] == 0


def test_a_model_too_large_for_ddp_is_sent_to_an_engine_that_shards(capsys):
    words = (
        "--config paper --clips 100 --gpus-per-node 8 --precision no --train.global_batch 8".split()
    )
    words += "--data.crop_seconds 0.05 --model.channels 512 --model.blocks 2".split()
    facts = plan(capsys, *words)[1]
    memory = str(0.5 * facts["memory_bytes"] / 0.9 / 2**30)
    code, facts = plan(capsys, *words, "--memory-gib", memory)
    assert code == 1
    assert "use --engine fsdp2" in facts["problems"][0]
    assert plan(capsys, *words, "--memory-gib", memory, "--engine", "fsdp2")[0] == 0


def test_missing_corpora_are_an_error_that_says_how_to_do_without(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", "--config", "paper"])
    assert "corpora.fsdkaggle2018.root: not set" in stop.value.code
    assert "--clips N" in stop.value.code


def test_the_table_says_what_the_numbers_say(corpora_root, capsys):
    cli.main(["plan", "--cores-per-node", "1", *tiny.tiny_words(corpora_root)])
    printed = capsys.readouterr().out
    assert "global_batch 4 = 1 ranks x 4 x 1" in printed
    assert "does not do" not in printed
    more = ["--cores-per-node", "2", "--data.workers", "2"]
    with pytest.raises(SystemExit) as stop:
        cli.main(["plan", *tiny.tiny_words(corpora_root), *more])
    assert stop.value.code == 1
    assert "use --data.workers 1" in capsys.readouterr().out
