"""Laws of whole runs on the Hub: the clips of local files by few requests, through faults, or an end of all ranks in time.

The Hub is tests/hub_server.py; a run that ends goes on when it is well again, as if nothing had happened.
"""

import json
import re
import shutil
import time

import hub_corpora
import pytest
import sharded
import tiny
import worlds
from entry import entries
from hub_corpora import FOLDERS
from hub_server import RESERVED, Fault, HubServer

from mtl_dist.config import load_config
from mtl_dist.experiment import build_experiment
from mtl_dist.streams.rounds import PARTS_AHEAD

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
ENTRY = "mtl_dist/train.py"
TOKEN = "hf_aVerySecretToken"
ROUNDS, BATCH = 24, 4
REMOTE = {"timeout_seconds": 1.0, "patience_seconds": 5.0, "first_wait_seconds": 0.05}
BUSY = 20.0
"""Seconds that a busy machine may add to what is bounded."""
ENDLESS = 10**9
SHARD = r"rank [01] on \S+, corpus corpora\.\w+, (lab|/\S+lab)/\S+\.parquet, row group \d+: "


@pytest.fixture(scope="module")
def server(corpora_root, tmp_path_factory):
    """The Hub with lab/fsdkaggle2018, lab/librispeech and lab/chime3."""
    folder = tmp_path_factory.mktemp("hub")
    prepared = sharded.prepare(corpora_root, tmp_path_factory.mktemp("prepared"))
    hub_corpora.publish(prepared, folder)
    server = HubServer(folder, RESERVED.getsockname()[1])
    yield server
    server.close()


@pytest.fixture(autouse=True)
def well(server):
    server.reset()
    server.token = TOKEN


def words(corpora, run, *more: str) -> list[str]:
    lengths = ["--train.rounds", str(ROUNDS), "--train.validate_every", str(ROUNDS)]
    few = ["--evaluation.max_clips", "2", "--data.workers", "2"]
    return tiny.tiny_words(corpora, *lengths, *few, "--run.dir", str(run), *more)


def launch(*more: str):
    """Launch two ranks as a user does."""
    file = str(tiny.REPOSITORY / "launch_configs/two_cpu_processes.yaml")
    script = ["-m", "accelerate.commands.launch", "--config_file", file, ENTRY]
    return tiny.run_process([*script, *more], HF_TOKEN=TOKEN)


def train(*more: str):
    """Start the same two ranks without a launcher, which takes less time."""
    return worlds.launch("two_cpu_processes", ENTRY, *more, HF_TOKEN=TOKEN)


def learned(run) -> list[dict]:
    """What metrics.jsonl says of the model, exactly; of a round that was done twice, the last."""
    kept = ("loss", "count", "grad_norm", "round")
    rounds = entries(run, "round")
    return [{k: v for k, v in entry.items() if k.startswith(kept)} for entry in rounds]


@pytest.fixture(scope="module")
def local(server, corpora_root, tmp_path_factory):
    """The run of two ranks from the same files on this disk."""
    run = tmp_path_factory.mktemp("local") / "run"
    done = train(*words(corpora_root, run, *hub_corpora.words(server.folder / "lab")))
    assert done.returncode == 0, done.stderr
    assert [entry["round"] for entry in learned(run)] == list(range(1, ROUNDS + 1))
    return run


@pytest.fixture(scope="module")
def experiment(server, corpora_root, local):
    """The same, in this process."""
    return build_experiment(
        load_config(words(corpora_root, local, *hub_corpora.words(server.folder / "lab")))
    )


def requests_of_audio(server, experiment) -> dict[str, int]:
    """{corpus: requests for the audio of a block}."""
    counts = {}
    for corpus, shards in experiment.shards().items():
        audio = {
            f"/lab/{corpus}/{file.path.split(f'/lab/{corpus}/')[1]}?X bytes={start}-{end - 1}"
            for file in shards._files
            for block in range(len(file.rows()))
            for start, end in file.audio_ranges(block, shards.sources[file.source])
        }
        asked = [re.sub(r"\?\S*", "?X", line) for line in server.log if "/storage/" in line]
        counts[corpus] = sum(line.split("/storage", 1)[1] in audio for line in asked)
    return counts


