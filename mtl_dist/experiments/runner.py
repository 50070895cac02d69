"""`mtl-dist study NAME`: the runs of a study through accelerate launch, several at a time, and a table of their results.

    mtl-dist study table1 --config paper --seeds 0,1,2 --out runs/table1 --jobs 2 --corpora.fsdkaggle2018.root DIR ...

Started again it goes on: finished runs are skipped, failed and stopped ones go on from their checkpoints. Tested by
tests/test_study.py.
"""

import argparse
import contextlib
import dataclasses
import os
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from pathlib import Path

import yaml
from tqdm import tqdm

from mtl_dist.experiments.study import Run, Study, load_study, plan_runs, study_names
from mtl_dist.run_folder import write_atomically
from mtl_dist.tables import format_rows

ONE_PROCESS = "--num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
TRAIN = Path(__file__).parent.parent / "train.py"
POLL_SECONDS = 1.0
SECONDS_TO_SAVE = 120.0


def add_study(commands) -> None:
    """Declare `mtl-dist study`."""
    text = "train the variants of a study, and compare them"
    more = "Words such as --train.rounds 100 override the recipe for all of its runs. Started again it goes on."
    command = commands.add_parser("study", allow_abbrev=False, help=text, description=more)
    add = command.add_argument
    add("name", metavar="NAME", help=f"{', '.join(study_names())}, or a file")
    add("--config", metavar="RECIPE", help="recipe (default: the study's own)")
    add("--seeds", default="0", help="values of run.seed, such as 0,1,2 (default: 0)")
    add("--out", type=Path, help="folder of its runs (default: runs/NAME)")
    add("--jobs", type=int, default=1, help="runs at a time (default: 1)")
    add("--launch", metavar="FILE", help="launch file of accelerate (default: one process)")
    add("--dry_run", action="store_true", help="print the commands, and run none")
    command.set_defaults(act=run_study)


def run_study(options: argparse.Namespace, overrides: list[str]) -> None:
    """Train what is not finished and print the table; exit code 1 where a run failed. Raises ValueError or OSError."""
    study = load_study(options.name)
    seeds = _seeds(options.seeds)
    if options.jobs < 1:
        raise ValueError(f"--jobs: {options.jobs} is not allowed; use 1 or more")
    if options.launch is not None and not Path(options.launch).is_file():
        raise ValueError(f"--launch: the file {options.launch} does not exist")
    out = options.out or Path("runs") / study.name
    recipe = options.config or study.recipe
    study = dataclasses.replace(study, recipe=recipe, overrides=overrides)
    runs = plan_runs(study, seeds, out)
    launch = ["--config_file", options.launch] if options.launch else ONE_PROCESS
    if options.dry_run:
        for run in runs:
            print(shlex.join(_command(run, launch)) + ("  # finished" * run.finished()))
        return
    _claim(out, study)
    failed = run_all(runs, launch, options.jobs)
    print(table(study, runs))
    if failed:
        print("\n".join(f"failed: {line}" for line in failed), file=sys.stderr)
        sys.exit("error: start the same command again to try these once more")


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"--seeds: {text!r}; write them as 0,1,2") from None
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise ValueError(f"--seeds: {text!r}; use each seed once, 0 or more")
    return seeds


def _claim(out: Path, study: Study) -> None:
    """Write OUT/study.yaml. Raises ValueError if OUT holds another study, or something else."""
    path = out / "study.yaml"
    if path.exists():
        saved, now = load_study(str(path)).as_tree(False), study.as_tree(False)
        for field, value in now.items():
            if saved[field] != value:
                raise ValueError(
                    f"--out: {out} holds a study of other {field} ({saved[field]!r}, now {value!r}); name another folder"
                )
        return
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"--out: {out} is not empty and holds no study; name another folder")
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(path, yaml.safe_dump(study.as_tree(), sort_keys=False))


def _command(run: Run, launch: Sequence[str]) -> list[str]:
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, str(TRAIN), *run.words]


