"""Saving and resuming a run: what checkpoint.py does on a disk, decided by all ranks together."""

import logging
import sys
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError

from mtl_dist import checkpoint
from mtl_dist.checkpoint import TrainState
from mtl_dist.config import ConfigError
from mtl_dist.experiment import Experiment, fingerprint
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import collect

log = logging.getLogger("mtl_dist")


class Keeper:
    """Keeps a run's checkpoints: every rank calls its methods, rank 0 writes."""

    def __init__(
        self, experiment: Experiment, accelerator: Accelerator, folder: RunFolder, model, optimizer
    ):
        """Take the unwrapped `model` and the optimizer as Accelerate prepared it."""
        self.experiment, self.accelerator, self.folder = experiment, accelerator, folder
        self.config, self.model = experiment.config, model
        self.adam = getattr(optimizer, "optimizer", optimizer)
        self.tables = {
            f"corpora.{name}": fingerprint(corpus.splits["train"])
            for name, corpus in experiment.corpora.items()
        }
        self.kept_best: tuple[float | None, int] = (None, 0)

    def resume_or_start(self) -> TrainState:
        """Return where the run stands: at the newest checkpoint if run.resume is auto, else at its beginning."""
        state = self._resume() or TrainState(positions=dict.fromkeys(self.experiment.tasks, 0))
        state.tables = self.tables
        self.kept_best = (state.best, state.best_round)
        return state

    def save(self, state: TrainState) -> None:
        """Write a checkpoint on rank 0; a full disk costs the new one, never the old one nor the run."""
        scaler = self.accelerator.scaler
        state.scaler = scaler.state_dict() if scaler is not None else None
        written = not self.accelerator.is_main_process or self._write(state)
        if all(collect(self.accelerator, [written])):
            self.kept_best = (state.best, state.best_round)
        elif state.best_round == state.round:  # not on the disk: the one that is stays the best
            state.best, state.best_round = self.kept_best

    def load_best(self) -> Path | None:
        """Load the best checkpoint's weights and return its folder; None, with a warning, if it cannot be read."""
        best = checkpoint.best_checkpoint(self.folder.checkpoints)
        try:
            if best is not None:
                checkpoint.load_weights(best, self.model)
        except (SafetensorError, OSError) as error:
            log.warning("the best checkpoint %s is skipped: %s; the last is used", best, error)
            return None
        return best

    def _write(self, state: TrainState) -> bool:
        """Return whether the disk took it."""
        root, written = self.folder.checkpoints, False
        try:
            path = checkpoint.save(
                root, self.model, self.adam, state, self.config.text, self._about()
            )
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
        return {
            "model": vars(self.config.model),
            "data": vars(self.config.data),
            "receptive_field_samples": self.model.trunk.receptive_field,
            "tasks": {n: vars(t.config) | {"classes": t.class_names()} for n, t in tasks.items()},
        }

    def _resume(self) -> TrainState | None:
        """Load the newest checkpoint that can be loaded; all ranks must find the same one.

        Raises:
            ConfigError: the ranks see different folders, or the corpora are not those of the checkpoint.
        """
        auto = self.config.run.resume == "auto"
        try:
            path, state = (
                checkpoint.load_newest(self.folder.checkpoints, self.model, self.adam)
                if auto
                else (None, None)
            )
        except ValueError as error:
            raise ConfigError(f"run.dir: {error}") from error
        rounds = collect(self.accelerator, [state.round if state else 0])
        if len(set(rounds)) > 1:
            raise ConfigError(
                f"run.dir: {self.folder.path} is not the same folder on all nodes (rounds {rounds}); put it on a disk that "
                "they share"
            )
        if state is None:
            return None
        changed = [n for n, t in self.tables.items() if state.tables.get(n, t) != t]
        if changed:
            raise ConfigError(
                f"{', '.join(changed)}: the training clips are not those that {path} was trained on (files were added, "
                "removed, renamed or relabelled); restore the corpora, or start a new run"
            )
        if state.scaler is not None and self.accelerator.scaler is not None:
            self.accelerator.scaler.load_state_dict(state.scaler)
        if self.accelerator.is_main_process:
            print(f"goes on from {path} (round {state.round})", file=sys.stderr)
        return state
