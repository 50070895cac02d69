"""Laws of reading from the Hub: what was written arrives, by few requests, and what is not there is named.

The client is huggingface_hub and datasets themselves. Faults: test_hub_faults.py; runs: test_hub_run.py.
"""

import io
import logging
import pickle
import re

import hub_client
import hub_corpora
import numpy as np
import pytest
import soundfile
import tiny
from hub_corpora import NOISE, SPEECH, SPLITS
from hub_fixtures import TOKEN
from hub_server import COMMIT, Fault

from mtl_dist.config import load_config
from mtl_dist.data.lanes import Blocks, Lane
from mtl_dist.experiment import open_corpus

LISTINGS = ("/api/", "HEAD ")


def opened(name: str, *more: str):
    """Open a corpus as rank 0 does."""
    words = hub_corpora.words(retries=1, wait_seconds=0.1)
    config = load_config(tiny.tiny_words(tiny.REPOSITORY, *words, *more))
    config.remote.apply()
    return open_corpus(config, name)


def speech(path: str = SPEECH, **more: str) -> list[str]:
    source = {"path": path, "config": "clean", "split": "train.100", **more}
    told = ", ".join(f"{key}: {value}" for key, value in source.items() if value)
    return ["--corpora.librispeech.sources", f"[{{{told}}}]"]


def test_a_split_streams_through_lanes_with_the_sides_of_the_data_set_and_pinned_to_its_commit(hub):
    corpus = opened("librispeech")
    for ours, theirs in {"train": "train.100", "validation": "validation", "test": "test"}.items():
        (part,) = corpus.parts[ours]
        assert all(f"/{SPEECH}@{COMMIT}/clean/{theirs}/" in name for name in part.files.names)
        assert len(part.blocks) == len(SPLITS[theirs]) * len(SPLITS[theirs][0])
        numbers = list(range(len(part.blocks)))
        blocks = hub_client.rows_of(Blocks([part]), numbers)
        found = [len(block) for block in blocks if block]
        assert found == [n for file in SPLITS[theirs] for n in file]
        assert {k: v for block in blocks for k, v in block.items()} == hub.written[theirs]
    blocks = Blocks(corpus.parts["train"])
    clips = [next(lane)[1].id for lane in [Lane(blocks, 4, n, (0,)) for n in range(4)]]
    lane = Lane(blocks, 1, 0, (0,))
    epoch = {next(lane)[1].id for _ in hub.written["train.100"]}
    assert epoch == {f"librispeech/{clip}" for clip in hub.written["train.100"]} > set(clips)


@pytest.mark.parametrize("place", ["another rank", "a loader's worker of rank 0", "rank 0"])
def test_what_rank_0_found_is_asked_for_by_nobody_and_a_block_is_two_requests(hub, place):
    corpus = opened("librispeech")
    sent = pickle.dumps(corpus)
    assert len(sent) < 40_000
    lists = [line for line in hub.log if "/tree/" in line or "/revision/" in line]
    # The commit, and each folder once; again by the file system that reads little ahead.
    assert 0 < len(lists) <= 3 + 2 * len(SPLITS) + 1, lists
    hub.reset()
    asked = {
        "another rank": lambda: hub_client.in_a_new_process(
            hub_client.read, sent, "train", [0, 1, 3]
        ),
        "a loader's worker of rank 0": lambda: hub_client.in_a_fork(
            hub_client.rows_of, Blocks(corpus.parts["train"]), [0, 1, 3]
        ),
        "rank 0": lambda: hub_client.rows_of(Blocks(corpus.parts["train"]), [0, 1, 3]),
    }
    found = asked[place]()
    assert [list(map(hash, block.values())) for block in found] == [
        [hash(hub.written["train.100"][clip]) for clip in block] for block in found
    ]
    files = [line for line in hub.log if not line.startswith("GET /api/agent-harnesses")]
    assert not any(part in line for line in files for part in LISTINGS), files
    storage = [line for line in files if "/storage/" in line]
    assert len(files) == 2 * len(storage)  # the Hub sends the client to its storage
    assert len(storage) == 2 * len(found), storage  # a footer and the data
    audio = sum(len(flac) for block in found for flac in block.values())
    print(f"{hub.bytes_sent} bytes for {audio} of {sum(map(len, found))} clips")
    assert hub.bytes_sent < 1.1 * audio + len(storage) * (1 << 16)


