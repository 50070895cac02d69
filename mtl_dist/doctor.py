"""`mtl-dist doctor`: is everything right on every node and between them, before a run is started there.

    mtl-dist doctor --config paper                           this machine alone
    srun mtl-dist doctor --config paper                      every task of a SLURM step, together
    accelerate launch --config_file F -m mtl_dist.cli doctor --config paper      the ranks of a launch file

Exits 1, on every rank, if something would break the run. Checks: health.py, interconnect.py. Tested by tests/test_doctor.py.
"""

import argparse
import contextlib
import os
import platform
import subprocess
import sys
import threading
from collections.abc import Iterator

from accelerate import Accelerator

from mtl_dist import activations, footprint, interconnect
from mtl_dist.config import load_config
from mtl_dist.health import FAIL, OK, WARN, Finding, existing_folder, machine_findings
from mtl_dist.planning import FSD_CLASSES, without_corpora
from mtl_dist.runtime import LaunchError, collect, leave, start
from mtl_dist.tables import format_rows

SEVERITY = (OK, WARN, FAIL)
FIRST_PORT, PORTS = 10_000, 10_000


def add_doctor(commands) -> None:
    """Declare `mtl-dist doctor`."""
    command = commands.add_parser(
        "doctor",
        allow_abbrev=False,
        help="check the nodes and what lies between them",
        description="Check versions, devices, cores, shared memory, data, run folder, and between ranks round-trip, "
        "bandwidth, clocks and a shared run folder. --config RECIPE and words such as --run.dir DIR are those of "
        "mtl_dist/train.py. Exits 1 on what would break the run.",
    )
    command.add_argument(
        "--gpus-per-node",
        "--processes-per-node",
        dest="per_node",
        type=int,
        help="ranks that this process stands for (default: those started here, or one a GPU)",
    )
    command.add_argument(
        "--timeout", type=float, default=300.0, help="seconds for the ranks to meet (default: 300)"
    )
    command.set_defaults(act=run_doctor)


def run_doctor(options: argparse.Namespace, overrides: list[str]) -> None:
    """Check, print one table on rank 0, and end with exit code 1 on every rank if anything FAILs."""
    config = load_config(overrides)
    experiment = without_corpora(config, FSD_CLASSES)
    of_slurm = join_slurm(os.environ)
    first_here = os.environ.get("LOCAL_RANK", "0") == "0"
    findings = []
    if first_here or of_slurm:  # a task of SLURM has cores of its own
        findings = machine_findings(config, experiment, options.per_node or ranks_here(of_slurm))
    where = f"rank {os.environ.get('RANK', '0')} on {platform.node()}"
    with deadline(f"{where}: the ranks have not met at {_address()}", options.timeout, findings):
        try:
            accelerator = start(config.train.mixed_precision)
        except (LaunchError, RuntimeError, OSError) as error:
            findings.append(Finding("world", str(error).splitlines()[0], FAIL, "see the README"))
            print(report([(where, finding) for finding in findings]))
            sys.exit(1)
    try:
        with deadline(f"{where}: a collective hangs", options.timeout, findings):
            if accelerator.num_processes > 1:
                findings += world_findings(accelerator, config, experiment)
            told = collect(accelerator, [(where, finding) for finding in findings])
        if accelerator.is_main_process:
            print(report(told))
    finally:
        leave(accelerator)
    if any(finding.verdict == FAIL for _, finding in told):
        sys.exit(1)


def world_findings(accelerator: Accelerator, config, experiment) -> list[Finding]:
    """Return what this rank finds together with the others."""
    with activations.pretended():
        elements = footprint.size_of(experiment.build_model()).elements
    hosts = collect(accelerator, [platform.node()])
    counts = {host: hosts.count(host) for host in hosts}
    shape = f"{len(hosts)} ranks on {len(counts)} hosts"
    even = len(set(counts.values())) == 1
    remedy = "" if even else f"start as many on each: {counts}"
    return [
        Finding("world", shape, OK if even else WARN, remedy),
        interconnect.same_versions(accelerator),
        interconnect.shared_folder(accelerator, existing_folder(config)),
        interconnect.clock_skew(accelerator),
        interconnect.round_trip(accelerator),
        interconnect.bandwidth(accelerator, elements),
    ]


def report(told: list[tuple[str, Finding]]) -> str:
    """Return a table with a row per check: of all that were told, the worst one, and how many are as bad."""
    rows = [("check", "worst on", "value", "verdict", "remedy")]
    for check in dict.fromkeys(finding.check for _, finding in told):
        of_check = [(where, f) for where, f in told if f.check == check]
        where, worst = max(of_check, key=lambda item: SEVERITY.index(item[1].verdict))
        alike = sum(finding.verdict == worst.verdict for _, finding in of_check)
        place = f"{where} and {alike - 1} more" if alike > 1 else where
        place = f"all {alike}" if worst.verdict == OK and alike > 1 else place
        rows.append((check, place, worst.value, worst.verdict, worst.remedy))
    return format_rows(rows)


@contextlib.contextmanager
def deadline(what: str, seconds: float, findings: list[Finding]) -> Iterator[None]:
    """End the process with a message, and what was found so far, if the block takes longer: it may hang in a C call."""

    def end() -> None:
        print(report([("here", finding) for finding in findings]), file=sys.stderr)
        print(f"error: {what} within {seconds:g} s", file=sys.stderr, flush=True)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def ranks_here(of_slurm: bool) -> int:
    """Return how many ranks a run has where this process is: those started here, or one for each of SLURM's GPUs."""
    if of_slurm:
        return 1
    gpus = os.environ.get("SLURM_GPUS_ON_NODE", "1")
    return int(os.environ.get("LOCAL_WORLD_SIZE", gpus if gpus.isdigit() else "1"))


def _address() -> str:
    return f"{os.environ.get('MASTER_ADDR', 'localhost')}:{os.environ.get('MASTER_PORT', '')}"


def join_slurm(environment) -> bool:
    """Let the tasks of an srun without a launcher find each other as a launcher would; return whether they have to."""
    tasks = int(environment.get("SLURM_STEP_NUM_TASKS", "1"))
    if "MASTER_ADDR" in environment or tasks == 1:
        return False
    nodes = environment["SLURM_STEP_NODELIST"]
    listed = subprocess.run(
        ["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True
    )
    step = int(environment["SLURM_JOB_ID"]) * 7 + int(environment.get("SLURM_STEP_ID", "0"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        LOCAL_RANK=environment["SLURM_LOCALID"],
        WORLD_SIZE=str(tasks),
        MASTER_ADDR=listed.stdout.split()[0],
        MASTER_PORT=str(FIRST_PORT + step % PORTS),
    )
    return True
