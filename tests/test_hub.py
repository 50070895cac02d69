"""Laws of reading from the Hub: what was written arrives, by few requests, through faults or with an end in bounded time.

The client is huggingface_hub and datasets themselves, in a process whose HF_ENDPOINT is tests/hub_server.py.
"""

import concurrent.futures
import json
import multiprocessing
import pickle
import shutil
import sys
import threading
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Fault, HubServer

from mtl_dist.streams.sources import Source

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import hub_client

TOKEN = "hf_aVerySecretToken"
BUSY = 15.0
"""Seconds that a busy machine may add to what is bounded."""
FAST = {"timeout_seconds": 0.5, "patience_seconds": 20, "first_wait_seconds": 0.05}
CARD = """---
configs:
- config_name: clean
  data_files:
  - {split: train.100, path: clean/train.100/*.parquet}
  - {split: test, path: clean/test/*.parquet}
- config_name: other
  data_files:
  - {split: train.500, path: other/train.500/*.parquet}
---
# A stand-in for openslr/librispeech_asr
"""
FILES = {
    "clean/train.100": [[8, 8, 3], [5]],
    "clean/test": [[2]],
    "other/train.500": [[7], [8, 1]],
}
"""Rows of each row group of each file."""


FEATURES = {
    "file": {"dtype": "string", "_type": "Value"},
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "speaker_id": {"dtype": "int64", "_type": "Value"},
    "chapter_id": {"dtype": "int64", "_type": "Value"},
    "id": {"dtype": "string", "_type": "Value"},
}


def write_librispeech(folder: Path) -> dict[str, list[dict]]:
    """Write the data set as the Hub lays it out; return the rows of each split."""
    written: dict[str, list[dict]] = {}
    draw = np.random.default_rng(0)
    for split, files in FILES.items():
        (folder / split).mkdir(parents=True)
        rows = written[split] = []
        for number, groups in enumerate(files):
            writer = None
            for count in groups:
                part = [row_of(split, len(rows) + i, draw) for i in range(count)]
                rows += part
                table = pa.Table.from_pylist(part).replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": FEATURES}})}
                )
                path = folder / split / f"{number:04d}.parquet"
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
            writer.close()
    (folder / "README.md").write_text(CARD)
    return written