def test_the_workers_of_a_loader_read_while_their_parent_does(hub):
    blocks = Blocks(opened("librispeech").parts["train"])
    before = hub_client.rows_of(blocks, [0])
    assert hub_client.in_a_fork(hub_client.rows_of, blocks, [0]) == before
    assert hub_client.rows_of(blocks, [0]) == before


def test_noise_of_wav_files_is_cut_by_ranges_and_another_rank_lists_nothing(hub):
    sent = pickle.dumps(opened("chime3"))
    hub.reset()
    stretches = hub_client.in_a_new_process(hub_client.cut, sent, 16_000)
    files = sorted((hub.folder / NOISE / "data").iterdir())
    waves = [soundfile.read(path, dtype="float32")[0] for path in files]
    for stretch in stretches:
        assert any(_holds(wave, stretch) for wave in waves)
    asked = [line for line in hub.log if not line.startswith("GET /api/agent-harnesses")]
    assert not any(part in line for line in asked for part in LISTINGS), asked
    print(f"{hub.requests['storage'] / 4} requests, {hub.bytes_sent / 4} bytes a cut")
    assert hub.requests["storage"] <= 2 * len(files)
    assert hub.bytes_sent < 0.5 * sum(path.stat().st_size for path in files)


def _holds(wave: np.ndarray, stretch: np.ndarray) -> bool:
    starts = np.flatnonzero(wave[: len(wave) - len(stretch) + 1] == stretch[0])
    return any((wave[n : n + len(stretch)] == stretch).all() for n in starts)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        (speech("nobody/nothing"), "nobody/nothing.*hf auth login"),
        (speech(split="train.999"), r"train\.999.*train\.100, validation, test"),
        (speech(config="dirty"), "dirty.*clean"),
        (speech(revision="v9"), "v9"),
    ],
)
def test_what_is_not_there_is_named(hub, source, said):
    with pytest.raises(ValueError, match=said) as caught:
        opened("librispeech", *source)
    assert re.match(r"corpora\.librispeech\.sources\[0\]: ", str(caught.value))
    assert "\n" not in str(caught.value)


GATED = {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"}


def test_a_private_data_set_needs_a_token_and_a_gated_one_consent_and_nothing_says_the_token(
    hub, copy_of_hub, monkeypatch
):
    source = speech(copy_of_hub[0])
    hub.token, printed = TOKEN, io.StringIO()
    for library in ("datasets", "huggingface_hub"):
        for handler in logging.getLogger(library).handlers:
            monkeypatch.setattr(handler, "stream", printed)
    with pytest.raises(ValueError, match="hf auth login") as private:
        opened("librispeech", *source)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    hub.faults.append(Fault("status", "resolve", "README.md", 99, status=403, headers=GATED))
    with pytest.raises(ValueError, match=r"gated.*terms") as gated:
        opened("librispeech", *source)
    hub.reset()
    hub.token = TOKEN
    corpus = opened("librispeech", *source)
    hub.faults.append(
        Fault("status", "storage", times=99, status=429, headers={"Retry-After": "0"})
    )
    with pytest.raises(Exception, match=r"HTTP 429.*fewer data\.workers") as busy:
        hub_client.rows_of(Blocks(corpus.parts["train"], 3, 60), [0])
    said = [str(caught.value) for caught in (private, gated, busy)]
    said += [pickle.dumps(corpus).decode("latin1"), printed.getvalue()]
    assert "429 Too Many Requests for url" in said[-1]  # datasets quotes the answer of the storage
    assert not any(TOKEN in text or "signed-secret" in text for text in said)
