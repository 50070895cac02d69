"""`mtl-dist plan`: what a run on so many nodes takes and does, before anything is started.

    mtl-dist plan --config paper --nodes 2 --gpus-per-node 8 --clips 8526        without the corpora

The bytes come from footprint.py, whether they fit from feasibility.py. Tested by tests/test_planning.py.
"""

import argparse
import dataclasses
import json
import sys

from mtl_dist import footprint
from mtl_dist.config import Config, ConfigError, load_config
from mtl_dist.corpora import Corpus
from mtl_dist.corpora.base import make_corpus
from mtl_dist.experiment import Experiment, build_experiment
from mtl_dist.feasibility import (
    USABLE,
    Case,
    divides,
    division_problem,
    memory_problem,
    size_text,
)
from mtl_dist.footprint import ENGINES
from mtl_dist.tables import format_rows

FSD_CLASSES = 41


@dataclasses.dataclass(frozen=True)
class StandIn:
    """A corpus that is not there: one row that is never read, and the number of classes that a head needs."""

    classes: int

    def load(self, name: str, split_seed: int) -> Corpus:
        """Return a corpus of one clip."""
        row = {"id": f"{name}/0", "path": "none", "label": "0", "split": "train"}
        return make_corpus(name, [row], [str(i) for i in range(self.classes)])


def without_corpora(config: Config, classes: int) -> Experiment:
    """Return the experiment with its tasks and model, on corpora that hold nothing."""
    return build_experiment(
        dataclasses.replace(config, corpora=dict.fromkeys(config.corpora, StandIn(classes)))
    )


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
        "global_batch": train.global_batch,
        "clips": rows,
        "activation_bytes_per_clip": {n: a.per_clip for n, a in case.activations.items()},
        "checkpoint_bytes": checkpoint,
        "checkpoints_disk_bytes": (train.keep_checkpoints + 1) * checkpoint,
        "cores_per_node": case.per_node * (1 + workers),
    }
    if not divides(case):
        return facts
    plan, share = case.rounds(), train.global_batch // case.ranks
    round_bytes = footprint.round_bytes(experiment.tasks, share)
    needed = case.memory_needed()
    wire = footprint.wire_bytes(
        case.size, case.engine, case.precision, case.ranks, case.micro_steps()
    )
    return facts | {
        "micro_batch": plan.micro_batch,
        "accumulation": plan.accumulation,
        "micro_steps": case.micro_steps(),
        "rounds_per_epoch": plan.rounds_per_epoch,
        "rounds": plan.rounds,
        "share": share,
        "loader_worker_bytes": 8 * sum(rows.values()) + footprint.PREFETCHED_ROUNDS * round_bytes,
        "loaders_shared_memory_bytes": case.per_node
        * footprint.loader_shared_memory(round_bytes, workers),
        "memory": needed,
        "memory_bytes": sum(needed.values()),
        "wire": wire,
        "wire_bytes_per_rank": sum(wire.values()),
        "wire_bytes_leaving_node": sum(wire.values()) if case.nodes > 1 else 0,
    }


def table(facts: dict, case: Case) -> str:
    """Return a plan's numbers as aligned text."""
    train, workers = case.config.train, case.config.data.workers
    clips = ", ".join(f"{name} {count:,}" for name, count in facts["clips"].items())
    per_clip = max(facts["activation_bytes_per_clip"].values())
    rows = [
        ("what", "value", "how it comes about"),
        ("ranks", f"{case.ranks}", f"{case.nodes} nodes x {case.per_node} processes"),
        ("parameters", f"{facts['parameters']:,}", f"trained in precision {case.precision}"),
    ]
    if "rounds" in facts:
        rows += [
            (
                "micro-batch",
                str(facts["micro_batch"]),
                "clips of a task in one forward on one rank",
            ),
            (
                "accumulation",
                str(facts["accumulation"]),
                f"global_batch {train.global_batch} = {case.ranks} ranks x {facts['micro_batch']} x {facts['accumulation']}",
            ),
            (
                "micro-steps a round",
                str(facts["micro_steps"]),
                f"schedule {train.schedule}, {len(train.tasks)} tasks",
            ),
            (
                "rounds an epoch",
                f"{facts['rounds_per_epoch']:.1f}",
                f"{case.main_clips:,} clips of {train.main_task} / {train.global_batch}",
            ),
            ("rounds", f"{facts['rounds']:,}", "the whole run"),
        ]
    rows.append(("training clips", f"{sum(facts['clips'].values()):,}", clips))
    if "rounds" in facts:
        rows += _stream_rows(facts, case) + _memory_rows(facts, case)
    return format_rows(
        [
            *rows,
            (
                "activations of a clip",
                size_text(per_clip),
                "forward and backward followed here, the largest task's",
            ),
            (
                "cores a node",
                str(facts["cores_per_node"]),
                f"{case.per_node} ranks x (1 + {workers} workers)",
            ),
            (
                "a checkpoint",
                size_text(facts["checkpoint_bytes"]),
                "parameters and Adam's two moments in fp32",
            ),
            (
                "checkpoints on disk",
                size_text(facts["checkpoints_disk_bytes"]),
                f"the newest {train.keep_checkpoints} and the best",
            ),
        ]
    )