def run_all(runs: Sequence[Run], launch: Sequence[str], jobs: int) -> list[str]:
    """Train the runs that are not finished, so many at a time; return "RUN: why" of those that failed.

    Ctrl-C and SIGTERM stop them: each saves and ends.

    Raises:
        SystemExit: they were stopped.
    """
    todo = [run for run in runs if not run.finished()]
    threads = str(max(1, len(os.sched_getaffinity(0)) // jobs))
    environment = {"OMP_NUM_THREADS": threads} | os.environ
    running: dict[Path, subprocess.Popen] = {}
    failed, stopped = [], []

    def train(run: Run) -> None:
        if stopped:
            return
        run.folder.parent.mkdir(parents=True, exist_ok=True)
        log = run.folder.with_suffix(".log")
        with open(log, "ab") as file:
            streams = {"stdout": file, "stderr": file, "stdin": subprocess.DEVNULL}
            process = subprocess.Popen(
                _command(run, launch), env=environment, start_new_session=True, **streams
            )
            running[run.folder] = process
            if stopped:  # meanwhile
                _interrupt(process)
            code = process.wait()
            del running[run.folder]
            _wait_for_group(process.pid)
        if not run.finished() and not stopped:
            lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            failed.append(f"{run.folder}: exit code {code}; {_why(lines)} (all of it: {log})")

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        for process in list(running.values()):
            _interrupt(process)

    before = {n: signal.signal(n, stop) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        with (
            ThreadPoolExecutor(jobs) as pool,
            tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run") as bar,
        ):
            left = {pool.submit(train, run) for run in todo}
            while left:
                done, left = wait(left, POLL_SECONDS, FIRST_COMPLETED)
                for one in done:
                    one.result()
                share = round(sum(map(_share, runs)), 2)
                if share != bar.n:  # in a log, every sight of it is a line
                    bar.n = share
                    bar.set_postfix(failed=len(failed))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        print("stopped; start the same command again to go on", file=sys.stderr)
        sys.exit(128 + stopped[0])
    return failed


def _interrupt(process: subprocess.Popen) -> None:
    """Send SIGINT to a launcher and all that it has started, as Ctrl-C would."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGINT)


def _wait_for_group(group: int) -> None:
    """Wait until what a launcher started has ended, too: interrupted, it may leave a run behind that is still saving."""
    end = time.monotonic() + SECONDS_TO_SAVE
    with contextlib.suppress(ProcessLookupError):
        while time.monotonic() < end:
            os.killpg(group, 0)
            time.sleep(0.1)


def _share(run: Run) -> float:
    """Return how much of a run is done, as its status.json says."""
    status = run.status()
    if run.finished():
        return 1.0
    return min(0.99, status.get("round", 0) / max(1, status.get("rounds", 1)))


def _why(lines: Sequence[str]) -> str:
    """Return the last error in a log, or its last line."""
    errors = [line for line in lines if line.startswith("error: ")]
    return (errors or lines or ["it wrote nothing"])[-1]


def table(study: Study, runs: Sequence[Run]) -> str:
    """Return a row for each variant: runs finished, mean and deviation over seeds, gain over another, published value."""
    scores: dict[str, list[float]] = {name: [] for name in study.variants}
    for run in runs:
        if run.finished():
            found = run.results().get(study.task, {})
            if study.metric not in found:
                raise ValueError(
                    f"study {study.name}, metric: {run.folder}/results.json has no {study.metric} of {study.task} "
                    f"(there: {', '.join(found)})"
                )
            scores[run.variant.name].append(found[study.metric])
    rows = [("variant", "runs", study.metric, "sd", "gain", "over", "published")]
    for name, found in scores.items():
        variant = study.variants[name]
        base = scores[variant.against]
        mean = f"{statistics.mean(found):.4f}" if found else ""
        spread = f"{statistics.stdev(found):.4f}" if len(found) > 1 else ""
        gain = ("", "")
        if found and base and name != variant.against:
            gain = f"{statistics.mean(found) - statistics.mean(base):+.4f}", variant.against
        published = variant.published.get(study.metric)
        told = "" if published is None else f"{published:.3f}"
        rows.append((name, str(len(found)), mean, spread, *gain, told))
    return format_rows(rows)