@pytest.fixture(scope="module")
def late(server, experiment, corpora_root, local):
    """How many requests for parts of Parquet files come before those for audio; server.opening has them by corpus."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_TOKEN", TOKEN)
        server.reset()
        build_experiment(load_config(words(corpora_root, local, *hub_corpora.words("lab"))))
    storage = [line for line in server.log if "/storage/" in line]
    server.opening = {c: sum(f"/lab/{c}/" in line for line in storage) for c in FOLDERS}
    return len(storage)


def test_a_launched_run_from_a_private_repository_is_the_run_from_local_files_by_few_requests(
    server, local, experiment, corpora_root, tmp_path
):
    run = tmp_path / "run"
    done = launch(*words(corpora_root, run, *hub_corpora.words("lab")))
    assert done.returncode == 0, done.stderr
    assert learned(run) == learned(local)
    results = [json.loads((folder / "results.json").read_text()) for folder in (run, local)]
    assert results[0] == results[1]

    said = [done.stdout, done.stderr]
    said += [path.read_bytes().decode("latin1") for path in run.rglob("*") if path.is_file()]
    assert len(said) > 10
    assert not any(TOKEN in text or "signed-secret" in text for text in said)

    files = [path for path in server.folder.rglob("*.parquet")]
    footers = [line for line in server.log if "/storage/" in line and "bytes=-" in line]
    assert len(footers) == len(set(footers)) == len(files)
    lists = [line for line in server.log if "/tree/" in line and "lab/librispeech" in line]
    assert 0 < len(lists) == len(set(lists))

    # A lane asks once for the rows of a block that follow each other in it; workers are PARTS_AHEAD rounds ahead.
    counts, ahead = requests_of_audio(server, experiment), ROUNDS + PARTS_AHEAD + 1
    scored = (
        3 * len(experiment.tasks) * 2
    )  # clips of validation, and of validation and test at the end
    of_clips = counts["fsdkaggle2018"] + counts["librispeech"]
    law = hub_corpora.block_reads(experiment, ahead) + scored
    heard = ROUNDS * BATCH * len(experiment.tasks)
    print("requests", dict(server.requests), "audio", counts, "law", law, "clips", heard)
    assert 0 < of_clips <= law < heard
    assert 0 < counts["chime3"] <= BATCH * ahead + scored


def test_what_a_retry_cures_is_said_and_changes_nothing_and_a_slow_server_is_said_to_starve(
    server, local, late, corpora_root, tmp_path
):
    run = tmp_path / "run"
    server.faults += [
        Fault("status", "resolve", status=429, headers={"Retry-After": "1"}, skip=late + 5),
        Fault("status", "storage", times=2, skip=late + 20),
        Fault("cut", skip=late + 40),
        Fault("stall", skip=late + 60),
        *(Fault("slow", route, skip=late + 80, times=ENDLESS) for route in ("resolve", "storage")),
    ]
    remote = REMOTE | {"patience_seconds": 20.0}
    done = train(*words(corpora_root, run, *hub_corpora.words("lab", **remote)))
    assert done.returncode == 0, done.stderr
    assert [fault.times for fault in server.faults[:4]] == [0] * 4
    assert learned(run) == learned(local)
    for reason in ("HTTP 429", "HTTP 503", "cut|peer closed", "ReadTimeout"):
        pattern = rf"WARNING: {SHARD}[^\n]*({reason})[^\n]*; attempt \d, again in [\d.]+ s"
        assert re.search(pattern, done.stderr), (reason, done.stderr)
    assert re.search(rf"WARNING: {SHARD}waiting for data for [\d.]+ s, attempt 1", done.stderr)

    *_, last = slow = entries(run, "round")[ROUNDS // 2 :]
    # the mean over two ranks, of which one waits for the other's data, would stay below
    assert max(entry["time/data_wait_share"] for entry in slow) > 0.55
    assert min(entry["stream/rounds_ahead"] for entry in slow) < PARTS_AHEAD / 2
    for corpus in ("fsdkaggle2018", "librispeech"):
        assert last[f"stream/{corpus}/clips_per_second"] > 0
        assert last[f"stream/{corpus}/bytes_per_second"] > 0
    (line,) = re.findall(r"^epoch 5: (.*MB/s)$", done.stderr, re.MULTILINE)
    print(line)
    assert re.fullmatch(
        r"waiting for data (\d+)% of [\d.]+ s; [\d.]+ rounds ready ahead; "
        r"fsdkaggle2018 [\d.]+ clips/s, [\d.e-]+ MB/s; librispeech [\d.]+ clips/s, [\d.e-]+ MB/s",
        line,
    )


ENDS = [
    (Fault("status", "resolve", status=404, path="lab/librispeech"), "HTTP 404 .*start again"),
    (Fault("stall"), "ReadTimeout.*gave up after attempt"),
    (Fault("status", "resolve", status=401), "HTTP 401 .*HF_TOKEN"),
    (Fault("gone"), "(refused|disconnected|peer closed).*gave up after attempt"),
]
"""What no retry cures, and the reason that is given."""


def assert_all_ended_by_themselves(done, run, reason: str) -> None:
    """One line says why; the checkpoint is of the last round that was done."""
    assert done.returncode == 1
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.match(rf"error: {SHARD}.*{reason}", errors[0]), errors
    assert errors[0].endswith("(go on with --run.resume auto)")
    assert "[rank" not in done.stderr  # torch's mark of a traceback
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["round"]) == ("failed", len(learned(run)))
    assert (run / f"checkpoints/round_{status['round']:08d}/COMPLETE").is_file()


def test_what_stays_ends_all_ranks_in_time_and_the_run_goes_on_as_if_nothing_had_happened(
    server, local, late, corpora_root, tmp_path
):
    run = tmp_path / "run"
    told = words(corpora_root, run, "--run.resume", "auto")
    at_the_hub = [*told, *hub_corpora.words("lab", **REMOTE)]
    done_before = 0
    for fault, reason in ENDS:
        fault = Fault(**vars(fault) | {"times": ENDLESS, "skip": late + 40})
        if fault.path != ".parquet":
            fault.skip = server.opening["librispeech"] + 20
        server.faults.append(fault)
        done = train(*at_the_hub)
        took = time.monotonic() - server.first_fault
        assert_all_ended_by_themselves(done, run, reason)
        print(f"{reason}: {took:.1f} s after the fault, after round {len(learned(run))}")
        assert took < REMOTE["patience_seconds"] + 2 * REMOTE["timeout_seconds"] + BUSY
        assert max(1, done_before) <= len(learned(run))
        done_before = len(learned(run))
        if fault.kind == "gone":
            server.reopen()
        server.reset()
        server.token = TOKEN

    disk = shutil.copytree(server.folder / "lab", tmp_path / "lab")
    on_disk = [*told, *hub_corpora.words(disk, **REMOTE)]
    script = str(tiny.REPOSITORY / "tests/workers/stalling_disk.py")
    done = worlds.launch("two_cpu_processes", script, "1", "6", *on_disk)
    assert_all_ended_by_themselves(done, run, "TimeoutError: no answer in .*gave up after attempt")
    stalled = [path for path in disk.rglob("*.parquet") if path.is_fifo()]
    assert any(f"{path}, row group" in done.stderr for path in stalled)
    for path in stalled:
        path.with_suffix(".parquet.moved").rename(path)
    assert done_before <= len(learned(run)) < ROUNDS

    done = train(*on_disk, "--data.workers", "0")
    assert done.returncode == 0, done.stderr
    assert learned(run) == learned(local)
