"""Every command of the README runs, its example of a task trains, its file tree tells the truth.

Training commands are shortened by overrides appended to them; corpora that cannot be downloaded are the made-up ones.
"""

import io
import json
import os
import re
import socket
import subprocess
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import soundfile
import worlds

from mtl_dist.audio.clips import ClipReader
from mtl_dist.data.corpora.folder import Folder
from mtl_dist.data.corpora.synthetic import synthesise
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.data.sources import AUDIO_SUFFIXES

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
SHORT = (
    "--train.rounds 2 --train.validate_every 2 --data.workers 0 --evaluation.max_clips 2 --evaluation.examples 0 "
    "--model.blocks 1 --model.layers 2 --model.channels 4 --data.crop_seconds 0.1 --train.global_batch 4"
).split()

SAID = {
    "plan": "rounds an epoch",
    "doctor": "shared memory",
    "prepare": " shards of ",
    "study": "/TAG/seed_0",
}
"""What a command of mtl-dist prints."""


def blocks(kind: str) -> list[str]:
    return re.findall(rf"```{kind}\n(.*?)```", TEXT, re.DOTALL)


def commands(first: str) -> list[str]:
    return [
        line for block in blocks("bash") for line in block.splitlines() if line.startswith(first)
    ]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder as the README's reader has it: the project, his corpora, the files that he is told to save."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("mtl_dist", "launch_configs", "Makefile", "pyproject.toml", "constraints.txt"):
        (folder / name).symlink_to(ROOT / name)
    made = synthesise()
    (folder / "data").symlink_to(made)
    (folder / "unlabelled").symlink_to(made / "LibriSpeech")
    (folder / "noise").symlink_to(made / "CHiME3")
    meta = (
        (made / "FSDKaggle2018/FSDKaggle2018.meta/train_post_competition.csv")
        .read_text()
        .splitlines()
    )
    rows = [line.split(",")[:2] for line in meta[1:]]
    audio = made / "FSDKaggle2018/FSDKaggle2018.audio_train"
    lines = ["path,label", *(f"{audio / name},{label}" for name, label in rows)]
    (folder / "clips.csv").write_text("\n".join(lines) + "\n")
    utterances = sorted((made / "LibriSpeech").rglob("*.flac"))
    (folder / "tars").mkdir()
    for number in range(3):
        with tarfile.open(folder / f"tars/train-{number:05d}.tar", "w") as tar:
            for path in utterances[number::3]:
                tar.add(path, path.name)
                about = json.dumps({"reader": path.name.partition("-")[0]}).encode()
                info = tarfile.TarInfo(f"{path.stem}.json")
                info.size = len(about)
                tar.addfile(info, io.BytesIO(about))
    for name in ("mine.yaml", "mixed.yaml"):
        (folder / name).write_text(next(b for b in blocks("yaml") if b.startswith(f"# {name}")))
    for name in ("infill.py", "my_corpus.py"):
        (folder / name).write_text(next(b for b in blocks("python") if b.startswith(f"# {name}")))
    return folder


def run(words: list[str], folder: Path, seconds: int = 180) -> subprocess.CompletedProcess:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        words,
        cwd=folder,
        env=os.environ | {"PATH": path},
        timeout=seconds,
        capture_output=True,
        text=True,
    )


def shortened(command: str) -> list[str]:
    words = command.split()
    if "--print_config" in words or "--help" in words:
        return words
    plugin = [] if "infill" not in command else ["--tasks.infill.crop_seconds", "0.1"]
    return [*words, *SHORT, *plugin]


