"""The command of `make demo`: all four tasks learn, the validation curve rises, results and pictures are there.

Five of its nine epochs, which is enough to see it.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """(run folder, what was printed) of the demo."""
    (line,) = re.findall(
        r"^\t\$\(BIN\)/(accelerate launch .*)$", (ROOT / "Makefile").read_text(), re.M
    )
    folder = tmp_path_factory.mktemp("demo") / "run"
    words = [
        str(Path(sys.executable).with_name("accelerate")),
        *line.split()[1:],
        "--train.epochs",
        "5",
        "--run.dir",
        str(folder),
    ]
    alone = {"OMP_NUM_THREADS": "1"}  # other tests run on the other cores
    environment = os.environ | alone
    done = subprocess.run(
        words, cwd=ROOT, env=environment, timeout=840, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return folder, done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo_learns_all_four_tasks_and_says_where_to_look(demo):
    folder, printed = demo
    results = json.loads((folder / "results.json").read_text())
    for split in ("validation", "test"):
        scores = results[split]
        assert scores["audio_tagging"]["map@3"] > 0.6, "chance is 0.23 for 8 classes"
        assert scores["audio_tagging"]["accuracy"] > 0.4
        assert scores["next_step"]["prediction_gain"] > 1
        assert scores["noise_reduction"]["si_sdr_noisy"] > 9
        assert {"loss", "si_sdr_denoised", "si_sdr_improvement"} <= set(scores["noise_reduction"])
        assert {"loss", "lsd_input", "lsd_output"} <= set(scores["upsampling"])
    assert re.search(rf"tensorboard --logdir {re.escape(str(folder.parent))}$", printed, re.M)
    assert re.search(r"^audio_tagging +map@3 +[01][.\d]* +[01][.\d]*", printed, re.M), (
        "the final table"
    )


@pytest.mark.slow
def test_demos_sound_and_pictures_reach_tensorboard_at_every_validation(demo):
    events = EventAccumulator(str(demo[0] / "tensorboard"), size_guidance={"images": 0, "audio": 0})
    tags = events.Reload().Tags()
    shown = {
        "noise_reduction": ("1 noisy", "2 denoised", "3 clean"),
        "upsampling": ("1 4 kHz", "2 upsampled", "3 original"),
    }
    entries = [json.loads(line) for line in (demo[0] / "metrics.jsonl").read_text().splitlines()]
    rounds = [e["round"] for e in entries if e["kind"] == "validation"]
    for task, waves in shown.items():
        assert [e.step for e in events.Images(f"{task}/clip 0")] == rounds
        for what in waves:
            assert f"{task}/clip 0/{what}" in tags["audio"]
    assert [e.step for e in events.Images("confusion/audio_tagging")] == rounds


@pytest.mark.slow
def test_demos_validation_curve_rises_and_its_losses_fall(demo):
    entries = [json.loads(line) for line in (demo[0] / "metrics.jsonl").read_text().splitlines()]
    curve = [e["validation/audio_tagging/map@3"] for e in entries if e["kind"] == "validation"]
    assert len(curve) == 5
    assert max(curve[-3:]) > curve[0] + 0.1
    rounds = [e for e in entries if e["kind"] == "round"]
    for task in ("audio_tagging", "next_step", "noise_reduction", "upsampling"):
        losses = [entry[f"loss/{task}"] for entry in rounds]
        assert sum(losses[-5:]) < 0.8 * sum(losses[:5]), task
