"""The run folder: config.yaml, environment.json, status.json, metrics.jsonl, ranks/, tensorboard/, checkpoints/,
predictions/SPLIT.parquet, results.json."""

import fcntl
import importlib.metadata
import io
import json
import logging
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import yaml

from mtl_dist.config import Config, ConfigError, differences
from mtl_dist.runtime import World

log = logging.getLogger("mtl_dist")
PACKAGES = (
    "torch",
    "accelerate",
    "datasets",
    "librosa",
    "soundfile",
    "soxr",
    "tensorboard",
    "numpy",
    "mtl_dist",
)


PREDICTIONS = pa.schema(
    [
        ("task", pa.string()),
        ("id", pa.string()),
        ("label", pa.string()),
        ("probabilities", pa.list_(pa.float32())),
        ("probabilities_single_crop", pa.list_(pa.float32())),
    ]
)
"""Columns of predictions/SPLIT.parquet; `classes` of its metadata is JSON: {task: its classes, in order}."""


class RunFolder:
    """Paths of a run, and the files that describe it."""

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.checkpoints = self.path / "checkpoints"
        self.tensorboard = self.path / "tensorboard"
        self.metrics = self.path / "metrics.jsonl"
        self.results = self.path / "results.json"
        self.predictions = self.path / "predictions"
        self.config = self.path / "config.yaml"
        self.status = self.path / "status.json"
        self.ranks = self.path / "ranks"

    def rank_file(self, rank: int) -> Path:
        """Return where a rank of several writes what its phases took."""
        return self.ranks / f"rank_{rank:05d}.jsonl"

    def open(self, config: Config, world: World, device: torch.device, kernel: str = "") -> None:
        """Claim the folder for a run: called by rank 0 before anything is written; `kernel` is noted as the one in force.

        Raises:
            ConfigError: it cannot be written, belongs to a run and resume is `no`, or to a run of other settings.
        """
        if self.config.exists():
            try:
                changed = differences(config, self.config.read_text(encoding="utf-8"))
            except (yaml.YAMLError, AttributeError, ValueError, OSError) as error:
                raise ConfigError(
                    f"run.dir: {self.config} is damaged ({error}); name another folder"
                ) from error
            if config.run.resume == "no":
                raise ConfigError(
                    f"run.dir: {self.path} holds a run already; go on with --run.resume auto, or name another folder"
                )
            if changed:
                raise ConfigError(
                    f"run.dir: {self.path} holds a run of another configuration ({'; '.join(changed)}); name another "
                    "folder, or take these settings back"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ConfigError(
                f"run.dir: {self.path} is not empty and holds no run; name another folder"
            )
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock()
            write_atomically(self.config, config.text)
            self.checkpoints.mkdir(exist_ok=True)
            found = environment(world, device) | {"kernel": kernel}
            write_atomically(self.path / "environment.json", json.dumps(found, indent=2))
        except OSError as error:
            raise ConfigError(
                f"run.dir: {self.path} cannot be written ({error}); name another folder"
            ) from error

    def _lock(self) -> None:
        """Keep a second process from writing here, until this one ends: a stopped run may still be saving."""
        self.lock = open(self.path / ".lock", "w", encoding="utf-8")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # not inherited by loader workers
        except (BlockingIOError, PermissionError):
            raise ConfigError(
                f"run.dir: another process is writing {self.path}; wait until it has ended, or name another folder"
            ) from None
        except OSError as error:
            log.warning("%s cannot be locked against a second writer: %s", self.path, error)

    def keep_lines_until(self, round_: int) -> None:
        """Drop what metrics.jsonl and the ranks' files say of rounds after `round_`, which a resumed run will write again.

        A run that starts at its beginning drops everything, also what was known before the first round.
        """
        for path in (self.metrics, *self.ranks.glob("rank_*.jsonl")):
            try:
                if path.exists():
                    keep_lines_until(path, round_ or -1)
            except OSError as error:
                log.error("%s: rounds that are done again will be in it twice", error)

    def save_status(self, state: str, **facts: object) -> None:
        """Write status.json, for scripts that watch over a run: {"state": state} and `facts`.

        running: at work, or killed. stopped: asked to stop, saved, to be gone on with. finished: results.json is written.
        failed: an error ended it. The exit code of a rank is lost in most launchers; this file is not.
        """
        try:
            write_atomically(self.status, json.dumps({"state": state} | facts) + "\n")
        except OSError as error:
            log.error("%s", error)

    def save_results(self, results: dict[str, dict[str, dict[str, float]]]) -> None:
        """Merge {split: {task: {metric: number}}} into results.json."""
        try:
            merged = json.loads(self.results.read_text(encoding="utf-8"))
        except FileNotFoundError:
            merged = {}
        except ValueError:
            log.warning("%s was damaged and is written anew", self.results)
            merged = {}
        write_atomically(self.results, json.dumps(merged | results, indent=2) + "\n")

    def save_predictions(
        self, split: str, predictions: Mapping[str, list[dict]], classes: Mapping[str, list[str]]
    ) -> None:
        """Write predictions/SPLIT.parquet, of the tasks with classes. Raises OSError naming it."""
        rows = [{"task": name} | row for name in classes for row in predictions.get(name, [])]
        schema = PREDICTIONS.with_metadata({"classes": json.dumps(dict(classes))})
        file = io.BytesIO()
        pq.write_table(pa.Table.from_pylist(rows, schema), file)
        self.predictions.mkdir(parents=True, exist_ok=True)
        write_atomically(self.predictions / f"{split}.parquet", file.getvalue())


def keep_lines_until(path: Path, round_: int) -> None:
    """Drop the lines of a JSON-lines file from the first of a later round on. Raises OSError."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if not line.endswith("\n") or json.loads(line)["round"] > round_:
                break
        except ValueError:  # the tail of a file that a crash cut off
            break
        lines.append(line)
    write_atomically(path, "".join(lines))


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write beside, flush to disk, rename: a reader sees the old file or the new one, whole. Raises OSError."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, f"{path} could not be written: {error.strerror}") from error


def versions() -> dict[str, str]:
    """Return {package: version} of what a run's numbers depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }


def environment(world: World, device: torch.device) -> dict:
    """Return what the run ran on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "versions": versions(),
        "command": sys.argv,
        "host": platform.node(),
        "platform": platform.platform(),
        "device": f"{device.type} {name}".strip(),
        "processes": world.size,
        "threads": torch.get_num_threads(),
    }
