"""A SLURM cluster for tests, and the local one that a script outside the project brings up.

MTL_DIST_LOCAL_SLURM names the script. It takes SLURM_LOCAL_PROCTRACK, ends with `now: . FILE`, a file that sets SLURM_CONF,
and has a stop.sh beside it.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import tiny


class Cluster:
    """A SLURM cluster, and the folder for what its jobs write."""

    def __init__(self, environment: dict[str, str], folder: Path | None = None):
        path = os.pathsep.join([str(Path(sys.executable).parent), environment["PATH"]])
        self.environment = environment | {"PATH": path, "OMP_NUM_THREADS": "1"}
        self.folder = folder

    def call(self, *words: str, **environment: str) -> str:
        """Run one of SLURM's commands in the project's folder; return what it says."""
        done = subprocess.run(
            words,
            cwd=tiny.REPOSITORY,
            env=self.environment | environment,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr  # sbatch --test-only answers on the latter

    def setting(self, name: str) -> str | None:
        """A setting of the cluster; None if there is no cluster."""
        try:
            return re.search(rf"^{name} *= (\S+)", self.call("scontrol", "show", "config"), re.M)[1]
        except (AssertionError, FileNotFoundError):
            return None

    def submit(self, script: str, *options_and_words: list[str], **environment: str) -> str:
        options, words = options_and_words
        options = ["--cpus-per-task=2", f"--output={self.folder}/%j.log", *options]
        script = f"slurm/{script}"
        return self.call("sbatch", "--parsable", *options, script, *words, **environment).strip()

    def job(self, job: str) -> dict[str, str]:
        """What SLURM says of a job."""
        shown = self.call("scontrol", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", shown))

    def log(self, job: str) -> str:
        path = self.folder / f"{job}.log"
        return path.read_text() if path.exists() else ""

    def wait(self, job: str, what: str, seconds: int = 600, **fields: str) -> dict[str, str]:
        """Wait until a job has these fields; fail at once when it has failed."""
        for _ in range(seconds):
            found = self.job(job)
            if fields.items() <= found.items():
                return found
            if found["JobState"] in ("FAILED", "TIMEOUT", "CANCELLED", "COMPLETED"):
                break
            time.sleep(1)
        pytest.fail(f"{what}: {job} is {found['JobState']}\n{self.log(job)[-4000:]}")

    def finish(self, job: str) -> dict[str, str]:
        return self.wait(job, "did not end", JobState="COMPLETED")


def start_script() -> Path | None:
    named = os.environ.get("MTL_DIST_LOCAL_SLURM")
    return Path(named) if named else None


def bring_up(script: Path, tracker: str) -> Cluster:
    """Start a local cluster, or find the one that it has started before."""
    if os.geteuid() != 0:
        pytest.skip(f"{script} needs root")
    wanted = {"SLURM_LOCAL_PROCTRACK": tracker, "SLURM_LOCAL_GPUS": "8", "SLURM_LOCAL_CPUS": "64"}
    done = subprocess.run([script], env=os.environ | wanted, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.fail(f"{script} failed: {done.stdout}{done.stderr}")
    file = Path(re.findall(r"now: \. (\S+)", done.stdout)[-1])
    (conf,) = re.findall(r"SLURM_CONF=(\S+)", file.read_text())
    return Cluster(os.environ | {"SLURM_CONF": conf})
