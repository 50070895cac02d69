"""From a configuration to the things it names: corpora, tasks, streams of clips, reader, model."""

import dataclasses
import itertools
import logging
import math
import pickle
import sys
from collections.abc import Mapping
from platform import node

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from mtl_dist.audio.clips import ClipReader
from mtl_dist.blueprint import Blueprint
from mtl_dist.config import Config, ConfigError
from mtl_dist.data.batches import Positions
from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.corpora.synthetic import SYNTHETIC, synthesise
from mtl_dist.data.faults import call_with_timeout, reason
from mtl_dist.data.lanes import Blocks, Part
from mtl_dist.data.loader import ClipStream, RoundStream, check_lanes
from mtl_dist.data.sources import SPLITS
from mtl_dist.models.kernels import REFERENCE
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.wavenet import receptive_field
from mtl_dist.phases import Phases
from mtl_dist.runtime import World, collect, precision_asked_for
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
    rank: int = 0
    """Of the process, for messages."""

    def streams(self) -> list[ClipStream]:
        """Return what the tasks hear in training: one stream for each set of sources.

        Raises:
            ValueError: there are no clips, or a source gets no lane.
        """
        by_sources: dict[tuple[str, ...], list[str]] = {}
        for name, task in self.tasks.items():
            by_sources.setdefault(tuple(task.config.sources), []).append(name)
        weights = {n: c.weights for n, c in self.corpora.items() if c.weights is not None}
        return [
            ClipStream(
                names,
                sources,
                [part for corpus in sources for part in self.corpora[corpus].parts["train"]],
                self._noise(names, "train"),
                lanes=self.config.data.lanes or self.config.train.global_batch,
                weights={corpus: weights[corpus] for corpus in sources if corpus in weights},
                rank=self.rank,
                patience_seconds=self.config.patience(),
            )
            for sources, names in by_sources.items()
        ]

    def _noise(self, tasks: list[str], split: str) -> dict[str, list[Part]]:
        heard = dict.fromkeys(c for n in tasks for c in self.tasks[n].config.backgrounds(split))
        return {corpus: self.corpora[corpus].noise(split) for corpus in heard}

    def lane_bytes(self, ranks: int) -> int:
        """Return about how many bytes the blocks take that the lanes of a rank hold in memory, noise included."""
        each = 0
        for stream in self.streams():
            for blocks, count in (
                *stream.groups,
                *((b, stream.lanes) for b in stream.noise.values()),
            ):
                each += count * max(part.files.table_bytes for part in blocks.parts)
        return each // ranks

    def clips(self, task: str) -> int:
        """Return how many training clips a task has, or about how many: an epoch."""
        sources = self.tasks[task].config.sources
        return sum(self.corpora[name].clips("train") for name in sources)

    def classes(self) -> dict[str, list[str]]:
        """Return {task: its classes}, of the tasks that have some."""
        return {n: t.class_names() for n, t in self.tasks.items() if t.class_names()}

    def evaluation_blocks(self, task: str, split: str) -> tuple[Blocks, dict[str, Blocks]]:
        """Return what a task is evaluated on: a split of its first source, and noise by corpus.

        Raises:
            ValueError: there are no clips.
        """
        source = self.corpora[self.tasks[task].config.sources[0]]
        common = self.rank, self.config.patience()
        noise = self._noise([task], split)
        beside = {corpus: Blocks(parts, *common) for corpus, parts in noise.items()}
        return Blocks(source.parts[split], *common), beside

    def rounds(
        self, world: World, accumulation: int, first_round: int, positions: Positions
    ) -> RoundStream:
        """Return a rank's rounds after `first_round`; `positions` are those of all lanes then."""
        return RoundStream(
            tasks=self.tasks,
            streams=self.streams(),
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
    """Find the corpora that the trained tasks hear, but for those that are `known`, and build the tasks.

    Raises:
        ConfigError: a corpus or task cannot be built as configured; the message names the field, file or row.
    """
    known = known or {}
    config.remote.apply()
    try:
        for corpus in known.values():
            corpus.check_seen()
        corpora = {
            name: known.get(name) or open_corpus(config, name) for name in config.corpora_heard()
        }
        _check_missing(corpora, config.data.max_bad_share)
        context = TaskContext(
            classes={name: corpus.classes for name, corpus in corpora.items()},
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
            name: torch.zeros(corpus.listed, dtype=torch.int64).share_memory_().numpy()
            for name, corpus in corpora.items()
            if corpus.listed
        },
    )
    blueprint = Blueprint(config, tasks, device, precision)
    experiment = Experiment(
        config=config, corpora=corpora, tasks=tasks, reader=reader, blueprint=blueprint
    )
    for name in tasks:
        if not experiment.clips(name):
            raise ConfigError(
                f"tasks.{name}.sources: {tasks[name].config.sources} hold no training clips"
            )
    try:
        experiment.streams()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    return experiment