def row_of(split: str, number: int, draw: np.random.Generator) -> dict:
    name = f"{split.replace('/', '-')}-{number:04d}"
    audio = {"bytes": draw.bytes(int(draw.integers(15_000, 20_000))), "path": f"{name}.flac"}
    return {
        "file": f"/x/{name}.flac",
        "audio": audio,
        "text": "A WORD " * 20,
        "speaker_id": number // 4,
        "chapter_id": number // 2,
        "id": name,
    }


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with openslr/librispeech_asr, a client process, and the rows that were written."""
    root = tmp_path_factory.mktemp("hub")
    server = HubServer(root)
    server.written = write_librispeech(root / "openslr" / "librispeech_asr")
    server.pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", server.endpoint)
        environment.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        environment.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        environment.delenv("HF_TOKEN", raising=False)
        server.pool.submit(hub_client.call, "warm_up").result(120)
    yield server
    server.pool.shutdown()
    server.close()


@pytest.fixture
def client(hub):
    """Call functions of tests/workers/hub_client.py in the client process; the server forgets faults and counts."""
    hub.reset()

    def call(*args, **kwargs) -> dict:
        return hub.pool.submit(hub_client.call, *args, **kwargs).result(60)

    return call


@pytest.fixture(scope="module")
def opened(hub):
    """What rank 0 sends to the others, for clean/train.100."""
    hub.reset()
    outcome = hub.pool.submit(hub_client.call, "open_shards", "speech", [clean()], **FAST).result(
        60
    )
    return outcome["result"]


@pytest.fixture
def copy_of_hub(hub):
    """Another data set with the same files, which no cache of the client knows: its id and folder."""
    folder = hub.folder / "copies" / f"copy-{len(list(hub.folder.glob('copies/*')))}"
    shutil.copytree(hub.folder / "openslr" / "librispeech_asr", folder)
    return f"copies/{folder.name}", folder


def clean(repo: str = "openslr/librispeech_asr", split: str = "train.100") -> Source:
    return Source(path=repo, config="clean", split=split, columns={"speaker": "speaker_id"})


def audio_of(rows: list[dict]) -> list[dict]:
    return [row["audio"] for row in rows]


def test_the_blocks_of_two_splits_are_the_rows_that_were_written(hub, client):
    other = Source(path="openslr/librispeech_asr", config="other", split="train.500")
    sent = client("open_shards", "speech", [clean(), other])["result"]
    shards = pickle.loads(sent)
    groups = [
        n for split in ("clean/train.100", "other/train.500") for f in FILES[split] for n in f
    ]
    assert shards.rows.tolist() == groups
    assert shards.source.tolist() == [0, 0, 0, 0, 1, 1, 1]
    assert shards.name(3) == "openslr/librispeech_asr/clean/train.100/0001.parquet, row group 0"
    assert all(f"@{COMMIT}/" in file for file in shards.files)
    written = hub.written["clean/train.100"] + hub.written["other/train.500"]
    blocks = client("read", sent, list(range(len(shards))))["result"]
    assert [row for block in blocks for row in block] == audio_of(written)
    rows = client("listing", sent)["result"]
    assert [row["id"] for row in rows] == [row["id"] for row in written]
    assert [row["speaker"] for row in rows[:24]] == [str(row["speaker_id"]) for row in written[:24]]
    assert [(row["block"], row["place"]) for row in rows] == [
        (block, place) for block, count in enumerate(groups) for place in range(count)
    ]


def test_files_are_listed_once_and_a_block_is_one_request(hub, client):
    sent = client("open_shards", "speech", [clean()])["result"]
    footers = len(FILES["clean/train.100"])
    parquet = [line for line in hub.log if ".parquet" in line and "/resolve/" in line]
    assert len(parquet) == footers
    assert len(hub.log) - 2 * footers <= 12, hub.log  # the card, the commit, one list a folder
    hub.reset()
    client("read", sent, [0, 2, 3, 0])
    # One request, which the Hub answers by sending the client to its storage.
    assert hub.requests == {"resolve": 4, "storage": 4}


def test_a_listing_reads_no_audio_and_only_the_columns_that_are_asked_for(hub, client, opened):
    rows = hub.written["clean/train.100"]
    audio = sum(len(row["audio"]["bytes"]) for row in rows)
    client("listing", opened)
    everything = hub.bytes_sent
    assert set(hub.requests) == {"resolve", "storage"}
    assert hub.requests["storage"] <= 2 * len(pickle.loads(opened)) + 2
    assert everything < 0.05 * audio
    hub.reset()
    few = client("listing", opened, ["chapter_id"])["result"]
    assert set(few[0]) == {"id", "speaker", "chapter_id", "block", "place"}
    assert hub.bytes_sent < everything


FAULTS = {
    "429": Fault("status", "resolve", status=429, times=2),
    "429 with Retry-After": Fault("status", "resolve", status=429, headers={"Retry-After": "1"}),
    "429 with the Hub's header": Fault(
        "status", "resolve", status=429, headers={"RateLimit": '"resolvers";r=0;t=1'}
    ),
    "500": Fault("status", "storage", status=500, times=3),
    "503": Fault("status", "resolve", status=503, times=3),
    "504": Fault("status", "storage", status=504),
    "a cut transfer": Fault("cut", times=2),
    "a stall": Fault("stall", times=2),
    "a trickle": Fault("trickle"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_survived_with_the_back_off_in_the_log(hub, client, opened, fault):
    hub.faults.append(Fault(**vars(FAULTS[fault])))
    outcome = client("read", opened, [1])
    assert outcome["result"] == [audio_of(hub.written["clean/train.100"])[8:16]]
    assert len(outcome["lines"]) == FAULTS[fault].times
    for number, line in enumerate(outcome["lines"], 1):
        assert "rank 3 on" in line
        assert (
            "corpus speech, openslr/librispeech_asr/clean/train.100/0000.parquet, row group 1:"
            in line
        )
        assert f"attempt {number}, again in " in line
    if FAULTS[fault].headers:
        assert outcome["seconds"] >= 1
    else:
        waits = [float(line.split("again in ")[1].split()[0]) for line in outcome["lines"]]
        assert waits == sorted(waits)
        assert outcome["seconds"] < 5 + BUSY


def test_after_a_cut_the_transfer_goes_on_where_it_was(hub, client, opened):
    client("read", opened, [1])
    whole = hub.bytes_sent
    hub.reset()
    hub.faults.append(Fault("cut", times=3))
    client("read", opened, [1])
    assert hub.bytes_sent == whole
    assert hub.requests["storage"] == 4


def test_a_server_that_is_away_for_a_moment_is_waited_for(hub, client, opened):
    hub.close()
    back = threading.Timer(1, hub.reopen)
    back.start()
    outcome = client("read", opened, [1])
    back.join()
    assert outcome["result"] == [audio_of(hub.written["clean/train.100"])[8:16]]
    assert any("refused" in line for line in outcome["lines"])
    assert all("rank 3 on" in line for line in outcome["lines"])


def test_a_slow_server_is_no_fault(hub, client, opened):
    hub.faults += [Fault("slow", "resolve", times=2), Fault("slow", times=2)]
    outcome = client("read", opened, [1, 3])
    assert len(outcome["result"][0]) == 8
    assert outcome["seconds"] >= 0.4
    assert not outcome["lines"]


def test_the_workers_of_a_loader_read_while_their_parent_does(hub, client, opened):
    first = audio_of(hub.written["clean/train.100"])[:8]
    assert client("read_around_a_fork", opened, 0)["result"] == [first] * 3


ENDLESS = {
    "503": Fault("status", "resolve", times=1000),
    "stall": Fault("stall", times=1000),
    "cut": Fault("status", "storage", times=1000, status=502),
    "trickle": Fault("trickle", times=1000),
}


@pytest.mark.parametrize("fault", ENDLESS)
def test_a_fault_that_stays_ends_in_bounded_time_and_names_rank_corpus_shard_and_reason(
    hub, client, fault
):
    remote = {"timeout_seconds": 0.3, "patience_seconds": 1, "first_wait_seconds": 0.1}
    sent = client("open_shards", "speech", [clean()], **remote)["result"]
    hub.faults.append(Fault(**vars(ENDLESS[fault])))
    outcome = client("read", sent, [1], 5)
    where = "corpus speech, openslr/librispeech_asr/clean/train.100/0000.parquet, row group 1: "
    assert "rank 5 on" in outcome["error"]
    assert where in outcome["error"]
    assert "gave up after attempt" in outcome["error"]
    assert outcome["seconds"] < 1 + 1 + BUSY
    assert len(outcome["lines"]) >= 1


def test_a_wait_that_is_asked_for_and_longer_than_patience_ends_at_once(hub, client, opened):
    hub.faults.append(
        Fault("status", "resolve", times=99, status=429, headers={"Retry-After": "3600"})
    )
    outcome = client("read", opened, [1])
    assert "the server asks for 3600 s" in outcome["error"]
    assert outcome["seconds"] < 2 + BUSY


@pytest.mark.parametrize(
    ("status", "remedy"),
    [(401, "HF_TOKEN"), (403, "terms"), (404, "start again"), (416, "shorter")],
)
def test_what_no_retry_cures_ends_at_once_with_the_remedy(hub, client, opened, status, remedy):
    hub.faults.append(Fault("status", "resolve", times=99, status=status))
    outcome = client("read", opened, [1])
    assert f"HTTP {status}" in outcome["error"]
    assert remedy in outcome["error"]
    assert "row group 1" in outcome["error"]
    assert hub.requests["resolve"] == 1
    assert not outcome["lines"]


OPENING = {
    "the card": Fault("status", "resolve", "README.md", times=2),
    "the commit": Fault("status", "revision", "", times=2, status=500),
    "the list": Fault("status", "tree", "", times=1, status=429),
    "a footer": Fault("cut", "storage", times=2),
    "a stalled list": Fault("stall", "tree", "", times=1, seconds=1),
}


@pytest.mark.parametrize("fault", OPENING)
def test_opening_survives_faults(hub, client, copy_of_hub, fault):
    repo, _ = copy_of_hub
    hub.faults.append(Fault(**vars(OPENING[fault])))
    outcome = client("open_shards", "speech", [clean(repo)], **FAST)
    assert "error" not in outcome, outcome["error"]
    assert pickle.loads(outcome["result"]).rows.tolist() == [8, 8, 3, 5]
    assert hub.faults[0].times == 0


@pytest.mark.parametrize("kind", ["status", "stall"])
@pytest.mark.parametrize("route", ["tree", "resolve"])
def test_opening_ends_in_bounded_time_where_a_fault_stays(hub, client, copy_of_hub, kind, route):
    repo, _ = copy_of_hub
    hub.faults.append(Fault(kind, route, "", times=10_000))
    remote = {"timeout_seconds": 0.3, "patience_seconds": 1, "first_wait_seconds": 0.1}
    outcome = client("open_shards", "speech", [clean(repo)], **remote)
    assert f"corpus speech, source {repo}" in outcome["error"]
    assert "rank 0 on" in outcome["error"]
    assert outcome["seconds"] < 2 * 1 + 1 + BUSY


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (Source(path="nobody/nothing"), ["nobody/nothing", "hf auth login"]),
        (clean(split="train.999"), ["train.999", "train.100, test"]),
        (Source(path="openslr/librispeech_asr", config="dirty"), ["dirty", "clean"]),
        (Source(path="openslr/librispeech_asr", revision="v9", config="clean"), ["v9"]),
        (Source(path="hf://datasets/openslr/librispeech_asr/none/*.parquet"), ["none/*.parquet"]),
    ],
)
def test_what_is_not_there_is_named_without_a_retry(client, source, words):
    outcome = client("open_shards", "speech", [source], **FAST)
    for word in words:
        assert word in outcome["error"]
    assert not outcome["lines"]


def test_offline_mode_is_named_at_once(client, opened, copy_of_hub):
    outcome = client("offline", opened, clean(copy_of_hub[0]))
    assert len(outcome["result"]) == 2
    assert all("unset HF_HUB_OFFLINE" in error for error in outcome["result"])
    assert not outcome["lines"]


def test_a_url_of_hub_files_is_pinned_to_the_commit(hub, client):
    source = Source(path="hf://datasets/openslr/librispeech_asr/clean/train.100/*.parquet")
    sent = client("open_shards", "speech", [source])["result"]
    assert (
        pickle.loads(sent).files[0].startswith(f"hf://datasets/openslr/librispeech_asr@{COMMIT}/")
    )
    assert client("read", sent, [3])["result"] == [audio_of(hub.written["clean/train.100"])[19:]]


def test_a_data_set_that_is_not_parquet_is_read_from_the_branch_that_the_hub_converts(hub, client):
    (hub.folder / "someone/noise").mkdir(parents=True)
    (hub.folder / "someone/noise/BGD_1_010_BUS.CH1.wav").write_bytes(b"RIFF")
    split = hub.folder / "someone/noise@parquet" / "default" / "train"
    shutil.copytree(hub.folder / "openslr/librispeech_asr/clean/test", split)
    refused = client("open_shards", "noise", [Source(path="someone/noise")], **FAST)["error"]
    assert "BUS.CH1.wav is not Parquet" in refused
    assert "revision: refs/convert/parquet" in refused
    source = Source(path="someone/noise", revision="refs/convert/parquet")
    sent = client("open_shards", "noise", [source], **FAST)["result"]
    assert client("read", sent, [0])["result"] == [audio_of(hub.written["clean/test"])]


def test_a_shard_that_vanishes_is_named(client, copy_of_hub):
    repo, folder = copy_of_hub
    sent = client("open_shards", "speech", [clean(repo)], **FAST)["result"]
    (folder / "clean/train.100/0001.parquet").unlink()
    assert "result" in client("read", sent, [2])
    error = client("read", sent, [3])["error"]
    assert f"{repo}/clean/train.100/0001.parquet, row group 0: HTTP 404" in error


def test_a_shard_that_is_replaced_is_named(client, copy_of_hub):
    repo, folder = copy_of_hub
    sent = client("open_shards", "speech", [clean(repo)], **FAST)["result"]
    path = folder / "clean/train.100/0001.parquet"
    path.write_bytes(path.read_bytes() + b"more")
    error = client("read", sent, [3])["error"]
    assert f"{repo}/clean/train.100/0001.parquet, row group 0: the file has" in error


def test_a_private_data_set_needs_a_token_which_is_neither_logged_nor_sent(
    hub, client, copy_of_hub
):
    repo, _ = copy_of_hub
    hub.token = TOKEN
    refused = client("open_shards", "speech", [clean(repo)], **FAST)
    assert "hf auth login" in refused["error"]
    assert not refused["lines"]
    opened = client("open_shards", "speech", [clean(repo)], token=TOKEN, **FAST)
    hub.faults += [Fault("status", "storage"), Fault("cut", "storage")]
    read = client("read", opened["result"], [0], token=TOKEN)
    assert read["result"] == [audio_of(hub.written["clean/train.100"])[:8]]
    assert len(read["lines"]) == 2
    hub.faults.append(Fault("status", "storage", status=403))
    forbidden = client("read", opened["result"], [0], token=TOKEN)
    assert "HTTP 403" in forbidden["error"]
    seen = repr([refused, opened, read["all"], forbidden])
    assert TOKEN not in seen
    assert "Signature" not in seen


def test_the_cache_spares_requests_in_this_run_and_the_next(hub, client, tmp_path):
    cached = {"cache": str(tmp_path / "cache"), "cache_gigabytes": 0.01, **FAST}
    sent = client("open_shards", "speech", [clean()], **cached)["result"]
    hub.reset()
    first = client("read", sent, [0, 1, 2, 3])["result"]
    assert hub.requests == {"resolve": 4, "storage": 4}
    hub.reset()
    assert client("read", sent, [3, 2, 1, 0])["result"] == first[::-1]
    assert not hub.requests
    again = client("open_shards", "speech", [clean()], **cached)["result"]
    hub.reset()
    assert client("read", again, [0, 1])["result"] == first[:2]
    assert not hub.requests


def test_a_cached_block_that_is_not_whole_is_fetched_again(hub, client, tmp_path):
    cached = {"cache": str(tmp_path / "cache"), "cache_gigabytes": 0.01, **FAST}
    sent = client("open_shards", "speech", [clean()], **cached)["result"]
    first = client("read", sent, [0, 1])["result"]
    kept = sorted((tmp_path / "cache").iterdir())
    kept[0].write_bytes(kept[0].read_bytes()[:-100])
    kept[1].write_bytes(b"\0" * kept[1].stat().st_size)
    hub.reset()
    assert client("read", sent, [0, 1])["result"] == first
    assert hub.requests["storage"] == 2
