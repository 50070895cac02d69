"""How many bytes a rank's device has for tensors now. Tested by tests/test_auto_micro_batch.py."""

import resource
from collections.abc import Iterator
from pathlib import Path

import psutil
import torch

HEAP = 2.0
"""glibc's heap grows to so many times what lives in it: it keeps the gaps between tensors of less than 32 MiB (measured: 2.0
after ten rounds; 1.0 with larger ones, which it maps one by one)."""
CGROUPS = (
    ("memory", "sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ("", "sys/fs/cgroup", "memory.max", "memory.current", ""),
)
"""(controller, where they are mounted, limit, use, beginning of names in memory.stat) of control groups 1 and 2."""


def bytes_for_tensors(device: torch.device, ranks_of_node: int) -> int:
    """Return what this process may fill: of a GPU what others have not taken; of a CPU's memory the rank's share.

    On a CPU that is what the machine has available, or less by a limit of its control group (containers, SLURM),
    divided by the ranks; or less by a limit of the process (ulimit -v). All divided by HEAP.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    of_node = min([psutil.virtual_memory().available, *left_in_control_groups()])
    own, _ = resource.getrlimit(resource.RLIMIT_AS)
    limits = [of_node / ranks_of_node]
    if own != resource.RLIM_INFINITY:
        limits.append(own - psutil.Process().memory_info().vms)
    return max(0, int(min(limits) / HEAP))


def left_in_control_groups(root: Path = Path("/")) -> Iterator[int]:
    """Yield the bytes that each limit of this process' control groups and of those around them leaves free.

    Pages of files that are not in use count as free: they give way.
    """
    groups = root / "proc/self/cgroup"
    lines = groups.read_text().splitlines() if groups.exists() else []
    for _, controllers, path in (line.split(":", 2) for line in lines):
        for controller, mount, limit, use, total in CGROUPS:
            if controller not in controllers.split(","):
                continue
            group = Path(path.lstrip("/"))
            for folder in (root / mount / part for part in (group, *group.parents)):
                if not (folder / limit).exists():
                    continue  # the root of version 2, or a group that a container does not see
                most = (folder / limit).read_text().strip()
                if most != "max":
                    stat = dict(map(str.split, (folder / "memory.stat").read_text().splitlines()))
                    used = int((folder / use).read_text()) - int(stat[f"{total}inactive_file"])
                    yield int(most) - used
