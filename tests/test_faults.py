"""Faults are bounded and named: settings that reach the libraries, a time limit for what may never answer, errors in a line.

The Hub's own faults: test_hub_faults.py.
"""

import logging
import multiprocessing
import os
import threading
import time

import datasets
import huggingface_hub
import pytest
import tiny
from huggingface_hub.errors import HfHubHTTPError

from mtl_dist.data import faults
from mtl_dist.data.faults import RemoteConfig, call_with_timeout, reason

SOON = 15.0
"""Seconds in which a busy machine comes to do a thing."""
SIGNED = "http://localhost:1/storage/a.parquet?Signature=signed-secret&X-Amz=1"
TOKEN = "hf_aVerySecretToken"


def test_the_settings_are_those_of_the_libraries(hub):
    RemoteConfig(timeout_seconds=3, retries=2, wait_seconds=4).apply()
    constants, config = huggingface_hub.constants, datasets.config
    assert (constants.HF_HUB_DOWNLOAD_TIMEOUT, constants.HF_HUB_ETAG_TIMEOUT) == (3, 3)
    set_to = {name: value for name, value in vars(config).items() if name.startswith("STREAMING_")}
    retries = {"STREAMING_OPEN_MAX_RETRIES": 2, "STREAMING_READ_MAX_RETRIES": 2}
    assert set_to == dict.fromkeys(set_to, 4) | retries
    assert len(set_to) == 6


@pytest.mark.parametrize("name", ["timeout_seconds", "retries", "wait_seconds", "patience_seconds"])
def test_a_setting_that_is_not_positive_is_refused(name):
    with pytest.raises(ValueError, match=rf"{name}: 0 is not allowed; use more than 0"):
        RemoteConfig(**{name: 0})


WARNS = """
import logging
from mtl_dist.data.faults import RemoteConfig
logging.basicConfig()
for _ in range(2):
    RemoteConfig().apply()
for library in ("datasets", "huggingface_hub"):
    logging.getLogger(library + ".somewhere").warning("HTTP 429 for %s (%s)", SIGNED, TOKEN)
"""


def test_warnings_of_the_libraries_are_printed_once_without_what_is_secret():
    done = tiny.run_process(["-c", f"SIGNED, TOKEN = {SIGNED!r}, {TOKEN!r}\n{WARNS}"])
    line = "HTTP 429 for http://localhost:1/storage/a.parquet (hf_***)"
    assert done.stderr.splitlines() == [line] * 2


def test_what_an_action_returns_or_raises_is_passed_on():
    assert call_with_timeout(lambda: 7, SOON, "x") == 7
    with pytest.raises(KeyError, match="lost"):
        call_with_timeout(lambda: {}["lost"], SOON, "x")


def test_actions_that_answer_share_a_thread_and_at_once_have_one_each():
    threads = {call_with_timeout(threading.get_ident, SOON, "x") for _ in range(50)}
    assert len(threads - {threading.get_ident()}) == len(threads) == 1
    inner = call_with_timeout(lambda: call_with_timeout(threading.get_ident, SOON, "y"), SOON, "x")
    assert inner not in threads


def test_an_action_that_does_not_answer_is_given_up_in_time_and_the_next_one_is_done():
    lasting, before = threading.Event(), threading.active_count()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.2 s \(remote\.patience_seconds\)"):
        call_with_timeout(lasting.wait, 0.2, "x")
    assert 0.2 <= time.monotonic() - began < SOON
    lasting.set()
    assert [call_with_timeout(lambda n=n: n, SOON, "x") for n in range(3)] == [0, 1, 2]
    until = time.monotonic() + SOON
    while threading.active_count() > before + 1 and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() <= before + 1  # that which was given up has ended


def _answer(queue) -> None:
    queue.put(call_with_timeout(os.getpid, SOON, "x"))


def test_a_forked_process_has_threads_of_its_own():
    call_with_timeout(os.getpid, SOON, "x")
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    child = context.Process(target=_answer, args=(queue,))
    child.start()
    child.join(SOON)
    assert child.exitcode == 0
    assert queue.get() == child.pid


def test_what_is_waited_for_is_said_after_twice_and_four_times_as_long(monkeypatch, caplog):
    monkeypatch.setattr(faults, "FIRST_NOTE_SECONDS", 1.0)
    lasting, what = threading.Event(), "rank 1, corpus speech, a.parquet, row group 3"
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        call_with_timeout(lambda: 1, SOON, "a short read")
        with pytest.raises(TimeoutError):
            call_with_timeout(lasting.wait, 5, what)
    lasting.set()
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{what}: waiting for data for {n} s" for n in (1, 2, 4)]


@pytest.mark.parametrize(
    ("status", "remedy"),
    [
        (401, "hf auth login"),
        (403, "terms"),
        (404, "revision"),
        (429, "data.workers"),
        (500, "later"),
    ],
)
def test_an_answer_of_the_hub_is_a_line_with_its_remedy_however_deep_it_lies(status, remedy):
    response = huggingface_hub.utils.httpx.Response(status, request=_request())
    try:
        try:
            raise HfHubHTTPError(f"{status} for url {SIGNED}\n\nBearer {TOKEN}", response=response)
        except HfHubHTTPError:
            raise ConnectionError(f"gone: {SIGNED}\nsecond line") from None
    except ConnectionError as error:
        said = reason(error)
    assert said.startswith("ConnectionError: gone: http://localhost:1/storage/a.parquet (HTTP ")
    assert f"(HTTP {status})" in said
    assert remedy in said
    assert not any(word in said for word in ("\n", "secret", "Secret", "second"))


def _request():
    return huggingface_hub.utils.httpx.Request("GET", SIGNED)


def test_a_token_in_any_other_error_is_hidden():
    assert reason(OSError(f"cannot\nopen '{SIGNED}' with {TOKEN}")) == (
        "OSError: cannot open 'http://localhost:1/storage/a.parquet' with hf_***"
    )
