"""Checkpoints: save, find, load. Free of ranks; safetensors and JSON only, so that nothing is ever unpickled.

    checkpoints/round_00000120/   model.safetensors  model.json  optimizer.safetensors  state.json  config.yaml  COMPLETE
    checkpoints/best.json         {"checkpoint": "round_00000100"}

A checkpoint is written under a temporary name, flushed and renamed; COMPLETE is written last and lists every file's size.
model.safetensors and model.json leave with what a user of the weights needs. Tested by tests/test_checkpoint.py.
"""

import dataclasses
import json
import logging
import math
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from mtl_dist.run_folder import versions, write_atomically

log = logging.getLogger("mtl_dist")
MARKER = "COMPLETE"
Tensors = dict[str, torch.Tensor]
"""{name: whole tensor on the CPU}."""


@dataclasses.dataclass(kw_only=True)
class TrainState:
    """Where a run stands after `round` rounds."""

    round: int = 0
    positions: dict[str, list[list[int]]] = dataclasses.field(default_factory=dict)
    """{stream: (epoch, turn, row) of each lane's next clip}: data/lanes.py."""
    best: float | None = None
    best_round: int = 0
    validations_since_best: int = 0
    clips: int = 0
    bad_clips: int = 0
    nonfinite_in_a_row: int = 0
    scaler: dict | None = None
    tables: dict[str, str] = dataclasses.field(default_factory=dict)
    """{corpus: file: what tells it from another state of it}: positions mean nothing in other data."""

    def advance(self, clips: int, bad: int, skipped: bool) -> None:
        """Count a round: clips of all tasks and ranks, bad ones among them, whether it was not finite."""
        self.round += 1
        self.clips += clips
        self.bad_clips += bad
        self.nonfinite_in_a_row = self.nonfinite_in_a_row + 1 if skipped else 0

    def note_validation(self, value: float, higher_is_better: bool) -> None:
        """Take note of a validation's main metric: a new best, or one more without."""
        worst = -math.inf if higher_is_better else math.inf
        value = value if math.isfinite(value) else worst
        if self.best is None or (value > self.best if higher_is_better else value < self.best):
            self.best, self.best_round, self.validations_since_best = value, self.round, 0
        else:
            self.validations_since_best += 1


def folder_name(round_: int) -> str:
    """Return the name of a round's checkpoint; names sort by round. The round itself is read from state.json."""
    return f"round_{round_:08d}"


def save(
    root: Path, weights: Tensors, moments: Tensors, state: TrainState, config_text: str, about: dict
) -> Path:
    """Write a checkpoint of an engine's full state; rank 0 calls it. Raises OSError, leaving nothing behind."""
    target = root / folder_name(state.round)
    partial = root / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        save_file(weights, partial / "model.safetensors")
        save_file(moments, partial / "optimizer.safetensors")
        texts = {
            "model.json": json.dumps(about, indent=2),
            "state.json": json.dumps(
                dataclasses.asdict(state) | {"versions": versions()}, indent=2
            ),
            "config.yaml": config_text,
        }
        for name, text in texts.items():
            (partial / name).write_text(text, encoding="utf-8")
        sizes = {path.name: _flush(path) for path in sorted(partial.iterdir())}
        (partial / MARKER).write_text(json.dumps(sizes), encoding="utf-8")
        _flush(partial / MARKER)
        _flush_folder(partial)
        if target.exists():
            old = root / f".{target.name}.old"
            shutil.rmtree(old, ignore_errors=True)
            target.rename(old)
        partial.rename(target)
        shutil.rmtree(root / f".{target.name}.old", ignore_errors=True)
        _flush_folder(root)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise OSError(f"the checkpoint {target} could not be written: {error}") from error
    return target


def remove_old(root: Path, keep: int) -> None:
    """Delete all but the newest `keep` whole checkpoints and the best one; called after a new one is whole."""
    best = best_checkpoint(root)
    for path in whole_checkpoints(root)[keep:]:
        if path != best:
            shutil.rmtree(path)


