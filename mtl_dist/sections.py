"""The typed sections of the configuration that are not of a task or a corpus. config.py puts all of them together."""

import dataclasses
import math
from typing import Literal


def check(name: str, value: object, allowed: bool, what: str) -> None:
    """Raise ValueError naming field, value and what is allowed."""
    if not allowed:
        raise ValueError(f"{name}: {value!r} is not allowed; use {what}")


@dataclasses.dataclass(kw_only=True)
class RunConfig:
    """The run as a whole."""

    dir: str | None = None
    """Run folder for configuration, logs, checkpoints and results; null for runs/<date>-<time>."""
    seed: int = 0
    """Seed of the model's initial values and of every draw of the streams."""
    resume: str = "no"
    """no: start afresh in a new or empty folder. auto: go on from the newest whole checkpoint in run.dir, if any."""
    timeout_seconds: float = 600.0
    """Ranks that wait longer than this for another end the run; a rank that hangs is named after half of it."""
    plugins: list[str] = dataclasses.field(default_factory=list)
    """Python files of your own that register tasks or corpora; imported before anything else is read."""

    def __post_init__(self):
        check("resume", self.resume, self.resume in ("no", "auto"), "no or auto")
        new = self.resume == "auto" and self.dir is None
        check("resume", self.resume, not new, "it together with run.dir, the folder to go on in")
        check("timeout_seconds", self.timeout_seconds, self.timeout_seconds >= 1, "1 or more")
        check("seed", self.seed, 0 <= self.seed < 2**63, "0 or more, below 2**63")


