"""TensorBoard and metrics.jsonl say the same; a bar on a terminal, plain lines elsewhere; pictures and sound are there."""

import errno
import io
import json
import math
import re

import pytest
import tiny
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_dist.config import load_config
from mtl_dist.data.batches import Read
from mtl_dist.evaluation import Evaluation
from mtl_dist.monitor import Monitor
from mtl_dist.round import RoundReport
from mtl_dist.run_folder import RunFolder

TIMES = {"time/data": 0.01, "time/slowest_rank": 3}


class Terminal(io.StringIO):
    def isatty(self):
        return True


def report(loss: float) -> RoundReport:
    return RoundReport(
        losses={"audio_tagging": loss, "next_step": loss / 10},
        counts={"audio_tagging": 4.0, "next_step": 100.0},
        total=1.1 * loss,
        grad_norm=0.5,
        clips=8,
        audio_seconds=2.0,
        bad=[],
        stop=False,
        read={"speech": Read(8, 4_000_000)},
        ahead=1.5,
        waited=0.01,
    )


@pytest.fixture
def make_monitor(tmp_path, corpora_root):
    config = load_config([*tiny.tiny_words(corpora_root), "--train.log_every", "1"])
    folder = RunFolder(tmp_path)
    made = []

    def make(first_round=0):
        made.append(Monitor(folder, config, first_round, rounds=6, per_epoch=3.0))
        return made[-1]

    yield make
    for monitor in made:
        monitor.close()


def train(monitor, first: int, last: int, loss: float) -> None:
    for number in range(first, last + 1):
        monitor.round(number, report(loss), {"trunk": 1e-3}, TIMES)
    monitor.close()


def events(monitor) -> EventAccumulator:
    accumulator = EventAccumulator(str(monitor.folder.tensorboard), size_guidance={"scalars": 0})
    return accumulator.Reload()


def test_tensorboard_and_metrics_jsonl_hold_the_same_numbers(make_monitor):
    monitor = make_monitor()
    train(monitor, 1, 6, loss=2.0)
    entries = [json.loads(line) for line in monitor.folder.metrics.read_text().splitlines()]
    scalars = events(monitor)
    tags = set(entries[0]) - {"kind", "round", "epoch"}
    wanted = {
        "loss/audio_tagging",
        "loss/total",
        "learning_rate/trunk",
        "grad_norm",
        "throughput/clips_per_second",
        "throughput/audio_seconds_per_second",
        "time/data_wait_share",
        *TIMES,
        "memory/process_gib",
    }
    assert wanted <= tags == set(scalars.Tags()["scalars"])
    for tag in tags:
        points = [(point.step, point.value) for point in scalars.Scalars(tag)]
        assert points == [(e["round"], pytest.approx(e[tag], rel=1e-6)) for e in entries]


def test_curves_of_a_resumed_run_do_not_overlap(make_monitor):
    train(make_monitor(), 1, 6, loss=2.0)
    resumed = make_monitor(first_round=3)
    train(resumed, 4, 6, loss=1.0)
    points = [(point.step, point.value) for point in events(resumed).Scalars("loss/audio_tagging")]
    assert points == [(1, 2.0), (2, 2.0), (3, 2.0), (4, 1.0), (5, 1.0), (6, 1.0)]


def test_a_run_that_starts_at_its_beginning_again_leaves_nothing_of_its_first_start(make_monitor):
    first = make_monitor()
    first.note(0, "missing_files", ["a.wav"], 1)
    train(first, 1, 2, loss=2.0)
    again = make_monitor()
    again.note(0, "missing_files", ["a.wav"], 1)
    train(again, 1, 1, loss=1.0)
    scalars = events(again)
    assert [point.step for point in scalars.Scalars("data/missing_files")] == [0]
    assert [(p.step, p.value) for p in scalars.Scalars("loss/audio_tagging")] == [(1, 1.0)]


def test_between_two_entries_rounds_are_counted_but_not_written(make_monitor):
    monitor = make_monitor()
    monitor.round(1, report(2.0), {}, None)
    assert monitor.folder.metrics.read_text() == ""
    monitor.round(2, report(2.0), {}, TIMES)
    (entry,) = map(json.loads, monitor.folder.metrics.read_text().splitlines())
    seconds = 8 * 2 / entry["throughput/clips_per_second"]
    assert entry["time/seconds_per_round"] == pytest.approx(seconds / 2)
    assert entry["time/data_wait_share"] == pytest.approx(0.01 * 2 / seconds)