def runs_shown_by(words: list[str], folder: Path, seconds: int = 90) -> set[str]:
    """Start TensorBoard on a free port and return the names of the runs it serves."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    program = str(Path(sys.executable).with_name(words[0]))
    address = ["--host", "127.0.0.1", "--port", str(port)]
    server = subprocess.Popen(
        [program, *words[1:], *address], cwd=folder, stderr=subprocess.DEVNULL
    )
    try:
        for _ in range(seconds):
            time.sleep(1)
            try:
                with urllib.request.urlopen(
                    f"http://127.0.0.1:{port}/data/runs", timeout=5
                ) as page:
                    runs = set(json.load(page))
            except OSError:
                continue
            if runs:
                return runs
    finally:
        server.terminate()
        server.wait(30)
    return set()


def run_command(command: str, folder: Path) -> str:
    """Run a command of mtl-dist; return what it prints."""
    words = ["-m", "mtl_dist.cli", *command.split()[1:]]
    done = worlds.finish([worlds.Rank(words, dict(os.environ), folder)], timeout=180)
    assert done.returncode == 0, f"{command}\n{done.stderr[-4000:]}"
    return done.stdout


def needs_other_machine(command: str) -> bool:
    return any(name in command for name in ("one_gpu", "all_gpus", "several_nodes"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_training_command_runs_in_the_order_of_the_readme_and_then_evaluates(folder):
    preparing = commands("mtl-dist prepare")
    for command in preparing:  # what they make is trained on
        assert SAID["prepare"] in run_command(command, folder)
    for command in commands("accelerate launch"):
        if needs_other_machine(command) and "paper" not in command:
            continue  # launched by test_launch.py as far as this machine allows
        words = [
            word for word in shortened(command) if "one_gpu" not in word and word != "--config_file"
        ]
        if "one_gpu" not in command:
            words = shortened(command)
        done = worlds.finish(worlds.start(words[2:], folder), timeout=180)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        if "--help" in command or "--print_config" in command:
            assert "crop_seconds" in done.stdout
    for command in (c for c in commands("mtl-dist") if c not in preparing):
        said = run_command(command, folder)
        if "evaluate" in command:
            assert "map@3" in said
            assert (folder / "runs/first/test_audio_tagging_confusion.png").stat().st_size > 1000
        else:
            assert SAID[command.split()[1]] in said
    for command in commands("tensorboard"):
        assert {"first/tensorboard", "mine/tensorboard"} <= runs_shown_by(command.split(), folder)
    results = (folder / "runs/infill/results.json").read_text()
    assert '"infill"' in results


def test_make_targets_of_the_readme_exist(folder):
    for command in commands("make"):
        done = run(["make", "--dry-run", *command.split()[1:]], folder)
        assert done.returncode == 0, done.stderr


def test_every_kind_of_command_in_the_readme_is_run_by_a_test():
    known = ("accelerate launch", "make", "mtl-dist", "tensorboard --logdir", ". .venv")
    known += ("sbatch",)  # run by test_slurm_scripts.py, and on a cluster by test_slurm.py
    lines = [line for block in blocks("bash") for line in block.splitlines() if line]
    assert [line for line in lines if not line.startswith(known)] == []


def test_file_tree_names_every_module_and_nothing_else():
    tree = next(block for block in blocks("text") if block.startswith("mtl_dist/"))
    named = set(re.findall(r"\w+\.(?:py|yaml)", tree[: tree.index("launch_configs/")]))
    there = {path.name for path in (ROOT / "mtl_dist").rglob("*.py") if path.name != "__init__.py"}
    there |= {path.name for path in (ROOT / "mtl_dist").glob("*/*.yaml")}
    per_task = {"audio_tagging.py", "next_step.py", "noise_reduction.py", "upsampling.py"}
    assert named == there - per_task
    for path in (ROOT / "launch_configs").glob("*.yaml"):
        assert re.sub(r"^(fsdp2|zero\d)_", "", path.stem) in tree
        assert path.stem.split("_")[0] in TEXT
    for path in (*(ROOT / "slurm").iterdir(), *(ROOT / "benchmarks").glob("*.py")):
        assert path.name in tree


def test_links_to_files_of_the_project_hold():
    for target in re.findall(r"\]\(([^)h][^)]*)\)", TEXT):
        path, _, section = target.partition("#")
        assert (ROOT / path).exists(), target
        if section:
            titles = re.findall(r"^#+ (.*)$", (ROOT / (path or "README.md")).read_text(), re.M)
            anchors = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert section in anchors, target


def test_the_folder_formats_that_the_readme_names_are_read(tmp_path):
    (sentence,) = re.findall(r"A folder is searched for ([^;.]+?) files", " ".join(TEXT.split()))
    named = re.findall(r"\w+", sentence.replace(" and ", " "))
    assert {f".{suffix}" for suffix in named} == AUDIO_SUFFIXES
    subtypes = {
        "opus": ("OGG", "OPUS"),
        "oga": ("OGG", "VORBIS"),
        "ogg": ("OGG", "VORBIS"),
        "snd": ("AU", "PCM_16"),
    }
    subtypes |= {"aif": ("AIFF", "PCM_16"), "aifc": ("AIFF", "PCM_16"), "wave": ("WAV", "PCM_16")}
    subtypes["mp3"] = ("MP3", "MPEG_LAYER_III")
    for suffix in named:
        kind, subtype = subtypes.get(suffix, (suffix.upper(), "PCM_16"))
        soundfile.write(
            tmp_path / f"clip.{suffix}", np.full(8000, 0.5), 16_000, subtype, format=kind
        )
    corpus = Folder(root=str(tmp_path), validation_share=0, test_share=0).open("folder", 0)
    lane, reader = Lane(Blocks(corpus.parts["train"]), 1, 0, ("test",)), ClipReader(rate=16_000)
    rows = [next(lane)[1] for _ in named]
    assert {row.id for row in rows} == {f"folder/clip.{suffix}" for suffix in named}
    for row in rows:
        assert len(reader.crop(row, 4000, np.random.default_rng(0)).wave) == 4000, row.id
