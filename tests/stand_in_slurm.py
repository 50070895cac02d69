"""A stand-in for SLURM: a script of slurm/ runs with an srun, scontrol and squeue that note their words."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import tiny

STAND_INS = {
    "srun": 'printf "%s\\n" "$@" >"$STUB/words"; env >"$STUB/environment"\n'
    '[[ ! -f $STUB/after ]] || { mkdir -p "$RUN"; cp "$STUB/after" "$RUN/status.json"; }; exit "$CODE"',
    "scontrol": 'case $1 in requeue) echo "$2" >"$STUB/requeued" ;; *) printf "node7\\nnode8\\n" ;; esac',
    "squeue": "echo None",
    "accelerate": "",
}


@dataclasses.dataclass
class Job:
    """What a job did."""

    code: int
    text: str
    started: list[str] | None
    """Words of srun; None if nothing was started."""
    environment: str
    requeued: str | None


def status(state: str, round_: int, signal: str | None = None) -> dict:
    return {"state": state, "round": round_, "rounds": 100, "signal": signal}


def submit(
    folder: Path, script: str, *words, run="runs/given", before=None, after=None, code=0, **env
) -> Job:
    """Run a script as SLURM would in `folder`; the run in `run` stands as `before` and is left as `after` by srun."""
    stub = folder / "stub"
    stub.mkdir(exist_ok=True)
    for name, text in STAND_INS.items():
        (stub / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (stub / name).chmod(0o755)
    if before is not None:
        (folder / run).mkdir(parents=True)
        (folder / run / "status.json").write_text(json.dumps(before))
    if after is not None:
        (stub / "after").write_text(json.dumps(after))
    job = {"SLURM_JOB_ID": "123456", "SLURM_JOB_NAME": "named", "SLURM_SUBMIT_DIR": str(folder)}
    job |= {
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "STUB": str(stub),
        "RUN": run,
    }
    job |= {"MTL_DIST_HOME": str(tiny.REPOSITORY), "CODE": str(code)}
    job["PATH"] = os.pathsep.join([str(stub), str(Path(sys.executable).parent), os.environ["PATH"]])
    ended = subprocess.run(
        ["bash", str(tiny.REPOSITORY / "slurm" / script), *words],
        cwd=folder,
        env={k: v for k, v in os.environ.items() if not k.startswith("OMP")} | job | env,
        capture_output=True,
        text=True,
        timeout=60,
    )

    def read(name: str) -> str | None:
        return (stub / name).read_text() if (stub / name).exists() else None

    started = read("words")
    return Job(
        ended.returncode,
        ended.stdout + ended.stderr,
        None if started is None else started.splitlines(),
        read("environment") or "",
        read("requeued"),
    )


def option(job: Job, name: str) -> str:
    """The value that the last `name VALUE` among srun's words gives."""
    return job.started[len(job.started) - job.started[::-1].index(name)]