def test_a_terminal_gets_a_bar_per_epoch_with_loss_and_validation(make_monitor, monkeypatch):
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monitor = make_monitor()
    monitor.validated = {"map@3": 0.625}
    train(monitor, 1, 6, loss=2.0)
    shown = screen.getvalue()
    assert "epoch 1:" in shown
    assert "epoch 2: 100%" in shown
    assert "map@3=0.625, loss=2.2" in shown


def test_elsewhere_progress_is_plain_lines(make_monitor, monkeypatch):
    pipe = io.StringIO()
    monkeypatch.setattr("sys.stderr", pipe)
    train(make_monitor(), 1, 6, loss=2.0)
    first, *_, last, flow = pipe.getvalue().splitlines()
    assert first.startswith(
        "epoch 1, round 1/6: loss 2.2, audio_tagging 2, next_step 0.2, waiting for data "
    )
    assert last.startswith("epoch 2, round 6/6: ")
    assert re.fullmatch(
        r"epoch 2: waiting for data \d+% of [\d.]+ s; 1.5 rounds ready ahead; speech [\d.e+]+ clips/s, [\d.e+]+ MB/s",
        flow,
    )
    assert "\r" not in pipe.getvalue()


def test_validation_examples_and_hyper_parameters_reach_tensorboard(make_monitor):
    monitor = make_monitor()
    result = Evaluation(
        metrics={
            "audio_tagging": {
                "map@3": torch.tensor(0.75, dtype=torch.float64),
                "confusion": torch.eye(2, dtype=torch.float64) / 2,
            }
        },
        clips={"audio_tagging": 4},
        bad=[],
    )
    monitor.validation(3, result, {"audio_tagging": ["Bell", "Flute"]}, "map@3")
    waves = {"1 noisy": torch.randn(800), "2 clean": torch.zeros(800)}
    monitor.example(3, "noise_reduction", 0, waves, 16_000)
    monitor.final({"test": {"audio_tagging": {"map@3": 0.75}}})
    monitor.close()
    tags = events(monitor).Tags()
    assert "validation/audio_tagging/map@3" in tags["scalars"]
    assert set(tags["images"]) == {"confusion/audio_tagging", "noise_reduction/clip 0"}
    assert set(tags["audio"]) == {f"noise_reduction/clip 0/{what}" for what in waves}
    assert any("hparams" in tag for tag in tags.get("tensors", []) + list(monitor_files(monitor)))


def monitor_files(monitor):
    """Names of the plug-ins that the event files mention."""
    for path in monitor.folder.tensorboard.rglob("events.*"):
        if b"_hparams_" in path.read_bytes():
            yield "hparams"


def test_a_number_that_is_not_finite_is_null_in_metrics_jsonl(make_monitor):
    monitor = make_monitor()
    train(monitor, 1, 1, math.nan)
    (entry,) = map(json.loads, monitor.folder.metrics.read_text().splitlines())
    assert entry["loss/total"] is None
    assert entry["grad_norm"] == 0.5


def test_a_full_disk_is_reported_and_training_goes_on(make_monitor, monkeypatch, caplog):
    monitor = make_monitor()
    monitor.lines.close()
    monitor.lines = open("/dev/full", "a", buffering=1)  # every write: no space left on device

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    for name in ("add_scalar", "add_text", "add_audio", "add_figure", "add_hparams"):
        monkeypatch.setattr(monitor.writer, name, full)
    monitor.round(1, report(1.0), {"trunk": 1e-3}, TIMES)
    monitor.trouble(1, "bad_files", ["a.wav: empty"], 1)
    monitor.example(1, "upsampling", 0, {"1 input": torch.zeros(4000)}, 16_000)
    monitor.final({"test": {"audio_tagging": {"map@3": 0.5}}})
    monitor.close()
    for what in ("metrics.jsonl", "the round's numbers", "the example", "the hyper-parameters"):
        assert f"{what}" in caplog.text
    assert caplog.text.count("No space left on device") == caplog.text.count("training goes on") > 5
