"""From a configuration to the things it names: corpora, tasks, tables of clips, reader, model."""

import dataclasses
import hashlib
import logging
import math
import sys
from collections.abc import Mapping
from platform import node

import datasets
import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mtl_dist.audio.clips import ClipReader
from mtl_dist.blueprint import Blueprint
from mtl_dist.config import Config, ConfigError
from mtl_dist.corpora import Corpus
from mtl_dist.corpora.base import SPLITS
from mtl_dist.models.kernels import REFERENCE
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.wavenet import receptive_field
from mtl_dist.phases import Phases
from mtl_dist.runtime import World, collect, precision_asked_for
from mtl_dist.streams.rounds import RoundStream
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.table import Table
from mtl_dist.tasks import TASKS, Task, TaskContext

log = logging.getLogger("mtl_dist")


@dataclasses.dataclass(kw_only=True)
class Experiment:
    """Everything a run is about, the same on every rank."""

    config: Config
    corpora: dict[str, Corpus]
    tasks: dict[str, Task]
    reader: ClipReader
    blueprint: Blueprint
    clips_per_forward: int = 16
    """Windows of one row that are evaluated together; no more than clips fit in training."""

    def table(self, task: str) -> Table:
        """Return the training rows of all sources of a task."""
        sources = [self.corpora[name].splits["train"] for name in self.tasks[task].config.sources]
        rows = datasets.concatenate_datasets(sources) if len(sources) > 1 else sources[0]
        weights = {n: c.weights for n, c in self.corpora.items() if c.weights is not None}
        return Table(rows, self.shards(), weights)

    def evaluation_table(self, task: str, split: str) -> Table:
        """Return the rows of a split that a task is evaluated on: those of its first source."""
        source = self.corpora[self.tasks[task].config.sources[0]]
        return Table(source.splits[split], self.shards())

    def shards(self) -> dict[str, Shards]:
        """Return where the blocks of the corpora lie that are not files of their own."""
        return {n: corpus.shards for n, corpus in self.corpora.items() if corpus.shards is not None}

    def rounds(
        self, world: World, accumulation: int, first_round: int, positions: dict[str, int]
    ) -> RoundStream:
        """Return a rank's rounds after `first_round`; {task: clips consumed before, by all ranks}."""
        return RoundStream(
            tasks=self.tasks,
            tables={name: self.table(name) for name in self.tasks},
            reader=self.reader,
            seed=self.config.run.seed,
            world=world,
            global_batch=self.config.train.global_batch,
            accumulation=accumulation,
            first_round=first_round,
            positions=positions,
        )

    def build_model(self) -> MultitaskModel:
        """Return a new model; its initial values depend on run.seed and the tasks alone."""
        return self.blueprint.model()


def build_experiment(
    config: Config,
    known: Mapping[str, Corpus] | None = None,
    device: torch.device | None = None,
    precision: str = "no",
) -> Experiment:
    """List the corpora that the trained tasks hear, but for those that are `known`, and build the tasks.

    Raises:
        ConfigError: a corpus or task cannot be built as configured; the message names the field, file or row.
    """
    known = known or {}
    try:
        corpora = {
            name: known.get(name) or config.corpora[name].load(name, config.data.split_seed)
            for name in config.corpora_heard()
        }
        _check_missing(corpora, config.data.max_bad_share)
        _check_patience(corpora, config.run.timeout_seconds)
        context = TaskContext(
            corpora=corpora,
            rate=config.data.sample_rate,
            crop_samples=round(config.data.crop_seconds * config.data.sample_rate),
            receptive_field=receptive_field(config.model.blocks, config.model.layers),
        )
        tasks = {n: TASKS[n](config.tasks[n], context) for n in config.train.tasks}
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
    reader = ClipReader(
        rate=config.data.sample_rate,
        silence_db=config.data.silence_db,
        peak=config.data.normalise == "peak",
        spans={
            name: torch.zeros(corpus.clips, dtype=torch.int64).share_memory_().numpy()
            for name, corpus in corpora.items()
        },
    )
    blueprint = Blueprint(config, tasks, device, precision)
    experiment = Experiment(
        config=config, corpora=corpora, tasks=tasks, reader=reader, blueprint=blueprint
    )
    for name in tasks:
        table = experiment.table(name)
        if not len(table):
            raise ConfigError(
                f"tasks.{name}.sources: {tasks[name].config.sources} hold no training clips"
            )
        try:
            table.dealt(config.train.global_batch)
        except ValueError as error:
            raise ConfigError(str(error)) from error
    return experiment


