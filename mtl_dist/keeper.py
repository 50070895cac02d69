"""Saving and resuming a run: what checkpoint.py does on a disk, decided by all ranks together."""

import copy
import dataclasses
import logging
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError

from mtl_dist import checkpoint
from mtl_dist.checkpoint import Tensors, TrainState
from mtl_dist.config import ConfigError
from mtl_dist.data.batches import Positions
from mtl_dist.engines import Engine
from mtl_dist.experiment import Experiment, raise_together
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import collect
from mtl_dist.transfer import transferred

log = logging.getLogger("mtl_dist")


class Keeper:
    """Keeps a run's checkpoints: every rank calls its methods; rank 0 writes, while training goes on."""

    def __init__(
        self,
        experiment: Experiment,
        engine: Engine,
        folder: RunFolder,
        phases: Phases | None = None,
    ):
        self.experiment, self.engine, self.folder = experiment, engine, folder
        self.phases = phases or Phases()
        self.config, self.accelerator = experiment.config, engine.accelerator
        self.tables = {
            f"corpora.{name}, {what}": digest
            for name, corpus in experiment.corpora.items()
            for what, digest in corpus.fingerprint().items()
        }
        self.positions: Positions = {}
        self.own_positions: Positions = {}
        self.kept_best: tuple[float | None, int] = (None, 0)
        self.writer = ThreadPoolExecutor(max_workers=1)
        self.being_written: tuple[TrainState, Future | None] | None = None

    def resume_or_start(self) -> TrainState:
        """Return where the run stands: at the newest checkpoint if run.resume is auto, else at its beginning.

        Raises:
            ConfigError: on all ranks, where one of them cannot start or go on.
        """
        state = self._resume()
        if state is None:
            state = TrainState()
            self._start()
        state.tables = self.tables
        self.positions = {
            stream: dict(enumerate(map(tuple, lanes))) for stream, lanes in state.positions.items()
        }
        self.kept_best = (state.best, state.best_round)
        return state

    def advance(self, positions: Positions) -> None:
        """Take note of where this rank's lanes are after a round."""
        for stream, lanes in positions.items():
            self.own_positions.setdefault(stream, {}).update(lanes)

    def _all_positions(self) -> dict[str, list[list[int]]]:
        """Return where all lanes are: as they were at the start, and as each rank has its own."""
        self.phases.enter("collective")
        merged = copy.deepcopy(self.positions)
        for own in collect(self.accelerator, [self.own_positions]):
            for stream, lanes in own.items():
                merged.setdefault(stream, {}).update(lanes)
        self.phases.enter("checkpoint")
        return {s: [list(lanes[n]) for n in sorted(lanes)] for s, lanes in merged.items()}

    def save(self, state: TrainState) -> float:
        """Gather a checkpoint and have rank 0 write it beside the training; return for how many seconds training waited.

        A full disk costs the new checkpoint, never the old one nor the run.
        """
        began = time.perf_counter()
        self.settle(state)
        self.phases.enter("checkpoint")
        state.scaler, state.positions = self.engine.scaler_state(), self._all_positions()
        weights, moments = self.engine.full_state()
        frozen, job = copy.deepcopy(state), None
        if self.accelerator.is_main_process:
            job = self.writer.submit(self._write, weights, moments, frozen)
        self.being_written = (frozen, job)
        return time.perf_counter() - began

    def settle(self, state: TrainState) -> None:
        """Wait until the checkpoint that is being written is whole; a best one that the disk did not take is none."""
        if self.being_written is None:
            return
        frozen, job = self.being_written
        self.being_written = None
        self.phases.enter("checkpoint")
        written = job is None or job.result()
        self.phases.enter("collective")
        if all(collect(self.accelerator, [written])):
            self.kept_best = (frozen.best, frozen.best_round)
        elif frozen.best_round == frozen.round == state.best_round:
            state.best, state.best_round = self.kept_best

    def best_model(self) -> tuple[Path, torch.nn.Module] | None:
        """Return the best checkpoint with a plain model of its weights; None, with a warning, if a rank cannot read it."""
        path, model = checkpoint.best_checkpoint(self.folder.checkpoints), None
        if path is not None:
            model = self.experiment.build_model()
            try:
                checkpoint.load_weights(path, model)
            except (SafetensorError, OSError) as error:
                log.warning("the best checkpoint %s is skipped: %s; the last is used", path, error)
                model = None
        self.phases.enter("collective")
        if not all(collect(self.accelerator, [model is not None])):
            return None
        return path, model.to(self.accelerator.device)

    def _write(self, weights: Tensors, moments: Tensors, state: TrainState) -> bool:
        """Return whether the disk took it."""
        root, written = self.folder.checkpoints, False
        try:
            path = checkpoint.save(root, weights, moments, state, self.config.text, self._about())
            if state.best_round == state.round:
                checkpoint.mark_best(root, path)
            written = True
            checkpoint.remove_old(root, self.config.train.keep_checkpoints)
        except OSError as error:
            log.error("%s; the older checkpoints are kept and training goes on", error)
        return written

    def _about(self) -> dict:
        """What a user of the weights needs to rebuild the model and feed it, as model.json."""
        tasks = self.experiment.tasks
        model = dict(vars(self.config.model))
        del model["kernel"], model["initial"]  # how it came about, not what it is
        return {
            "model": model,
            "data": vars(self.config.data),
            "receptive_field_samples": self.engine.bare.trunk.receptive_field,
            "tasks": {
                n: dataclasses.asdict(t.config) | {"classes": t.class_names()}
                for n, t in tasks.items()
            },
        }

    def _start(self) -> None:
        """Take over the weights of model.initial, if there is one."""
        problem, initial = [], self.config.model.initial
        if initial is None:
            return
        try:
            new, classes = self.experiment.build_model(), self.experiment.classes()
            weights, what = transferred(initial, new, classes)
        except (ValueError, OSError, SafetensorError) as error:
            problem = [f"model.initial: {error}"]
        raise_together(self.accelerator, problem, self.phases)
        self.engine.load_state(weights, {})
        if self.accelerator.is_main_process:
            print(f"starts from {what}", file=sys.stderr)

    def _resume(self) -> TrainState | None:
        """Load the newest checkpoint that can be loaded; all ranks must find the same one.

        Raises:
            ConfigError: it is of another model, the ranks see different folders, or the corpora are not its corpora.
        """
        auto = self.config.run.resume == "auto"
        found = checkpoint.read_newest(self.folder.checkpoints) if auto else None
        self.phases.enter("collective")
        rounds = collect(self.accelerator, [found[1][2].round if found else 0])
        self.phases.enter("start")
        if len(set(rounds)) > 1:
            raise ConfigError(
                f"run.dir: {self.folder.path} is not the same folder on all nodes (rounds {rounds}); put it on a disk that "
                "they share"
            )
        if found is None:
            return None
        path, (weights, moments, state) = found
        try:
            checkpoint.check_fit(path, weights, self.engine.shapes)
        except ValueError as error:
            raise ConfigError(f"run.dir: {error}") from error
        if any(isinstance(lanes, int) or len(lanes[0]) != 3 for lanes in state.positions.values()):
            raise ConfigError(
                f"run.dir: {path} was written by an earlier version, whose clips came in another order; start a new run"
            )
        if state.tables != self.tables:
            raise ConfigError(
                f"{_changed(state.tables, self.tables)} since {path} was written, and with it the order of clips; restore "
                "the data, or start a new run"
            )
        self.engine.load_state(weights, moments)
        self.engine.load_scaler_state(state.scaler)
        if self.accelerator.is_main_process:
            print(f"goes on from {path} (round {state.round})", file=sys.stderr)
        return state


def _changed(saved: dict[str, str], now: dict[str, str]) -> str:
    """Return which file or listing is not what it was, and how."""
    names = [name for name in sorted({*saved, *now}) if saved.get(name) != now.get(name)]
    files = [name for name in names if not name.endswith("its training clips")] or names
    how = "is new" if files[0] not in saved else "is gone" if files[0] not in now else "changed"
    more = f" (and {len(files) - 1} more)" * (len(files) > 1)
    return f"{files[0]}{more} {how}"
