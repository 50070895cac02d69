"""What must be right between the ranks of a run: round-trip, bandwidth, clocks, versions, one shared run folder.

Every rank calls these functions together. Tested by tests/test_doctor.py.
"""

import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator

from mtl_dist.feasibility import size_text
from mtl_dist.health import FAIL, OK, WARN, Finding
from mtl_dist.run_folder import versions
from mtl_dist.runtime import collect, sum_over_ranks, world_of

ROUND_TRIPS = 30
SLOW_ROUND_TRIP = 0.05
SLOW_REDUCE = 1.0
SKEW_WARN, SKEW_FAIL = 1.0, 60.0
"""Seconds. A run itself reads no other node's clock; logs, time limits and SLURM's own authentication do."""
VISIBLE_WITHIN = 15.0
"""Seconds in which a file that rank 0 wrote must be there for all: network file systems cache what is not there."""


def round_trip(accelerator: Accelerator) -> Finding:
    """Time the small sum that every round makes twice."""
    small, seconds = torch.zeros(8, dtype=torch.float64), []
    for _ in range(ROUND_TRIPS + 3):
        began = time.perf_counter()
        sum_over_ranks(accelerator, small)
        seconds.append(time.perf_counter() - began)
    median, worst = statistics.median(seconds[3:]), max(seconds[3:])
    value = f"median {1e3 * median:.2f} ms, worst {1e3 * worst:.2f} ms"
    if median > SLOW_ROUND_TRIP:
        return Finding("round-trip", value, WARN, "is it the cluster's fast network?")
    return Finding("round-trip", value)


def bandwidth(accelerator: Accelerator, elements: int) -> Finding:
    """Time all-reduces of a gradient's size: bus bandwidth 2 (n - 1)/n bytes / time (NCCL tests, PERFORMANCE.md)."""
    gradient = torch.zeros(elements, device=accelerator.device)
    seconds = []
    for _ in range(4):
        sum_over_ranks(accelerator, torch.zeros(1))  # all begin together
        began = time.perf_counter()
        torch.distributed.all_reduce(gradient)
        float(gradient[0])  # waits for the device
        seconds.append(time.perf_counter() - began)
    ranks, best = accelerator.num_processes, min(seconds[1:])
    bus = 2 * (ranks - 1) / ranks * gradient.nbytes / best
    value = f"{size_text(gradient.nbytes)} in {1e3 * best:.1f} ms: {bus / 1e9:.2f} GB/s"
    if best > SLOW_REDUCE:
        return Finding("bandwidth", value, WARN, "the gradient alone takes so long every round")
    return Finding("bandwidth", value)


def clock_offsets(accelerator: Accelerator, clock: Callable[[], float]) -> list[float]:
    """Return how many seconds each rank's clock is ahead of rank 0's.

    NTP's formula ((t1 - t0) + (t2 - t3)) / 2 with t1 = t2: rank 0 reads t0, all meet, each rank reads its own clock, the
    readings are summed into place, and rank 0 reads t3. The exchange with the shortest t3 - t0 counts, and is off by at most
    half of that. All ranks at once, so that it takes no longer for many.
    """
    rank, size = accelerator.process_index, accelerator.num_processes
    best, offsets = float("inf"), [0.0] * size
    for _ in range(10):
        before = clock()
        sum_over_ranks(accelerator, torch.zeros(1, dtype=torch.float64))
        own = torch.zeros(size, dtype=torch.float64)
        own[rank] = clock()
        readings = sum_over_ranks(accelerator, own).tolist()
        after = clock()
        if after - before < best:
            best = after - before
            offsets = [reading - (before + after) / 2 for reading in readings]
    return collect(accelerator, [offsets])[0]  # rank 0's view


def clock_skew(accelerator: Accelerator, clock: Callable[[], float] = time.time) -> Finding:
    """Compare this rank's clock with rank 0's."""
    offset = clock_offsets(accelerator, clock)[accelerator.process_index]
    verdict = FAIL if abs(offset) >= SKEW_FAIL else WARN if abs(offset) >= SKEW_WARN else OK
    value = f"{offset:+.3f} s against rank 0" if verdict != OK else "below 1 s against rank 0"
    return Finding("clock", value, verdict, "set it by NTP (chrony)" if verdict != OK else "")


def same_versions(accelerator: Accelerator) -> Finding:
    """Compare this rank's packages with rank 0's."""
    own = versions()
    first = collect(accelerator, [own])[0]
    other = [f"{n} {own[n]}, not {first[n]}" for n in own if own[n] != first[n]]
    if other:
        remedy = "use one environment on all nodes"
        return Finding("equal versions", "; ".join(other), FAIL, remedy)
    return Finding("equal versions", f"{len(own)} packages as on rank 0")


def shared_folder(accelerator: Accelerator, folder: Path) -> Finding:
    """Let rank 0 write a file beside the run and look whether this rank can read it."""
    world = world_of(accelerator)
    token = f"{time.time_ns():x}" if world.rank == 0 else ""
    token, place = collect(accelerator, [(token, str(folder))])[0]
    path, problem = Path(place) / f".doctor-{token}", []
    try:
        if world.rank == 0:
            path.write_text(token, encoding="utf-8")
    except OSError as error:
        problem = [f"{path}: {error.strerror}"]
    problem = collect(accelerator, problem)  # none looks before rank 0 has written
    until = time.monotonic() + (0.0 if problem else VISIBLE_WITHIN)
    while not (seen := path.is_file() and path.read_text(encoding="utf-8") == token):
        if time.monotonic() > until:
            break
        time.sleep(0.2)
    collect(accelerator, [seen])
    if world.rank == 0:
        path.unlink(missing_ok=True)
    if not seen:
        value = problem[0] if problem else f"{place} is not the folder that rank 0 sees"
        return Finding("shared run folder", value, FAIL, "put run.dir on a disk of all nodes")
    return Finding("shared run folder", f"{place} is seen by all")