def open_corpus(config: Config, name: str) -> Corpus:
    """Open a corpus within remote.patience_seconds. Raises ValueError with what is wrong with it."""
    patience, kind = config.patience(), config.corpora[name]
    try:
        what = f"corpus {name}: opening"
        found = call_with_timeout(lambda: kind.open(name, config.data.split_seed), patience, what)
        for part in itertools.chain(*found.parts.values()):
            pickle.loads(pickle.dumps(part.files.known))  # for this thread
        return found
    except ValueError as error:
        raise ValueError(reason(error).removeprefix("ValueError: ")) from error
    except Exception as error:  # whatever file systems, transports and formats raise
        raise ValueError(f"corpora.{name}: {reason(error)}") from error


def build_together(accelerator: Accelerator, config: Config, phases: Phases) -> Experiment:
    """Build the experiment on rank 0, which sends the others what it has found of the corpora, and then on those.

    Corpora that are made on the spot are made by the first process of each node.
    """
    experiment, problem = None, []
    precision = precision_asked_for(config.train.mixed_precision)
    place = 2 - accelerator.is_local_main_process - accelerator.is_main_process
    known: list[dict[str, Corpus]] = [{}]
    for turn in range(3):
        if place == turn:
            try:
                if turn == 1 and synthetic_wanted(config):
                    synthesise()
                experiment = build_experiment(config, known[0], accelerator.device, precision)
            except ConfigError as error:
                problem = [str(error) if accelerator.is_main_process else f"on {node()}: {error}"]
        raise_together(accelerator, problem, phases)
        if turn == 0 and accelerator.num_processes > 1:
            corpora = experiment.corpora if experiment else {}
            known = [{n: c for n, c in corpora.items() if c.sendable}]
            phases.enter("collective")
            broadcast_object_list(known)
            phases.enter("start")
    agree_on_kernel(accelerator, experiment.blueprint, phases)
    experiment.rank = accelerator.process_index
    return experiment


def synthetic_wanted(config: Config) -> bool:
    """Return whether a corpus that is heard is made on the spot."""
    heard = [config.corpora[name] for name in config.corpora_heard()]
    paths = [path for c in heard for path in (vars(c).get("root"), *_paths(c))]
    return SYNTHETIC in paths


def _paths(corpus) -> list[str]:
    return [source.path for source in vars(corpus).get("sources", [])]


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
            total = sum(corpus.clips(split) for split in splits_of[part]) + len(paths)
            if len(paths) > max_bad_share * total:
                raise ValueError(
                    f"corpora.{corpus.name}: {len(paths)} of {total} listed files are missing, such as {paths[0]}; "
                    f"complete the corpus, or allow a larger data.max_bad_share (now {max_bad_share})"
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """The arithmetic of a run: micro-batch and accumulation, rounds an epoch and in all."""

    micro_batch: int
    accumulation: int
    rounds_per_epoch: float
    rounds: int


def plan_rounds(config: Config, main_clips: int, ranks: int, auto: int | None = None) -> Plan:
    """Work out the rounds. `auto` is what a micro_batch of auto was found to be; until then it is the most there can be.

    Raises ConfigError where ranks x micro_batch x accumulation cannot give global_batch, or lanes and ranks do not agree.
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
    try:
        check_lanes(config.data.lanes or batch, batch, ranks)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    per_epoch = main_clips / batch
    rounds = config.train.rounds or max(1, math.ceil(config.train.epochs * per_epoch))
    return Plan(
        micro_batch=micro,
        accumulation=batch // (ranks * micro),
        rounds_per_epoch=per_epoch,
        rounds=rounds,
    )
