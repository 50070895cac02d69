"""Laws of whole runs on the Hub: the losses of local files by few requests, through faults, or an end of all ranks in time.

The Hub is tests/hub_server.py; a run that ends goes on when it is well again, as if nothing had happened.
"""

import json
import re
import shutil
import time

import hub_corpora
import pytest
import tiny
import worlds
from entry import entries
from hub_fixtures import BUSY, RETRIED, TOKEN
from hub_server import Fault

from mtl_dist.config import load_config
from mtl_dist.data.streams import StreamFiles
from mtl_dist.data.workers import PARTS_AHEAD
from mtl_dist.experiment import build_experiment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]
ENTRY = "mtl_dist/train.py"
ROUNDS, ENDLESS = 32, 10**9
PATIENCE = 8.0
FAST = {"timeout_seconds": 1.0, "retries": 2, "wait_seconds": 0.1, "patience_seconds": PATIENCE}
TRAIN = "clean/train.100"
FILE = r"rank [01] on \S+, corpus \w+, \S+\.(parquet(, part \d of 3)?|wav): "


def words(corpora, run, *more: str) -> list[str]:
    told = ["--train.rounds", str(ROUNDS), "--train.validate_every", str(ROUNDS)]
    told += ["--evaluation.max_clips", "2", "--data.workers", "2", "--run.dir", str(run)]
    return tiny.tiny_words(corpora, *told, *more)


def train(*more: str):
    """Start two ranks without a launcher, which takes less time."""
    return worlds.launch("two_cpu_processes", ENTRY, *more, HF_TOKEN=TOKEN)


def learned(run) -> list[dict]:
    """What metrics.jsonl says of the model, exactly; of a round that was done twice, the last."""
    kept = ("loss", "count", "grad_norm", "round")
    rounds = {entry["round"]: entry for entry in entries(run, "round")}
    return [{k: v for k, v in rounds[n].items() if k.startswith(kept)} for n in sorted(rounds)]


@pytest.fixture(scope="module")
def local(hub_data, corpora_root, tmp_path_factory):
    """The run of two ranks from the same files on this disk."""
    run = tmp_path_factory.mktemp("local") / "run"
    done = train(*words(corpora_root, run, *hub_corpora.words(hub_data.folder)))
    assert done.returncode == 0, done.stderr
    assert [entry["round"] for entry in learned(run)] == list(range(1, ROUNDS + 1))
    return run


