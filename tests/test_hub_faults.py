"""Laws of faults of the Hub: what a retry can cure is survived, what it cannot ends in bounded time, and is named."""

import pickle
import threading

import pytest
from hub_fixtures import BUSY, FAST, clean
from hub_server import Fault
from parquet_files import audio_of

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
