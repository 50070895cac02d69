"""`mtl-dist plan`: what a run on so many nodes takes and does, before anything is started.

    mtl-dist plan --config paper --nodes 2 --gpus-per-node 8 --clips 8526        without the corpora

The bytes come from footprint.py, whether they fit from feasibility.py, the text from plan_table.py. Tested by
tests/test_planning.py.
"""

import argparse
import dataclasses
import json
import sys

from mtl_dist import footprint
from mtl_dist.activations import Meter
from mtl_dist.config import Config, ConfigError, load_config
from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.corpora.dividing import make_corpus
from mtl_dist.data.corpora.listing import Listing
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.feasibility import Case, divides, division_problem, memory_problem
from mtl_dist.footprint import ENGINES
from mtl_dist.plan_table import table

FSD_CLASSES = 41


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A corpus that is not there: one row that is never read, and the number of classes that a head needs."""

    classes: int

    def open(self, name: str, seed: int) -> Corpus:
        """Return a corpus of one clip."""
        row = {"id": "0", "path": "none", "label": "0", "split": "train"}
        return make_corpus(name, Listing(rows=[row], classes=[str(i) for i in range(self.classes)]))


def without_corpora(config: Config, classes: int, **where) -> Experiment:
    """Return the experiment with its tasks and model, on corpora that hold nothing; `where`: see build_experiment."""
    stand_ins = dict.fromkeys(config.corpora, StandIn(classes))
    return build_experiment(dataclasses.replace(config, corpora=stand_ins), **where)


def figures(case: Case, experiment: Experiment, rows: dict[str, int]) -> dict[str, object]:
    """Return every number of a plan by name; `rows` are the training clips of each task, where they are known.

    Without an arithmetic that comes out whole there is nothing to say about micro-batches, memory and the wire.
    """
    train, workers = case.config.train, case.config.data.workers
    checkpoint = footprint.checkpoint_bytes(case.size)
    facts: dict[str, object] = {
        "nodes": case.nodes,
        "ranks": case.ranks,
        "engine": case.engine,
        "precision": case.precision,
        "schedule": train.schedule,
        "parameters": case.size.elements,
        "kernel": experiment.blueprint.kernel.name,
        "global_batch": train.global_batch,
        "clips": rows,
        "longest_seconds": {
            n: t.config.longest_seconds for n, t in experiment.tasks.items() if t.whole
        },
        "activation_bytes_per_clip": {n: case.activations.of((n,), 1) for n in experiment.tasks},
        "checkpoint_bytes": checkpoint,
        "checkpoints_disk_bytes": (train.keep_checkpoints + 1) * checkpoint,
        "cores_per_node": case.per_node * (1 + workers),
    }
    if not divides(case):
        return facts
    plan, share = case.rounds(), train.global_batch // case.ranks
    round_bytes = footprint.round_bytes(experiment.tasks, share)
    needed, lane_bytes = case.memory_needed(), experiment.lane_bytes(case.ranks)
    wire = footprint.wire_bytes(
        case.size, case.engine, case.precision, case.ranks, case.micro_steps()
    )
    return facts | {
        "micro_batch": plan.micro_batch,
        "micro_batch_asked": experiment.config.train.micro_batch,
        "accumulation": plan.accumulation,
        "micro_steps": case.micro_steps(),
        "rounds_per_epoch": plan.rounds_per_epoch,
        "rounds": plan.rounds,
        "share": share,
        "lanes": experiment.config.data.lanes or train.global_batch,
        "lane_bytes": lane_bytes,
        "patience_seconds": experiment.config.patience(),
        "loader_worker_bytes": footprint.loader_worker(lane_bytes, round_bytes, workers),
        "loaders_shared_memory_bytes": case.per_node
        * footprint.loader_shared_memory(round_bytes, workers),
        "memory": needed,
        "memory_bytes": case.memory_total(),
        "evaluation_bytes": footprint.evaluation_bytes(case.size, case.engine),
        "wire": wire,
        "wire_bytes_per_rank": sum(wire.values()),
        "wire_bytes_leaving_node": sum(wire.values()) if case.nodes > 1 else 0,
    }


def add_plan(commands) -> None:
    """Declare `mtl-dist plan`."""
    command = commands.add_parser(
        "plan",
        allow_abbrev=False,
        help="say what a run takes, before it is started",
        description="Work out ranks, micro-batches, rounds, memory, traffic and disk of a run. --config RECIPE and words "
        "such as --train.global_batch 64 are those of mtl_dist/train.py. Exits 1 where the run would not do.",
    )
    command.add_argument("--nodes", type=int, default=1, help="machines (default: 1)")
    command.add_argument(
        "--gpus-per-node",
        "--processes-per-node",
        dest="per_node",
        type=int,
        default=1,
        help="ranks on each of them (default: 1)",
    )
    command.add_argument("--engine", choices=ENGINES, default="ddp", help="default: ddp")
    command.add_argument(
        "--precision",
        choices=("no", "bf16", "fp16"),
        help="default: train.mixed_precision, or bf16 if that is the launcher's to say",
    )
    command.add_argument(
        "--memory-gib", type=float, default=80.0, help="memory of one device (default: 80)"
    )
    command.add_argument("--cores-per-node", type=int, help="CPU cores that the run gets on a node")
    command.add_argument(
        "--clips", type=int, help="plan without the corpora: training clips of the main task"
    )
    command.add_argument(
        "--classes",
        type=int,
        default=FSD_CLASSES,
        help=f"with --clips: classes of the labelled tasks (default: {FSD_CLASSES})",
    )
    command.add_argument("--json", action="store_true", help="print the numbers for scripts")
    command.set_defaults(act=run_plan)


def run_plan(options: argparse.Namespace, overrides: list[str]) -> None:
    """Print the plan; end with exit code 1 where it would not do. Raises ConfigError for what is wrong."""
    for name in ("nodes", "per_node", "memory_gib", "clips", "classes"):
        value = getattr(options, name)
        if value is not None and value <= 0:
            word = "gpus-per-node" if name == "per_node" else name.replace("_", "-")
            raise ConfigError(f"--{word}: {value} is not allowed; use more than 0")
    config = load_config(overrides)
    experiment, rows = _experiment(config, options)
    case = _measured(config, options, experiment, rows[config.train.main_task])
    facts = figures(case, experiment, rows)
    problems = [division_problem(case)]
    problems += [memory_problem(case)] if "rounds" in facts else []
    cores, wanted = options.cores_per_node, facts["cores_per_node"]
    if cores is not None and cores < wanted:
        fewer = max(0, cores // options.per_node - 1)
        problems.append(
            f"cores: a node needs {wanted} and has {cores}; use --data.workers {fewer}"
            + (" and fewer processes a node" if cores < options.per_node else "")
        )
    problems = [problem for problem in problems if problem]
    if options.json:
        print(json.dumps(facts | {"problems": problems}, indent=2))
    else:
        print(table(facts, case))
        print("\n".join(["", *(f"does not do: {p}" for p in problems)] if problems else []))
    if problems:
        sys.exit(1)


def _experiment(config: Config, options) -> tuple[Experiment, dict[str, int]]:
    """Return the experiment and {task: training clips}, from the corpora or, with --clips, without them."""
    main, told = config.train.main_task, config.train.mixed_precision
    precision = options.precision or ("bf16" if told == "launcher" else told)
    if options.clips is not None:
        print(f"without the corpora: {main} has {options.clips} clips", file=sys.stderr)
        return without_corpora(config, options.classes, precision=precision), {main: options.clips}
    try:
        experiment = build_experiment(config, precision=precision)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. To plan without the corpora: --clips N, the training clips of {main}"
        ) from error
    return experiment, {name: experiment.clips(name) for name in experiment.tasks}


def _measured(config: Config, options, experiment: Experiment, main_clips: int) -> Case:
    blueprint = experiment.blueprint
    meter = Meter(blueprint.outline, experiment.tasks, blueprint.precision)
    return Case(
        config=config,
        nodes=options.nodes,
        per_node=options.per_node,
        engine=options.engine,
        precision=blueprint.precision,
        memory=round(options.memory_gib * 2**30),
        main_clips=main_clips,
        size=footprint.size_of(meter.model),
        activations=meter,
    ).resolved()