def build_together(accelerator: Accelerator, config: Config, phases: Phases) -> Experiment:
    """Build the experiment on rank 0, on the first process of every other node, and on the rest.

    The first of a node may have to make corpora. What lies in shards is listed by rank 0 alone, which tells the others.
    """
    experiment, problem = None, []
    precision = precision_asked_for(config.train.mixed_precision)
    place = 2 - accelerator.is_local_main_process - accelerator.is_main_process
    known: list[dict[str, Corpus]] = [{}]
    for turn in range(3):
        if place == turn:
            try:
                experiment = build_experiment(config, known[0], accelerator.device, precision)
            except ConfigError as error:
                problem = [str(error) if accelerator.is_main_process else f"on {node()}: {error}"]
        raise_together(accelerator, problem, phases)
        if turn == 0 and accelerator.num_processes > 1:
            corpora = experiment.corpora if experiment else {}
            known = [{n: c for n, c in corpora.items() if c.shards is not None}]
            phases.enter("collective")
            broadcast_object_list(known)
            phases.enter("start")
    agree_on_kernel(accelerator, experiment.blueprint, phases)
    for corpus in experiment.shards().values():
        corpus.rank = accelerator.process_index
    return experiment


def agree_on_kernel(accelerator: Accelerator, blueprint: Blueprint, phases: Phases) -> None:
    """Let all ranks compute by the reference, with a warning, where one of them cannot do it by the kernel asked for."""
    warning = blueprint.kernel.warning
    phases.enter("collective")
    warnings = collect(accelerator, [f"{warning} (so on {node()})"] if warning else [])
    phases.enter("start")
    if warnings:
        blueprint.kernel = REFERENCE._replace(warning=warnings[0])
        if accelerator.is_main_process:
            log.warning(warnings[0])


def raise_together(accelerator: Accelerator, problem: list[str], phases: Phases) -> None:
    """End all ranks if any has a problem, so that none waits for it: rank 0 says it, the others are silent."""
    phases.enter("collective")
    problem = collect(accelerator, problem)
    phases.enter("start")
    if problem and not accelerator.is_main_process:
        sys.exit(1)
    if problem:
        raise ConfigError(problem[0])


def _check_missing(corpora: dict[str, Corpus], max_bad_share: float) -> None:
    splits_of = {"train": ("train", "validation"), "test": ("test",), "any": SPLITS}
    for corpus in corpora.values():
        for part, paths in corpus.missing.items():
            total = sum(len(corpus.splits[split]) for split in splits_of[part]) + len(paths)
            if len(paths) > max_bad_share * total:
                raise ValueError(
                    f"corpora.{corpus.name}: {len(paths)} of {total} listed files are missing, such as {paths[0]}; "
                    f"complete the corpus, or allow a larger data.max_bad_share (now {max_bad_share})"
                )


def _check_patience(corpora: dict[str, Corpus], timeout: float) -> None:
    """Let what hangs be named by the rank that waits for it, before the others' collective is over."""
    for corpus in corpora.values():
        if corpus.shards is not None:
            remote = corpus.shards.remote
            longest = remote.patience_seconds + 2 * remote.timeout_seconds
            if longest >= timeout:
                raise ValueError(
                    f"corpora.{corpus.name}.remote: a fault is borne for {longest:g} s (patience_seconds "
                    f"{remote.patience_seconds:g} and twice timeout_seconds {remote.timeout_seconds:g}), but after "
                    f"run.timeout_seconds {timeout:g} the other ranks end the run; lower the former or raise the latter"
                )


def fingerprint(table: datasets.Dataset) -> str:
    """Return a digest of a table's clips and labels, in order; not of their samples."""
    digest = hashlib.blake2b(digest_size=16)
    for clip, label in zip(
        table["id"][:], table["label"][:], strict=True
    ):  # whole columns: 50 times faster
        digest.update(f"{clip}\x1f{label}\x1e".encode())
    return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The arithmetic of a run: micro-batch and accumulation, rounds an epoch and in all."""

    micro_batch: int
    accumulation: int
    rounds_per_epoch: float
    rounds: int


def plan_rounds(config: Config, main_clips: int, ranks: int, auto: int | None = None) -> Plan:
    """Work out the rounds. `auto` is what a micro_batch of auto was found to be; until then it is the most there can be.

    Raises ConfigError where ranks x micro_batch x accumulation cannot give global_batch.
    """
    batch, asked = config.train.global_batch, config.train.micro_batch
    micro = asked if isinstance(asked, int) else auto or batch // ranks
    if micro == 0 or batch % (ranks * micro):
        accumulation = batch / (ranks * micro) if micro else 0
        fits = [m for m in range(1, batch + 1) if batch % (ranks * m) == 0]
        remedy = (
            f"a train.micro_batch of {', '.join(map(str, fits))}"
            if fits
            else f"a train.global_batch that is a multiple of {ranks}"
        )
        raise ConfigError(
            f"train.global_batch: {batch} = {ranks} ranks x micro_batch {micro} x accumulation {accumulation:g} does not "
            f"come out whole; use {remedy}"
        )
    per_epoch = main_clips / batch
    rounds = config.train.rounds or max(1, math.ceil(config.train.epochs * per_epoch))
    return Plan(
        micro_batch=micro,
        accumulation=batch // (ranks * micro),
        rounds_per_epoch=per_epoch,
        rounds=rounds,
    )