@dataclasses.dataclass(kw_only=True)
class ModelConfig:
    """The WaveNet trunk (paper section 3.2, Table 3)."""

    blocks: int = 3
    """Number of blocks N."""
    layers: int = 6
    """Residual layers a block S; dilation 1, 2, 4, ... restarts in each block."""
    channels: int = 64
    """Units of every layer."""
    residual_projection: bool = False
    """A 1x1 convolution in the residual path, as in the original WaveNet; the paper's formula has none."""
    skip_outputs: bool = False
    """Heads see the sum of all layers' outputs, as in the original WaveNet, instead of the last layer's."""
    input_gain: float = 1.0
    """Factor on the first convolution's initial weights; above 1, quiet input reaches the curved part of the gates."""
    initial: str | None = None
    """Run or checkpoint folder whose weights the trunk starts from, and the heads that fit; null for new ones. Of a run it
    is the best checkpoint."""
    kernel: Literal["auto", "eager", "compile", "cpu", "triton"] = "auto"
    """What computes the trunk's layers: eager is the reference; auto: cpu on a CPU, on a GPU triton or else eager."""

    def __post_init__(self):
        for name in ("blocks", "layers", "channels"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        check("layers", self.layers, self.layers <= 30, "30 or fewer")
        check("input_gain", self.input_gain, 0 < self.input_gain < math.inf, "more than 0")


@dataclasses.dataclass(kw_only=True)
class MemoryConfig:
    """What forward and backward may hold in memory. The gradient is the same for all values, but for storage: bf16."""

    budget_gb: float | None = None
    """GB (10^9 bytes) that a rank's forward and backward may take beside model and audio; null for no limit."""
    slice_seconds: float | Literal["auto"] | None = None
    """Train in slices of time that hold so much audio at once; null: all of a micro-batch. auto: what fits budget_gb. Not
    with fp16, whose loss scale comes after a slice's gradient."""
    recompute: Literal["auto", "none", "layer", "block"] = "auto"
    """Compute again in the backward what a layer or a block has made, and do not keep it. auto: layer with a budget_gb."""
    storage: Literal["full", "bf16"] = "full"
    """What is kept for the backward is kept in the precision of the forward, or rounded to bf16: half, and not exact."""

    def __post_init__(self):
        number = isinstance(self.slice_seconds, (int, float))
        allowed = not number or 0 < self.slice_seconds < math.inf
        check("slice_seconds", self.slice_seconds, allowed, "more than 0, auto or null")
        budget = self.budget_gb
        check("budget_gb", budget, budget is None or 0 < budget < math.inf, "more than 0, or null")


@dataclasses.dataclass(kw_only=True)
class DataConfig:
    """How audio is read."""

    sample_rate: int = 16_000
    """Rate in Hz that everything is resampled to."""
    crop_seconds: float = 2.0
    """Length of the random crops (paper section 4.2); shorter clips are zero-padded."""
    silence_db: float = -60.0
    """Leading and trailing 20 ms frames below so many dBFS are cut off before cropping."""
    normalise: Literal["peak", "none"] = "peak"
    """peak: scale each crop by its largest magnitude. none: leave the level as it is."""
    lanes: int | None = None
    """Blocks of a stream that are read side by side; null for one for each clip of a step, train.global_batch. Fewer hold
    less in memory: a lane holds a row group, 22 MB of LibriSpeech on the Hub, and then gives several clips a step."""
    workers: int = 2
    """Processes per rank that prepare rounds ahead; 0 to do it in the training process."""
    split_seed: int = 0
    """Seed of what is held out and of the utterances that `hours` takes: the same for runs of different run.seed."""
    max_bad_share: float = 0.05
    """Bad files are skipped and named; the run stops when more than this share of the clips read was bad."""

    def __post_init__(self):
        check("sample_rate", self.sample_rate, self.sample_rate >= 1000, "1000 Hz or more")
        fits = 1 <= self.crop_seconds * self.sample_rate < math.inf
        check("crop_seconds", self.crop_seconds, fits, "1 / sample_rate or more")
        check("silence_db", self.silence_db, not math.isnan(self.silence_db), "a level in dBFS")
        check("lanes", self.lanes, self.lanes is None or self.lanes >= 1, "1 or more, or null")
        check("workers", self.workers, self.workers >= 0, "0 or more")
        check("max_bad_share", self.max_bad_share, 0 <= self.max_bad_share <= 1, "0 to 1")


@dataclasses.dataclass(kw_only=True)
class TrainConfig:
    """The loop."""

    tasks: list[str] = dataclasses.field(default_factory=lambda: ["audio_tagging"])
    """Tasks to train, by the names of section `tasks`."""
    main_task: str = "audio_tagging"
    """The task whose training clips make an epoch and whose validation metric chooses the best checkpoint."""
    epochs: float = 100.0
    """Length of the run in passes over the main task's training clips (not stated in the paper)."""
    rounds: int | None = None
    """Length of the run in rounds (optimizer steps), instead of epochs."""
    global_batch: int = 48
    """Clips of every task in a round, over all ranks (paper section 4.2)."""
    micro_batch: int | Literal["auto"] | None = None
    """Clips of a task in one forward on one rank; null for global_batch / ranks. auto: the most that fit, found by measuring
    at the start, within memory.budget_gb if that is set. The rest is accumulated; the gradient is the same."""
    schedule: Literal["round_robin", "joint"] = "round_robin"
    """round_robin: a forward and backward per task, memory of one. joint: all tasks in one. The gradient is equal."""
    mixed_precision: Literal["launcher", "no", "bf16", "fp16"] = "launcher"
    """Precision of forward and backward; launcher: what accelerate launch --mixed_precision says."""
    validate_every: int | None = None
    """Rounds between validations; null for once an epoch."""
    checkpoint_every: int | None = None
    """Rounds between checkpoints; null for after every validation."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, besides the best."""
    patience: int | None = None
    """Stop after so many validations in a row without a better main metric; null to go to the end."""
    log_every: int = 10
    """Rounds between entries in metrics.jsonl and TensorBoard."""
    max_nonfinite: int = 5
    """Rounds with a NaN or infinite loss are skipped by all ranks together; stop after so many in a row."""
    stop_after_rounds: int | None = None
    """Save and stop after so many rounds of this session; go on later with --run.resume auto."""

    def __post_init__(self):
        for name in ("global_batch", "keep_checkpoints", "log_every", "max_nonfinite"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "1 or more")
        for name in (
            "rounds",
            "validate_every",
            "checkpoint_every",
            "patience",
            "stop_after_rounds",
        ):
            value = getattr(self, name)
            check(name, value, value is None or value >= 1, "1 or more, or null")
        micro = self.micro_batch
        allowed = micro in (None, "auto") or micro >= 1
        check("micro_batch", micro, allowed, "1 or more, auto, or null")
        check("epochs", self.epochs, 0 < self.epochs < math.inf, "more than 0")
        check("tasks", self.tasks, bool(self.tasks), "at least one task")
        check("tasks", self.tasks, len(set(self.tasks)) == len(self.tasks), "each task once")


@dataclasses.dataclass(kw_only=True)
class OptimConfig:
    """Adam and the trunk's learning rate (paper section 4.2, Table 3); the heads' stand in section `tasks`."""

    learning_rate: float = 3e-4
    """Adam's learning rate for the trunk."""
    schedule: Literal["decay", "cosine"] = "decay"
    """Of all learning rates. decay: multiplied by decay_factor every decay_epochs, as in the paper. cosine: to 0 along half
    a cosine over the whole run, whose length must not change then."""
    decay_factor: float = 0.95
    """The trunk's learning rate is multiplied by this ..."""
    decay_epochs: int = 5
    """... every so many epochs."""
    trunk_factor: float = 1.0
    """Factor on the trunk's learning rate in the first trunk_epochs epochs: 0 leaves it as model.initial has it, say."""
    trunk_epochs: int = 0
    """See trunk_factor."""
    beta1: float = 0.9
    """Adam's decay of the gradient's mean."""
    beta2: float = 0.99
    """Adam's decay of the gradient's mean square."""
    eps: float = 1e-8
    """Adam's epsilon."""
    clip_norm: float | None = None
    """Clip the gradient's global norm to this; null for no clipping, as in the paper."""

    def __post_init__(self):
        check("learning_rate", self.learning_rate, 0 <= self.learning_rate < 1e37, "0 or more")
        check("decay_factor", self.decay_factor, 0 <= self.decay_factor < math.inf, "0 or more")
        check("eps", self.eps, 0 <= self.eps < math.inf, "0 or more")
        check("decay_epochs", self.decay_epochs, self.decay_epochs >= 1, "1 or more")
        check("trunk_factor", self.trunk_factor, 0 <= self.trunk_factor < math.inf, "0 or more")
        check("trunk_epochs", self.trunk_epochs, self.trunk_epochs >= 0, "0 or more")
        for name in ("beta1", "beta2"):
            check(name, getattr(self, name), 0 <= getattr(self, name) < 1, "0 to below 1")
        check(
            "clip_norm",
            self.clip_norm,
            self.clip_norm is None or self.clip_norm > 0,
            "more than 0, or null",
        )


@dataclasses.dataclass(kw_only=True)
class EvaluationConfig:
    """Validation and test."""

    max_clips: int | None = None
    """Evaluate at most so many clips of a task and split, always the same; null for all."""
    crops: int = 1
    """Crops of each clip that a self-supervised task is scored on, always the same; more of them, less chance."""
    checkpoint: Literal["best", "last"] = "best"
    """Which checkpoint the results are of: the one with the best validation of the main task, or the last."""
    examples: int = 2
    """Validation clips of each task that go to TensorBoard as sound and picture."""

    def __post_init__(self):
        check(
            "max_clips",
            self.max_clips,
            self.max_clips is None or self.max_clips >= 1,
            "1 or more, or null",
        )
        check("crops", self.crops, self.crops >= 1, "1 or more")
        check("examples", self.examples, self.examples >= 0, "0 or more")
