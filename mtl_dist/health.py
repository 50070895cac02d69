"""What must be right on one machine before a run: versions, devices, cores, memory of the loaders, data, run folder.

Every check returns a Finding and touches nothing but a file of its own. Tested by tests/test_doctor.py.
"""

import dataclasses
import importlib.metadata
import os
import platform
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mtl_dist import activations, footprint
from mtl_dist.audio.clips import ClipReader
from mtl_dist.audio.reading import BadClipError, FarFileError
from mtl_dist.config import Config
from mtl_dist.data.faults import DataError
from mtl_dist.data.keys import generator
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.experiment import Experiment, open_corpus
from mtl_dist.feasibility import size_text

OK, WARN, FAIL = "ok", "warn", "FAIL"
SHARED_MEMORY = Path("/dev/shm")
TENSORS_OF_A_BATCH = 3


@dataclasses.dataclass(frozen=True)
class Finding:
    """One check's result; `remedy` says what to do where the verdict is not ok."""

    check: str
    value: str
    verdict: str = OK
    remedy: str = ""


def machine_findings(config: Config, experiment: Experiment, ranks: int) -> list[Finding]:
    """Return every finding about this machine, on which `ranks` processes are to run."""
    share = max(1, config.train.global_batch // int(os.environ.get("WORLD_SIZE", ranks)))
    round_bytes = footprint.round_bytes(experiment.tasks, share)
    with activations.pretended():
        size = footprint.size_of(experiment.build_model())
    return [
        versions(),
        devices(config, ranks),
        cores(ranks * (1 + config.data.workers), ranks),
        shared_memory(ranks * footprint.loader_shared_memory(round_bytes, config.data.workers)),
        open_files(config),
        *data(config),
        run_folder(config, footprint.checkpoint_bytes(size)),
    ]


def versions() -> Finding:
    """Compare Python and the installed packages with what mtl_dist asks for."""
    about = importlib.metadata.metadata("mtl_dist")
    python = platform.python_version()
    wrong = [] if python in SpecifierSet(about["Requires-Python"]) else [f"python {python}"]
    for text in about.get_all("Requires-Dist") or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        try:
            found = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            found = "missing"
        if found == "missing" or not wanted.specifier.contains(found, prereleases=True):
            wrong.append(f"{wanted.name} {found}, not {wanted.specifier}")
    if wrong:
        return Finding("versions", "; ".join(wrong), FAIL, "install mtl_dist anew with pip")
    return Finding("versions", f"python {python}, torch {torch.__version__}")


def devices(config: Config, ranks: int) -> Finding:
    """Look whether every rank has a device and the precision can be had."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    names = sorted({torch.cuda.get_device_name(i) for i in range(count)})
    value = f"{count} x {', '.join(names)}" if count else "CPU only"
    told = config.train.mixed_precision
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if told == "launcher" else told
    given = os.environ.get("SLURM_GPUS_ON_NODE", "0")
    if not count and given.isdigit() and int(given) and torch.version.cuda:
        return Finding("devices", f"{value}, SLURM gave {given}", FAIL, "mend the CUDA driver")
    if count and ranks > count:
        return Finding("devices", f"{value} for {ranks} ranks", FAIL, f"start {count} a node")
    if count and precision == "bf16" and not torch.cuda.is_bf16_supported():
        return Finding("devices", f"{value}: no bf16", FAIL, "use --mixed_precision fp16 or no")
    if not count and precision == "fp16":
        return Finding("devices", f"{value}: fp16 is fp32 there", WARN, "use no or bf16")
    return Finding("devices", f"{value}, precision {precision}")


def cores(wanted: int, ranks: int) -> Finding:
    """Compare the cores that this process may use, and SLURM's, with those of the ranks and their loaders."""
    have = len(os.sched_getaffinity(0))
    allowed = int(os.environ.get("SLURM_CPUS_PER_TASK", have))
    value = f"{min(have, allowed)} of {wanted}"
    if min(have, allowed) >= wanted:
        return Finding("cores", value)
    remedy = f"give the node's task {wanted} cores (--cpus-per-task), or lower data.workers"
    return Finding("cores", value, FAIL if min(have, allowed) < ranks else WARN, remedy)


def shared_memory(wanted: int) -> Finding:
    """Compare the free part of /dev/shm with the rounds that all loaders hold ready."""
    free = shutil.disk_usage(SHARED_MEMORY).free
    value = f"{size_text(free)} free, loaders take {size_text(wanted)}"
    if free >= wanted:
        return Finding("shared memory", value)
    return Finding("shared memory", value, FAIL, f"enlarge {SHARED_MEMORY} or lower data.workers")


def open_files(config: Config) -> Finding:
    """Compare the limit of open files with the tensors that a loader holds ready, a file each, and some for the rest."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    batches = len(config.train.tasks) * config.train.global_batch
    wanted = 256 + batches * TENSORS_OF_A_BATCH * (1 + 2 * config.data.workers)
    wanted = wanted if config.data.workers else 256
    if soft == resource.RLIM_INFINITY or soft >= wanted:
        return Finding("open files", f"{soft} allowed")
    return Finding("open files", f"{soft} allowed, at most {wanted} used", WARN, "raise ulimit -n")


def data(config: Config) -> Iterator[Finding]:
    """List every corpus that the run hears, and decode a crop of one file of each."""
    config.remote.apply()
    reader = ClipReader(rate=config.data.sample_rate, silence_db=config.data.silence_db)
    for name in config.corpora_heard():
        check = f"data: {name}"
        try:
            corpus = open_corpus(config, name)
            _, row = next(Lane(Blocks(corpus.parts["train"]), 1, 0, ("doctor",)))
            reader.crop(row, config.data.sample_rate, generator("doctor"))
            about = "" if all(part.exact for part in corpus.parts["train"]) else "about "
            yield Finding(
                check, f"{about}{corpus.clips('train')} training clips, one of them decoded"
            )
        except BadClipError as error:
            yield Finding(check, str(error), FAIL, "mend the file, or let this node read it")
        except (ValueError, OSError, DataError, FarFileError) as error:
            yield Finding(check, str(error), FAIL, "let this node see the corpus at this path")


def existing_folder(config: Config) -> Path:
    """Return the run folder, or the nearest folder above it that is there."""
    path = Path(config.run.dir or "runs").resolve()
    return next(folder for folder in (path, *path.parents) if folder.is_dir())


def run_folder(config: Config, checkpoint: int) -> Finding:
    """Write a file beside the run and compare the free space with the checkpoints."""
    folder, wanted = existing_folder(config), (config.train.keep_checkpoints + 2) * checkpoint
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".doctor-"):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        remedy = "name a run.dir that this node can write"
        return Finding("run folder", f"{folder}: {error.strerror}", FAIL, remedy)
    value = f"{folder}: {size_text(free)} free, checkpoints take {size_text(wanted)}"
    if free >= wanted:
        return Finding("run folder", value)
    return Finding("run folder", value, FAIL if free < 2 * checkpoint else WARN, "make room")
