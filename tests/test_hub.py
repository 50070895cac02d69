"""Laws of reading from the Hub: what was written arrives, by few requests, and what is not there is named.

The client is huggingface_hub and datasets themselves (hub_fixtures.py). Faults: test_hub_faults.py; runs: test_hub_run.py.
"""

import pickle
import shutil

import pytest
from hub_fixtures import FAST, FILES, clean
from hub_server import COMMIT, Fault
from parquet_files import audio_of

from mtl_dist.streams.sources import Source

TOKEN = "hf_aVerySecretToken"


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


def test_the_workers_of_a_loader_read_while_their_parent_does(hub, client, opened):
    first = audio_of(hub.written["clean/train.100"])[:8]
    assert client("read_around_a_fork", opened, 0)["result"] == [first] * 3


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
    (hub.folder / "someone/noise/clips.jsonl").write_text('{"id": 1}')
    split = hub.folder / "someone/noise@parquet" / "default" / "train"
    shutil.copytree(hub.folder / "openslr/librispeech_asr/clean/test", split)
    refused = client("open_shards", "noise", [Source(path="someone/noise")], **FAST)["error"]
    assert "clips.jsonl is not Parquet" in refused
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
