"""Checkpoints that one engine and world wrote and another resumes, for test_engines.py and benchmarks/checkpoint_table.py.

SHARED/written/WHO/        a run of tiny.yaml that stopped after round 3 of 6
SHARED/resumed/WHO__BY/    the same run, gone on with by another
"""

import json
import shutil
from pathlib import Path

import tiny
from accelerate import Accelerator

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.micro_batch import plan_together
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import StopRequest
from mtl_dist.trainer import Trainer

STOPPED, ROUNDS = 3, 6
WORDS = ["--train.rounds", str(ROUNDS), "--train.validate_every", str(ROUNDS)]


def train(accelerator: Accelerator, corpora: Path, run: Path, *words: str) -> str:
    """Train a run folder in this world; return the engine's name."""
    words = tiny.tiny_words(corpora, *WORDS, "--run.dir", str(run), "--run.resume", "auto", *words)
    experiment, folder = build_experiment(load_config(words)), RunFolder(run)
    folder.checkpoints.mkdir(parents=True, exist_ok=True)
    plan = plan_together(accelerator, experiment, Phases())
    trainer = Trainer(experiment, plan, accelerator, folder, StopRequest())
    trainer.train()
    trainer.close()
    accelerator.wait_for_everyone()
    return trainer.engine.name


def write(accelerator: Accelerator, corpora: Path, shared: Path, who: str) -> None:
    """Stop a run after three rounds."""
    run = shared / "written" / who
    train(accelerator, corpora, run, "--train.stop_after_rounds", str(STOPPED))


def resume_all(
    accelerator: Accelerator, corpora: Path, shared: Path, by: str, newest: int | None = None
) -> None:
    """Go on with every run that was written so far, or with the `newest` of them."""
    everything = in_order(shared)
    for written in everything[-newest:] if newest else everything:
        run = shared / "resumed" / f"{written.name}__{by}"
        if accelerator.is_main_process:
            shutil.copytree(written, run)
        accelerator.wait_for_everyone()
        train(accelerator, corpora, run)


def in_order(shared: Path) -> list[Path]:
    """Return the stopped runs, the oldest first."""
    return sorted((shared / "written").iterdir(), key=lambda path: path.stat().st_mtime)


def losses(run: Path) -> list[float]:
    """Return every task's loss of every round after the stop."""
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    rounds = [e for e in lines if e["kind"] == "round" and e["round"] > STOPPED]
    assert [e["round"] for e in rounds] == list(range(STOPPED + 1, ROUNDS + 1)), run
    return [e[f"loss/{name}"] for e in rounds for name in ("total", *tasks(e))]


def tasks(entry: dict) -> list[str]:
    """Return the tasks that an entry tells of."""
    return sorted(k.removeprefix("count/") for k in entry if k.startswith("count/"))


def worst(run: Path, uninterrupted: list[float]) -> float:
    """Return the largest relative error of a resumed run's losses."""
    return max(abs(a - b) / abs(b) for a, b in zip(losses(run), uninterrupted, strict=True))