@pytest.fixture
def late(hub, corpora_root, tmp_path, monkeypatch):
    """How many requests to the storage for the training files come before those for audio."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.token = TOKEN
    build_experiment(load_config(words(corpora_root, tmp_path, *hub_corpora.words())))
    count = sum("/storage/" in line and TRAIN in line for line in hub.log)
    hub.reset()
    hub.token = TOKEN
    return count


def block_reads(folder, corpora, monkeypatch) -> int:
    """Return how many blocks of speech the lanes of all streams read, those included that workers read ahead."""
    experiment = build_experiment(load_config(words(corpora, "x", *hub_corpora.words(folder))))
    read, counted = StreamFiles.read, []
    monkeypatch.setattr(StreamFiles, "read", lambda *where: counted.append(where) or read(*where))
    for stream in experiment.streams():
        for number in range(stream.lanes):
            lane = stream.lane(number, experiment.config.run.seed, {})
            for _ in range(ROUNDS + PARTS_AHEAD + 2):
                next(lane)
    monkeypatch.undo()
    return len(counted)


def test_a_launched_run_from_a_private_repository_is_the_run_from_local_files_by_few_requests(
    hub, local, late, corpora_root, tmp_path, monkeypatch
):
    run = tmp_path / "run"
    file = str(tiny.REPOSITORY / "launch_configs/two_cpu_processes.yaml")
    script = ["-m", "accelerate.commands.launch", "--config_file", file, ENTRY]
    told = words(corpora_root, run, *hub_corpora.words())
    done = tiny.run_process([*script, *told], HF_TOKEN=TOKEN)
    assert done.returncode == 0, done.stderr
    assert learned(run) == learned(local)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, local)]
    assert results[0] == results[1]

    said = [done.stdout, done.stderr]
    said += [path.read_bytes().decode("latin1") for path in run.rglob("*") if path.is_file()]
    assert len(said) > 10
    assert not any(TOKEN in text or "signed-secret" in text for text in said)

    lists = [line for line in hub.log if "/tree/" in line and hub_corpora.SPEECH in line]
    assert 0 < len(lists) <= 2 * len(set(lists)) < 20  # by two file systems of rank 0
    asked = sum("/storage/" in line and TRAIN in line for line in hub.log) - late
    reads = block_reads(hub.folder, corpora_root, monkeypatch)
    print(f"{asked} requests to the storage for {reads} blocks")
    assert 0 < asked <= 2 * reads


def test_what_a_retry_cures_changes_nothing(hub, local, late, corpora_root, tmp_path):
    hub.faults += [
        Fault("status", "resolve", TRAIN, status=429, headers=RETRIED, skip=late + 2),
        Fault("status", "storage", TRAIN, times=2, headers=RETRIED, skip=late + 6),
        Fault("cut", path=TRAIN, skip=late + 8),
        Fault("stall", path=TRAIN, skip=late + 10),
        Fault("cut", path=".wav", skip=5),
    ]
    run, patient = tmp_path / "run", FAST | {"patience_seconds": 60}
    done = train(*words(corpora_root, run, *hub_corpora.words(**patient)))
    assert done.returncode == 0, done.stderr
    assert [fault.times for fault in hub.faults] == [0] * len(hub.faults)
    assert learned(run) == learned(local)
    for said in ("HTTP Error 429", "HTTP Error 503", "peer closed", "timed out"):
        assert said in done.stderr


ENDS = [
    (Fault("stall", path=TRAIN), "2", r"TimeoutError: no answer in 8 s"),
    (Fault("status", "resolve", ".wav", status=404), "2", "HTTP 404.*check path"),
    (Fault("trickle", path=TRAIN), "0", r"TimeoutError: no answer in 8 s"),
    (Fault("gone", path=TRAIN), "2", r"TimeoutError: no answer in 8 s"),
]
"""What no retry cures, the workers, and the reason that is given."""


def assert_all_ended_by_themselves(done, run, reason: str) -> int:
    """One line says why; the checkpoint is of the last round that was done, whose number is returned."""
    assert done.returncode == 1, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.match(rf"error: {FILE}.*{reason}", errors[0]), errors
    assert errors[0].endswith("(go on with --run.resume auto)")
    assert "[rank" not in done.stderr  # torch's mark of a traceback
    assert "Fatal Python error" not in done.stderr
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["round"]) == ("failed", len(learned(run)))
    assert (run / f"checkpoints/round_{status['round']:08d}/COMPLETE").is_file()
    return status["round"]


def test_what_stays_ends_all_ranks_in_time_and_the_run_goes_on_as_if_nothing_had_happened(
    hub, local, late, corpora_root, tmp_path
):
    run, before = tmp_path / "run", 0
    told = words(corpora_root, run, "--run.resume", "auto", *hub_corpora.words(**FAST))
    for fault, workers, reason in ENDS:
        skip = 8 if fault.path == ".wav" else late + (2 if before else 10)
        hub.faults.append(Fault(**vars(fault) | {"times": ENDLESS, "skip": skip}))
        done = train(*told, "--data.workers", workers)
        took = time.monotonic() - hub.first_fault
        after = assert_all_ended_by_themselves(done, run, reason)
        print(f"{reason}: {took:.1f} s after the fault, after round {after}")
        assert took < 2 * PATIENCE + BUSY
        assert max(1, before) <= after < ROUNDS
        before = after
        if fault.kind == "gone":
            hub.reopen()
        hub.reset()
        hub.token = TOKEN

    hub.commit = "f" * 40  # somebody has pushed
    done = train(*told)
    hub.reset()
    assert done.returncode == 1
    assert re.search(r"^error: .*librispeech.*changed", done.stderr, re.MULTILINE), done.stderr
    assert len(learned(run)) == before
    hub.token = TOKEN
    done = train(*told)
    assert done.returncode == 0, done.stderr
    assert learned(run) == learned(local)


def test_a_disk_that_stalls_ends_all_ranks_in_time_and_the_run_goes_on(
    hub_data, local, corpora_root, tmp_path
):
    run, disk = tmp_path / "run", shutil.copytree(hub_data.folder, tmp_path / "hub")
    told = words(corpora_root, run, "--run.resume", "auto", *hub_corpora.words(disk, **FAST))
    script = str(tiny.REPOSITORY / "tests/workers/stalling_disk.py")
    done = worlds.launch("two_cpu_processes", script, "1", "4", *told)
    assert_all_ended_by_themselves(done, run, r"TimeoutError: no answer in 8 s")
    stalled = [str(pipe).removesuffix(".stalls") for pipe in disk.rglob("*.stalls")]
    assert any(f"corpus librispeech, {path}" in done.stderr for path in stalled)
    done = train(*told, "--data.workers", "0")
    assert done.returncode == 0, done.stderr
    assert learned(run) == learned(local)
