"""Whether a run fits a machine: does the batch divide over the ranks, does a rank's memory do, and if not, what would.

Tested by tests/test_planning.py and tests/test_auto_micro_batch.py.
"""

import bisect
import dataclasses
import math

from mtl_dist import footprint
from mtl_dist.activations import Meter
from mtl_dist.config import Config, ConfigError
from mtl_dist.experiment import Plan, plan_rounds
from mtl_dist.footprint import ENGINES, ModelSize

USABLE = 0.9
"""Share of a device's memory that a plan may fill: the rest is for the CUDA context, NCCL and what the allocator loses."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """A run on a machine that may or may not do: what a plan is made of."""

    config: Config
    nodes: int
    per_node: int
    engine: str
    precision: str
    memory: int
    """Bytes of one device."""
    main_clips: int
    size: ModelSize
    activations: Meter

    @property
    def ranks(self) -> int:
        """Processes in all."""
        return self.nodes * self.per_node

    def changed(self, **train: object) -> "Case":
        """Return the case with other fields of section train."""
        train_config = dataclasses.replace(self.config.train, **train)
        return dataclasses.replace(
            self, config=dataclasses.replace(self.config, train=train_config)
        )

    def rounds(self) -> Plan:
        """Return the arithmetic. Raises ConfigError where it does not come out whole."""
        return plan_rounds(self.config, self.main_clips, self.ranks)

    def micro_steps(self) -> int:
        """Return the forwards and backwards of a round on a rank."""
        each = 1 if self.config.train.schedule == "joint" else len(self.config.train.tasks)
        return each * self.rounds().accumulation

    def state_needed(self) -> dict[str, int]:
        """Return {what: bytes} of a rank's device beside activations."""
        steps = self.micro_steps()
        return footprint.state_bytes(self.size, self.engine, self.precision, self.ranks, steps)

    def activations_needed(self) -> float:
        """Return the bytes that a micro-step's forward and backward hold."""
        return self.activations.micro_step(self.config.train.schedule, self.rounds().micro_batch)

    def memory_needed(self) -> dict[str, float]:
        """Return {what: bytes} of a rank's device."""
        return self.state_needed() | {"activations": self.activations_needed()}

    def memory_total(self) -> float:
        """Return the most bytes of a rank's device: in training, or in evaluation, with a copy instead of gradients."""
        return max(self.evaluation_total(), sum(self.memory_needed().values()))

    def evaluation_total(self) -> int:
        """Return the bytes that parameters, optimizer and, where an engine needs one, a copy of the model take."""
        state, copy = self.state_needed(), footprint.evaluation_bytes(self.size, self.engine)
        return state["parameters"] + state["optimizer"] + copy

    def budget(self) -> float:
        """Return memory.budget_gb in bytes; inf where it is not set."""
        limit = self.config.memory.budget_gb
        return math.inf if limit is None else 1e9 * limit

    def room(self) -> float:
        """Return the bytes that activations may take: what the state leaves of the device, or less by memory.budget_gb."""
        return min(USABLE * self.memory - sum(self.state_needed().values()), self.budget())

    def fits(self) -> bool:
        """Whether a rank's device can hold it, and memory.budget_gb allows it."""
        evaluates = self.evaluation_total() <= USABLE * self.memory
        return evaluates and self.room() > 0 and self.activations_needed() <= self.room()

    def with_smaller_batches(self) -> "Case | None":
        """Return the case with the largest micro-batch that divides and fits, up to its own, if there is one."""
        share, most = self.config.train.global_batch // self.ranks, self.rounds().micro_batch
        cases = [self.changed(micro_batch=m) for m in range(1, most + 1) if share % m == 0]
        if cases[-1].fits():  # as a rule, and then nothing else is measured
            return cases[-1]
        fitting = bisect.bisect_left(cases, True, key=lambda case: not case.fits())
        return cases[fitting - 1] if fitting else None

    def resolved(self) -> "Case":
        """Return the case with the micro-batch that auto would find, 1 where none fits; all others as they are."""
        if self.config.train.micro_batch != "auto" or not divides(self):
            return self
        return self.with_smaller_batches() or self.changed(micro_batch=1)


def division_problem(case: Case) -> str | None:
    """Return what does not divide, and the nearest numbers of nodes that do."""
    try:
        case.rounds()
    except ConfigError as error:
        most = max(case.nodes, case.config.train.global_batch // case.per_node)
        fit = [n for n in range(1, most + 1) if divides(dataclasses.replace(case, nodes=n))]
        near = [*[n for n in fit if n < case.nodes][-1:], *[n for n in fit if n > case.nodes][:1]]
        what = f"nodes of {case.per_node} processes"
        other = f"or {' or '.join(map(str, near))} {what}" if near else f"no number of {what} does"
        return f"{error}; {other}"
    return None


def divides(case: Case) -> bool:
    """Whether ranks, micro-batch and accumulation give global_batch."""
    try:
        case.rounds()
    except ConfigError:
        return False
    return True


def memory_problem(case: Case) -> str | None:
    """Return why a rank's memory does not do, and what would."""
    if case.fits():
        return None
    schedules = dict.fromkeys([case.config.train.schedule, "round_robin"])
    engines = dict.fromkeys([case.engine, *ENGINES])
    tried = (
        dataclasses.replace(case, engine=engine).changed(schedule=schedule).with_smaller_batches()
        for engine in engines
        for schedule in schedules
    )
    better = next((other for other in tried if other is not None), None)
    need, have = case.memory_total(), case.memory
    usable = f"{USABLE:.0%} of which may be used"
    problem = (
        f"memory: a rank needs {size_text(need)}, and its device has {size_text(have)}, {usable}"
    )
    held, budget = case.activations_needed(), case.budget()
    if held > budget:
        problem = (
            f"memory: forward and backward of a rank need {size_text(held)}, and memory.budget_gb allows "
            f"{size_text(budget)}"
        )
    if better is None:
        return (
            f"{problem}; no engine with a train.micro_batch of 1 fits either: use devices with more memory, more ranks for "
            "fsdp2 or zero3, memory.slice_seconds, shorter clips (data.crop_seconds, or longest_seconds of whole ones) or a "
            "smaller model"
        )
    return f"{problem}; use {_how(case, better)} ({size_text(better.memory_total())})"


def _how(case: Case, better: Case) -> str:
    """Say what is different in a case that fits."""
    words = [f"--engine {better.engine}"] if better.engine != case.engine else []
    if better.config.train.schedule != case.config.train.schedule:
        words.append(f"--train.schedule {better.config.train.schedule}")
    old, new = case.rounds(), better.rounds()
    if new.micro_batch != old.micro_batch:
        words.append(
            f"--train.micro_batch {new.micro_batch} with accumulation {new.accumulation}, the same global_batch"
        )
    return " and ".join(words)


def size_text(count: float) -> str:
    """Return bytes for people: 1.25 GiB."""
    for unit in ("bytes", "KiB", "MiB"):
        if count < 999.5:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 999.5 else f"{count:,.0f} GiB"
