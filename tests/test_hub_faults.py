"""Laws of faults of the Hub: what a retry can cure is survived, what it cannot ends in bounded time, and is named."""

import threading
import time

import hub_client
import hub_corpora
import pytest
import tiny
from hub_corpora import NOISE
from hub_fixtures import BUSY, RETRIED
from hub_server import Fault

from mtl_dist.config import load_config
from mtl_dist.data.faults import DataError
from mtl_dist.data.lanes import Blocks
from mtl_dist.experiment import open_corpus

WHERE = r"rank 5 on \S+, corpus librispeech, hf://\S+/clean/train.100/0000.parquet, part 1 of 3: "
FAULTS = {
    "429": Fault("status", "resolve", status=429),
    "429 with Retry-After": Fault("status", "resolve", status=429, times=2, headers=RETRIED),
    "429 with the Hub's header": Fault(
        "status", "resolve", status=429, headers={"RateLimit": '"resolvers";r=0;t=1'}
    ),
    "503 of the storage": Fault("status", "storage", times=2, headers=RETRIED),
    "more 503 than huggingface_hub bears": Fault(
        "status", "storage", times=7, headers=RETRIED, status=504
    ),
    "a cut transfer": Fault("cut", times=2),
    "a stall": Fault("stall", times=1),
    "a slow server": Fault("slow", times=9),
    "a trickle that ends": Fault("trickle", seconds=2),
}


def opened(name: str, patience: float = 60, *more: str):
    """Open a corpus as rank 0 does, with short waits."""
    fast = {"timeout_seconds": 0.5, "retries": 3, "wait_seconds": 0.1}
    words = hub_corpora.words(**fast, patience_seconds=patience)
    config = load_config(tiny.tiny_words(tiny.REPOSITORY, *words, *more))
    config.remote.apply()
    return open_corpus(config, name)


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_that_a_retry_cures_gives_the_same_rows(hub, name):
    corpus = opened("librispeech")
    hub.faults.append(fault := Fault(**vars(FAULTS[name])))
    (block,) = hub_client.rows_of(Blocks(corpus.parts["train"], 5, 60), [1])
    first, *_ = sorted(block)
    assert first == "train.100-0008"
    assert block == {clip: hub.written["train.100"][clip] for clip in block}
    assert len(block) == 8
    assert fault.times < FAULTS[name].times


def test_a_server_that_is_away_for_a_moment_is_waited_for(hub):
    corpus = opened("librispeech")
    hub.close()
    back = threading.Timer(1, hub.reopen)
    back.start()
    (block,) = hub_client.rows_of(Blocks(corpus.parts["train"], 5, 60), [3])
    back.join()
    assert block == dict(list(hub.written["train.100"].items())[19:])


ENDLESS = 10**9
ENDS = {
    "503": (Fault("status", "resolve", times=ENDLESS), "TimeoutError: no answer in 3 s"),
    "429 for an hour": (
        Fault("status", "resolve", times=ENDLESS, status=429, headers={"Retry-After": "3600"}),
        "TimeoutError: no answer in 3 s",
    ),
    "stall": (Fault("stall", times=ENDLESS), "TimeoutError: no answer in 3 s"),
    "trickle": (Fault("trickle", times=ENDLESS), "TimeoutError: no answer in 3 s"),
    "401": (Fault("status", "resolve", times=ENDLESS, status=401), "HTTP 401.*HF_TOKEN"),
    "403": (Fault("status", "resolve", times=ENDLESS, status=403), "HTTP 403.*terms"),
    "404": (Fault("status", "resolve", times=ENDLESS, status=404), "HTTP 404.*check path"),
    "416": (Fault("status", "storage", times=ENDLESS, status=416), "HTTP 416.*start again"),
}


@pytest.mark.parametrize("name", ENDS)
def test_what_stays_ends_in_bounded_time_and_names_rank_corpus_file_and_reason(hub, name):
    blocks = Blocks(opened("librispeech").parts["train"], 5, 3)
    hub.reset()
    fault, said = ENDS[name]
    hub.faults.append(Fault(**vars(fault)))
    began = time.monotonic()
    with pytest.raises(DataError, match=WHERE + f".*{said}") as caught:
        hub_client.in_a_fork(hub_client.rows_of, blocks, [1])
    assert "\n" not in str(caught.value)
    assert time.monotonic() - began < 3 + BUSY
    if fault.status in (401, 403, 404, 416):
        assert sum("/storage/" in line for line in hub.log) <= 2  # no retry can cure it
    hub.reset()


FAR = {
    "404": (Fault("status", "resolve", ".wav", ENDLESS, status=404), "HTTP 404.*check path"),
    "trickle": (Fault("trickle", path=".wav", times=ENDLESS), "TimeoutError: no answer in 3 s"),
    "cut": (Fault("cut", path=".wav", times=2), None),
}


@pytest.mark.parametrize("name", FAR)
def test_a_recording_at_a_url_is_borne_and_bounded_as_a_block_is(hub, name):
    blocks = Blocks(opened("chime3").noise("train"), 5)
    ((_, row),) = blocks.rows(0, ("key",))
    fault, said = FAR[name]
    hub.faults.append(Fault(**vars(fault)))
    if said is None:
        assert len(hub_client.stretch(row, 16_000)) == 16_000
        return
    where = rf"rank 5 on \S+, corpus chime3, hf://datasets/{NOISE}@\S+/BGD_\S+\.wav: .*{said}"
    began = time.monotonic()
    with pytest.raises(DataError, match=where):
        hub_client.in_a_fork(hub_client.stretch, row, 16_000, 3)
    assert time.monotonic() - began < 3 + BUSY


OPENING = {
    "the card": Fault("status", "resolve", "README.md", headers=RETRIED),
    "the list": Fault("status", "tree", "", status=429, headers=RETRIED),
    "a footer": Fault("cut", times=2),
}


@pytest.mark.parametrize("name", OPENING)
def test_opening_survives_faults(hub, copy_of_hub, name):
    hub.faults.append(Fault(**vars(OPENING[name])))
    source = f"[{{path: {copy_of_hub[0]}, config: clean, split: train.100}}]"
    corpus = opened("librispeech", 60, "--corpora.librispeech.sources", source)
    assert len(corpus.parts["train"][0].blocks) == 6
    assert hub.faults[0].times < OPENING[name].times


@pytest.mark.parametrize("kind", ["status", "stall"])
@pytest.mark.parametrize("route", ["tree", "storage"])
def test_opening_ends_in_bounded_time_where_a_fault_stays(hub, kind, route):
    hub.faults.append(Fault(kind, route, "", times=ENDLESS))
    began = time.monotonic()
    with pytest.raises(ValueError, match=r"^corpora\.librispeech: TimeoutError: no answer in 3 s"):
        hub_client.in_a_fork(opened, "librispeech", 3)
    assert time.monotonic() - began < 3 + BUSY
