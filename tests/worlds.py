"""Worlds of real processes as accelerate launch starts them, but forked from a server that has imported the libraries.

Importing torch, datasets and DeepSpeed takes a process 5 to 15 s of a core, which most tests of several processes are not
about. The environment is the one that accelerate makes of a launch file. test_launch.py launches.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import tiny
from accelerate.commands import launch as launcher
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from torch.distributed import TCPStore

PRELOADED = (
    "mtl_dist.cli mtl_dist.trainer mtl_dist.experiment mtl_dist.pictures mtl_dist.watchdog "
    "torch._dynamo torch._inductor.compile_fx torch.distributed.tensor torch.utils.tensorboard "
    "deepspeed transformers.integrations"
)
context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(PRELOADED.split())


class Rank:
    """A process that runs `python words` with its standard streams in files; used like subprocess.Popen."""

    def __init__(self, words: list[str], environment: dict[str, str], cwd: Path):
        self.folder = tempfile.TemporaryDirectory(prefix="rank")
        self.streams = [f"{self.folder.name}/{name}" for name in ("stdout", "stderr")]
        for path in self.streams:
            Path(path).touch()
        arguments = (words, environment | {"OMP_NUM_THREADS": "1"}, str(cwd), self.streams)
        self.process = context.Process(target=_become, args=arguments)
        self.process.start()

    def wait(self, timeout: float) -> int:
        """Return the exit code. Raises subprocess.TimeoutExpired."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            raise subprocess.TimeoutExpired(f"process {self.process.pid}", timeout)
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def texts(self) -> tuple[str, str]:
        """What it has written to stdout and to stderr so far."""
        stdout, stderr = (Path(path).read_text() for path in self.streams)
        return stdout, stderr


def _become(words: list[str], environment: dict, cwd: str, streams: list[str]) -> None:
    for number, path in enumerate(streams, start=1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    multiprocessing.set_start_method(None, force=True)  # not the one by which it was started itself
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        sys.path.insert(0, str(Path(words[0]).resolve().parent))
        runpy.run_path(words[0], run_name="__main__")


def start(words: list[str], cwd: Path = tiny.REPOSITORY, **environment: str) -> list[Rank]:
    """Start what `accelerate launch words` would start, on all nodes.

    They meet at a store that this process keeps as a launcher does.
    """
    parsed = launcher.launch_command_parser().parse_args(words)
    arguments, defaults, _ = launcher._validate_launch_command(parsed)
    script = [*(["-m"] if arguments.module else []), arguments.training_script]
    script += arguments.training_script_args
    if arguments.num_processes < 2:
        precision = {"ACCELERATE_MIXED_PRECISION": arguments.mixed_precision or "no"}
        return [Rank(script, os.environ | precision | environment, cwd)]
    if arguments.use_deepspeed:
        arguments.deepspeed_fields_from_accelerate_config = ",".join(defaults.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(arguments)[1] | environment
    else:
        environment = prepare_multi_gpu_env(arguments) | environment
    size, on_a_node = arguments.num_processes, arguments.num_processes // arguments.num_machines
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment |= {"WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(on_a_node)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True"}
    places = [{"RANK": str(n), "LOCAL_RANK": str(n % on_a_node)} for n in range(size)]
    ranks = [Rank(script, environment | place, cwd) for place in places]
    ranks[0].store = store  # lives as long as they do
    return ranks


def finish(ranks: list[Rank], timeout: float) -> subprocess.CompletedProcess:
    """Wait until all have ended; once one has failed, the others are ended too, as a launcher does."""
    until = time.monotonic() + timeout
    try:
        while None in (codes := [rank.poll() for rank in ranks]) and not any(codes):
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("a world", timeout)
            time.sleep(0.05)
        for rank in ranks:  # they may say why before they are ended
            rank.process.join(2.0)
    finally:
        for rank in ranks:
            rank.kill()
    code = next((code for code in codes if code), 0)
    stdout, stderr = map("".join, zip(*(rank.texts() for rank in ranks), strict=True))
    return subprocess.CompletedProcess("", code, stdout, stderr)


def launch(file: str, *words: str, timeout: float = 240.0, **environment: str):
    """Run a script to its end as launch_configs/FILE.yaml says; return the finished process with the text of all ranks."""
    config = ["--config_file", str(tiny.REPOSITORY / f"launch_configs/{file}.yaml")]
    return finish(start([*config, *words], **environment), timeout)


def run(*words: str, timeout: float = 240.0, **environment: str) -> subprocess.CompletedProcess:
    """Run `python words` to its end, started by no launcher."""
    return finish([Rank(list(words), os.environ | environment, tiny.REPOSITORY)], timeout)