def _stream_rows(facts: dict, case: Case) -> list[tuple[str, str, str]]:
    workers, share, batch = case.config.data.workers, facts["share"], facts["global_batch"]
    turn = f"worker w takes every {workers}th round" if workers > 1 else "one process takes all"
    return [
        (
            "positions of a round",
            str(batch),
            f"round k: k x {batch} .. of each task's clips, shuffled anew every epoch",
        ),
        ("positions of a rank", str(share), f"rank r: the r-th {share} of them"),
        ("workers of a rank", str(workers), f"{turn}; {footprint.PREFETCHED_ROUNDS} rounds ahead"),
        (
            "memory of a worker",
            size_text(facts["loader_worker_bytes"]),
            "its clips' order (8 bytes a clip) and the rounds ahead, beside Python itself",
        ),
        (
            "shared memory a node",
            size_text(facts["loaders_shared_memory_bytes"]),
            "/dev/shm: rounds ahead of all loaders",
        ),
    ]


def _memory_rows(facts: dict, case: Case) -> list[tuple[str, str, str]]:
    shards, many = ENGINES[case.engine].shards, facts["micro_steps"] > 1 and case.ranks > 1
    how = {
        what: f"1/{case.ranks} of them" if what in shards else "whole on every rank"
        for what in ("parameters", "gradients", "optimizer")
    } | {
        "gathered": "parameters that are whole for the moment",
        "activations": f"forward and backward of {facts['micro_batch']} clips, followed on one",
    }
    if "gradients" in shards and many:
        how["gradients"] = (
            f"whole until they are reduced, once in {facts['micro_steps']} micro-steps"
        )
    rows = [
        (f"memory: {n}", size_text(count), how[n]) for n, count in facts["memory"].items() if count
    ]
    leaves = (
        "and as much leaves a node: one rank of it sends to the next node"
        if case.nodes > 1
        else "all within the node"
    )
    sent = [f"{n} {size_text(count)}" for n, count in facts["wire"].items()]
    return [
        *rows,
        (
            "memory: a rank",
            size_text(facts["memory_bytes"]),
            f"of {size_text(case.memory)}, {USABLE:.0%} of which may be used",
        ),
        (
            "wire: a rank and round",
            size_text(facts["wire_bytes_per_rank"]),
            f"{', '.join(sent)}; {leaves}",
        ),
    ]


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
    main = config.train.main_task
    if options.clips is not None:
        print(f"without the corpora: {main} has {options.clips} clips", file=sys.stderr)
        return without_corpora(config, options.classes), {main: options.clips}
    try:
        experiment = build_experiment(config)
    except ConfigError as error:
        raise ConfigError(
            f"{error}. To plan without the corpora: --clips N, the training clips of {main}"
        ) from error
    return experiment, {name: len(experiment.table(name)) for name in experiment.tasks}


def _measured(config: Config, options, experiment: Experiment, main_clips: int) -> Case:
    told = config.train.mixed_precision
    precision = options.precision or ("bf16" if told == "launcher" else told)
    with footprint.pretended():
        model = experiment.build_model()
        size = footprint.size_of(model)
        activations = {
            name: footprint.measure_activations(model, task, precision)
            for name, task in experiment.tasks.items()
        }
    return Case(
        config=config,
        nodes=options.nodes,
        per_node=options.per_node,
        engine=options.engine,
        precision=precision,
        memory=round(options.memory_gib * 2**30),
        main_clips=main_clips,
        size=size,
        activations=activations,
    )
