"""Kill a run again and again, and see that it learns the same.

    python benchmarks/failures.py all build/kill_all --times 20   every process at once with SIGKILL, then --run.resume auto
    python benchmarks/failures.py one build/kill_one --times 10   one rank, under `accelerate launch --max_restarts`

Two CPU processes train the tests' tiny run of all four tasks with a checkpoint every round or two, so that many kills fall
into a save. Prints when each kill fell and how long the run took to be back, and compares the final parameters with those
of a run that nobody killed. Used by tests/test_failures.py with fewer kills.
"""

import argparse
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import psutil
import tiny
import torch
from safetensors.torch import load_file

ROOT = Path(__file__).parent.parent
FILE = "two_cpu_processes"
BACK_SECONDS = 300.0
"""A run that has not made a round after so long is called hung."""


def words(out: Path, run: Path, rounds: int) -> list[str]:
    """The run: long enough to be killed, a checkpoint every round."""
    lengths = ["--train.rounds", str(rounds), "--train.validate_every", str(rounds)]
    saving = ["--train.checkpoint_every", "1", "--run.resume", "auto", "--run.dir", str(run)]
    return tiny.tiny_words(out / "corpora", *lengths, *saving, "--data.workers", "1")


def launch(out: Path, run: Path, rounds: int, *options: str) -> subprocess.Popen:
    """Start the launcher in a process group of its own."""
    command = [sys.executable, "-m", "accelerate.commands.launch"]
    command += ["--config_file", str(ROOT / f"launch_configs/{FILE}.yaml"), *options]
    return subprocess.Popen(
        [*command, str(ROOT / "mtl_dist/train.py"), *words(out, run, rounds)],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(run.parent / f"{run.name}.log").open("a"),
        start_new_session=True,
    )


def rounds_done(run: Path) -> int:
    """Return the last round in metrics.jsonl."""
    try:
        lines = (run / "metrics.jsonl").read_text().splitlines()
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["round"] for line in lines[:-1]), default=0)


def saved(run: Path) -> int:
    """Return the round of the newest whole checkpoint."""
    markers = (run / "checkpoints").glob("round_*/COMPLETE")
    return max((int(path.parent.name.removeprefix("round_")) for path in markers), default=0)


def wait_for(condition, launcher: subprocess.Popen) -> float:
    """Wait until the condition holds or the launcher has ended; return the seconds it took."""
    began = time.perf_counter()
    while not condition() and launcher.poll() is None:
        if time.perf_counter() - began > BACK_SECONDS:
            raise TimeoutError("the run does not come back")
        time.sleep(0.02)
    return time.perf_counter() - began


def ranks_of(launcher: subprocess.Popen) -> list[psutil.Process]:
    """Return the launcher's ranks, by rank."""
    found = [
        p for p in psutil.Process(launcher.pid).children() if "train.py" in " ".join(p.cmdline())
    ]
    return sorted(found, key=lambda p: int(p.environ()["RANK"]))


def kill_all(out: Path, times: int, rounds: int, draw: random.Random) -> Path:
    """Kill every process at random moments, `times` times, starting the run again each time."""
    run = out / "killed_all"
    for number in range(times):
        launcher, before = launch(out, run, rounds), rounds_done(run)
        back = wait_for(lambda before=before: rounds_done(run) > before, launcher)
        time.sleep(draw.uniform(0.0, 0.6))
        tree = [
            *psutil.Process(launcher.pid).children(recursive=True),
            psutil.Process(launcher.pid),
        ]
        partial = bool(list((run / "checkpoints").glob(".round_*.partial")))
        for process in tree:
            process.kill()
        launcher.wait()
        where = "in a save" if partial else "in training"
        print(
            f"kill {number + 1}: {where}, round {rounds_done(run)}, saved {saved(run)}, back after {back:.1f} s"
        )
        assert saved(run) < rounds, "the run ended before it was killed often enough: more rounds"
    assert launch(out, run, rounds).wait(timeout=BACK_SECONDS * 2) == 0
    return run


def resumptions(run: Path) -> list[int]:
    """Return from which rounds the run has gone on so far, as its log tells."""
    text = (run.parent / f"{run.name}.log").read_text()
    return [int(n) for n in re.findall(r"goes on from .* \(round (\d+)\)", text)]


def kill_one(out: Path, times: int, rounds: int, draw: random.Random) -> Path:
    """Kill one rank at random moments, `times` times; the launcher brings the group back."""
    run, backs = out / "killed_one", []
    launcher = launch(out, run, rounds, "--max_restarts", str(times), "--monitor_interval", "0.5")
    wait_for(lambda: rounds_done(run) > 0, launcher)
    for number in range(times):
        time.sleep(draw.uniform(0.0, 1.0))
        kept, victim = saved(run), number % 2
        ranks_of(launcher)[victim].send_signal(signal.SIGKILL)

        def is_back(so_far: int = number) -> bool:
            found = resumptions(run)
            return len(found) > so_far and rounds_done(run) > found[-1]

        backs.append(wait_for(is_back, launcher))
        assert launcher.poll() is None, "the run ended before the last kill: more rounds"
        went_on = resumptions(run)[-1]
        print(
            f"kill {number + 1}: rank {victim}, saved {kept}, went on from {went_on}, back after {backs[-1]:.1f} s"
        )
        assert went_on >= kept, "a whole checkpoint was not used"
    assert launcher.wait(timeout=BACK_SECONDS * 2) == 0
    spread = f"{min(backs):.1f} to {max(backs):.1f} s"
    print(f"back after {spread}, median {statistics.median(backs):.1f} s")
    return run


def final(run: Path, rounds: int) -> dict[str, torch.Tensor]:
    """Return the parameters after the last round."""
    return load_file(run / "checkpoints" / f"round_{rounds:08d}" / "model.safetensors")


def main() -> None:
    """Kill, and compare with a run that nobody killed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("all", "one"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--rounds", type=int, help="length of the run (default: 60 a kill)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    options = parser.parse_args()
    out, rounds = options.out.resolve(), options.rounds or 60 * options.times
    out.mkdir(parents=True)
    tiny.write_corpora(out / "corpora")
    whole = out / "uninterrupted"
    assert launch(out, whole, rounds).wait() == 0
    kill = kill_all if options.what == "all" else kill_one
    ours, theirs = (
        final(run, rounds)
        for run in (kill(out, options.times, rounds, random.Random(options.seed)), whole)
    )
    same = all(torch.equal(ours[name], theirs[name]) for name in theirs)
    worst = max(float((ours[n] - theirs[n]).norm() / theirs[n].norm()) for n in theirs)
    print(f"final parameters {'equal bit for bit' if same else f'differ by {worst:.1e}'}")
    sys.exit(worst > 1e-5)


if __name__ == "__main__":
    main()
