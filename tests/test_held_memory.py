"""What an engine's ranks hold and send: half of one process where it is sharded, and what `mtl-dist plan` says."""

import json

import pytest
import tiny
import worlds
from test_engines import FILES, marked

from mtl_dist import footprint
from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment

MICRO_STEPS = 16
WIDE = ["--model.channels", "192"]
"""So wide that ZeRO-3 puts the layers in shards: of the tests' own 4 channels it would keep everything whole."""
PLANNED = {name: name.lower().replace("-", "") for name in FILES}


@pytest.fixture(scope="module")
def size(corpora_root):
    """The model's sizes, by the plan's own measure."""
    model = build_experiment(load_config(tiny.tiny_words(corpora_root, *WIDE))).build_model()
    return footprint.size_of(model)


def launch(name: str, corpora, out, *words: str) -> list[dict]:
    if "ZeRO" in name:
        pytest.importorskip("deepspeed")
    script = ["tests/workers/memory_worker.py", str(corpora), str(out), *words]
    done = worlds.launch(FILES[name], *script)
    assert done.returncode == 0, done.stderr[-3000:]
    results = [json.loads((out / f"memory_{rank}.json").read_text()) for rank in (0, 1)]
    assert [result["engine"] for result in results] == [name, name]
    return results


@pytest.fixture(scope="module", params=[marked(name) for name in FILES])
def ran(request, corpora_root, tmp_path_factory):
    """Name and outcomes of an engine on two processes."""
    out = tmp_path_factory.mktemp("memory")
    return request.param, launch(request.param, corpora_root, out, *WIDE)


def test_the_fullest_of_two_ranks_holds_half_of_what_is_sharded_and_all_of_the_rest(ran, size):
    name, results = ran
    adam = 12 if "ZeRO" in name else 8  # two moments and, under DeepSpeed, fp32 parameters
    for what, whole in (("parameters", 4 * size.elements), ("optimizer", adam * size.elements)):
        held = [result["held"][what] for result in results]
        sharded = what in footprint.ENGINES[PLANNED[name]].shards
        low, high = (0.5, 0.55) if sharded else (1.0, 1.001)
        assert low <= max(held) / whole <= high, what
        assert sum(held) >= whole, "nothing is lost between the ranks"


def test_the_plan_says_what_is_held_within_5_percent(ran, size):
    name, results = ran
    planned = footprint.state_bytes(size, PLANNED[name], "no", 2, MICRO_STEPS)
    for result in results:
        for what in ("parameters", "optimizer"):
            assert planned[what] == pytest.approx(result["held"][what], rel=0.05), what


def test_the_plan_says_what_is_sent_within_5_percent(ran, size):
    name, results = ran
    planned = footprint.wire_bytes(size, PLANNED[name], "no", 2, MICRO_STEPS)
    for result in results:
        assert {name: result["sent"][name] for name in planned} == pytest.approx(planned, rel=0.05)
        assert sum(result["sent"].values()) == pytest.approx(sum(planned.values()), rel=0.05)


@pytest.mark.deepspeed
def test_zero3_keeps_small_parameters_whole_and_bf16_halves_what_is_sent(corpora_root, tmp_path):
    words = ["--model.channels", "64", "--train.mixed_precision", "bf16"]
    results = launch("ZeRO-3", corpora_root, tmp_path, *words)
    model = build_experiment(load_config(tiny.tiny_words(corpora_root, *words))).build_model()
    size = footprint.size_of(model)
    assert size.persistent == size.elements
    planned = footprint.state_bytes(size, "zero3", "bf16", 2, MICRO_STEPS)
    sent = footprint.wire_bytes(size, "zero3", "bf16", 2, MICRO_STEPS)
    for result in results:
        assert result["held"]["parameters"] == pytest.approx(1.5 * 4 * size.elements, rel=0.01)
        assert result["held"]["parameters"] == pytest.approx(planned["parameters"], rel=0.05)
        # reduced shards in fp32, and a bucket in bf16 that is no larger than the model
        assert result["held"]["gradients"] == pytest.approx((2 + 2) * size.elements, rel=0.01)
        assert sum(result["sent"].values()) == pytest.approx(sum(sent.values()), rel=0.05)