def whole_checkpoints(root: Path) -> list[Path]:
    """Return the complete checkpoints, newest first; warn of broken ones, which are left alone."""
    whole = []
    for path in sorted(root.glob("round_*"), reverse=True):
        problem = broken(path)
        if problem:
            log.warning("checkpoint %s is skipped: %s", path, problem)
        else:
            whole.append(path)
    return whole


def broken(path: Path) -> str | None:
    """Return why a checkpoint cannot be used, or None."""
    if not (path / MARKER).is_file():
        return f"it has no {MARKER} marker (was its writer killed?)"
    try:
        sizes = json.loads((path / MARKER).read_text(encoding="utf-8"))
    except ValueError:
        sizes = None
    if not isinstance(sizes, dict) or not sizes:
        return f"its {MARKER} marker is damaged"
    for name, size in sizes.items():
        found = (path / name).stat().st_size if (path / name).is_file() else 0
        if found != size:
            return f"{name} has {found} of {size} bytes"
    return None


def mark_best(root: Path, checkpoint: Path) -> None:
    """Point best.json at a checkpoint."""
    write_atomically(root / "best.json", json.dumps({"checkpoint": checkpoint.name}))


def best_checkpoint(root: Path) -> Path | None:
    """Return the checkpoint with the best validation, if it is there and whole; warn if it is not."""
    pointer = root / "best.json"
    if not pointer.is_file():
        return None
    try:
        path = root / json.loads(pointer.read_text(encoding="utf-8"))["checkpoint"]
    except (ValueError, TypeError, KeyError):
        log.warning("%s is damaged: no checkpoint is known as the best", pointer)
        return None
    problem = broken(path)
    if problem:
        log.warning("the best checkpoint %s is skipped: %s", path, problem)
    return None if problem else path


def find(path: Path, which: str = "best") -> Path:
    """Return the checkpoint meant by a checkpoint folder, or the best or last of a run folder.

    Where no checkpoint is marked best, or it is broken, the newest whole one is taken.

    Raises:
        ValueError: there is none, or it is broken.
    """
    if (path / "state.json").is_file() or (path / MARKER).is_file():
        problem = broken(path)
        if problem:
            raise ValueError(f"checkpoint {path}: {problem}")
        return path
    root = path / "checkpoints"
    best = best_checkpoint(root) if which == "best" else None
    if best is not None:
        return best
    whole = whole_checkpoints(root)
    if not whole:
        raise ValueError(f"{path}: neither a checkpoint nor a run folder with a whole checkpoint")
    return whole[0]


def load_weights(path: Path, model) -> None:
    """Load model.safetensors into a plain model. Raises ValueError naming what does not fit."""
    saved = load_file(path / "model.safetensors")
    check_fit(path, saved, {name: p.shape for name, p in model.named_parameters()})
    model.load_state_dict(saved)


def check_fit(path: Path, saved: Tensors, shapes: dict[str, torch.Size]) -> None:
    """Raise ValueError, naming some, if the parameters saved are not those of `shapes`."""
    wrong = [n for n in {*saved, *shapes} if n not in saved or saved[n].shape != shapes.get(n)]
    if wrong:
        raise ValueError(
            f"checkpoint {path} is of another model: {', '.join(sorted(wrong)[:5])} do not fit"
        )


def read(path: Path) -> tuple[Tensors, Tensors, TrainState]:
    """Return weights, Adam's moments, and where the run stands."""
    fields = {field.name for field in dataclasses.fields(TrainState)}
    saved = json.loads((path / "state.json").read_text(encoding="utf-8"))
    state = TrainState(**{key: value for key, value in saved.items() if key in fields})
    weights, moments = (load_file(path / f"{n}.safetensors") for n in ("model", "optimizer"))
    return weights, moments, state


def read_newest(root: Path) -> tuple[Path, tuple[Tensors, Tensors, TrainState]] | None:
    """Return the newest checkpoint that is whole and readable, with what it holds, or None."""
    for path in whole_checkpoints(root):
        try:
            return path, read(path)
        except (SafetensorError, json.JSONDecodeError, UnicodeDecodeError, OSError) as error:
            log.warning("checkpoint %s is skipped: it cannot be read (%s)", path, error)
    return None


def _flush(path: Path) -> int:
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return path.stat().st_size


def _flush_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
