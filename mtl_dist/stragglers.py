"""Which rank is slow, and at what: every rank's seconds by phase, in a file a rank and, compared, on rank 0.

    RUN/ranks/rank_00003.jsonl    {"round": 120, "host": "node7", "time/data": 0.02, ...}    seconds a round

Written every train.log_every rounds, if there is more than one rank. Tested by tests/test_stragglers.py.
"""

import json
import platform

import torch
from accelerate import Accelerator

from mtl_dist.monitor import memory, not_worth_a_run
from mtl_dist.phases import Phases
from mtl_dist.run_folder import RunFolder
from mtl_dist.runtime import sum_over_ranks

MEASURED = ("data", "forward/backward", "collective", "optimizer")
OWN_WORK = ("data", "forward/backward")
"""What a rank does without the others; the optimizer is left out, as sharding engines wait for one another in it."""


def key(phase: str) -> str:
    """Return a phase's name in metrics.jsonl and TensorBoard."""
    return f"time/{phase.replace('/', '_')}"


class Stragglers:
    """Adds up this rank's phases of the rounds after `first_round`, and compares all ranks'."""

    def __init__(
        self, accelerator: Accelerator, phases: Phases, folder: RunFolder, first_round: int
    ):
        self.accelerator, self.phases, self.last = accelerator, phases, first_round
        self.path = folder.rank_file(accelerator.process_index)

    def compare(self, number: int) -> dict[str, float]:
        """Return seconds a round since the last call, after round `number`; all ranks call it and get the same.

        time/PHASE is the mean over ranks; slowest and fastest are judged by OWN_WORK.
        """
        taken, rounds = self.phases.take(), number - self.last
        self.last = number
        own = [taken.get(phase, 0.0) / rounds for phase in MEASURED]
        if self.accelerator.num_processes > 1:
            self._write(number, own)
        self.phases.enter("collective")
        table = torch.zeros(self.accelerator.num_processes, len(MEASURED), dtype=torch.float64)
        table[self.accelerator.process_index] = torch.tensor(own)
        table = sum_over_ranks(self.accelerator, table)
        self.phases.enter("reporting")
        times = {key(p): mean for p, mean in zip(MEASURED, table.mean(0).tolist(), strict=True)}
        if len(table) > 1:
            work = sum(table[:, MEASURED.index(phase)] for phase in OWN_WORK)
            for name, rank in (("slowest", int(work.argmax())), ("fastest", int(work.argmin()))):
                times[f"time/{name}_rank"] = rank
                times[f"time/{name}_rank_seconds"] = float(work[rank])
        return times

    def _write(self, number: int, own: list[float]) -> None:
        line = {"round": number, "host": platform.node()}
        line |= dict(zip(map(key, MEASURED), own, strict=True)) | memory()
        with not_worth_a_run(str(self.path)):
            self.path.parent.mkdir(exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
