"""The numbers of a plan (planning.py) as aligned text. Tested by tests/test_planning.py."""

from mtl_dist.data.workers import PARTS_AHEAD
from mtl_dist.feasibility import USABLE, Case, size_text
from mtl_dist.footprint import ENGINES
from mtl_dist.tables import format_rows


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
                "clips of a task in one forward on one rank"
                + "; auto: the most that fit" * (facts["micro_batch_asked"] == "auto"),
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
    if longest := facts["longest_seconds"]:
        text = f"whole clips of {', '.join(longest)}; memory is worked out as if all were so long"
        rows.append(("longest clip", f"{max(longest.values()):g} s", text))
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
    workers, batch = case.config.data.workers, facts["global_batch"]
    lanes = facts["lanes"]
    turn = f"each reads 1/{workers} of the rank's lanes" if workers else "none"
    return [
        (
            "lanes of a stream",
            str(facts["lanes"]),
            f"{batch // facts['lanes']} of a round's {batch} clips each; rank r owns the r-th {lanes // case.ranks}",
        ),
        (
            "blocks held by a rank",
            size_text(facts["lane_bytes"]),
            "a row group a lane, by the first of each source; data.lanes makes it less",
        ),
        (
            "longest patience",
            f"{facts['patience_seconds']:g} s",
            "a read that takes longer, with all its retries, ends the run (section remote)",
        ),
        ("workers of a rank", str(workers), f"{turn}; {PARTS_AHEAD} rounds ahead"),
        (
            "memory of a worker",
            size_text(facts["loader_worker_bytes"]),
            "its share of the blocks and the rounds ahead, beside Python itself",
        ),
        (
            "shared memory a node",
            size_text(facts["loaders_shared_memory_bytes"]),
            "/dev/shm: rounds ahead of all loaders",
        ),
    ]


def _memory_rows(facts: dict, case: Case) -> list[tuple[str, str, str]]:
    shards = ENGINES[case.engine].shards
    how = {
        what: f"1/{case.ranks} of them" if what in shards else "whole on every rank"
        for what in ("parameters", "optimizer")
    } | {
        "gradients": "buckets included; whole until they are reduced, once a round",
        "gathered": "parameters that are whole for the moment",
        "activations": f"forward and backward of {facts['micro_batch']} clips by kernel {facts['kernel']}, followed here",
    }
    if case.engine == "fsdp2" and facts["micro_steps"] == 1:
        how["gradients"] = f"1/{case.ranks} of them"
    rows = [
        (f"memory: {n}", size_text(count), how[n]) for n, count in facts["memory"].items() if count
    ]
    leaves = (
        "and as much leaves a node: one rank of it sends to the next node"
        if case.nodes > 1
        else "all within the node"
    )
    sent = [f"{n} {size_text(count)}" for n, count in facts["wire"].items()]
    if facts["evaluation_bytes"]:
        text = "whole parameters on every rank while it is evaluated, when gradients are not there"
        rows.append(("memory: evaluation", size_text(facts["evaluation_bytes"]), text))
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
