"""A read that may never answer has a time limit, and the log says what is waited for while it lasts."""

import itertools
import logging
import multiprocessing
import os
import threading
import time

import pytest

from mtl_dist.streams import waiting
from mtl_dist.streams.fetch import read_range
from mtl_dist.streams.retry import Remote, ShardError, persist
from mtl_dist.streams.waiting import told, within

SOON = 15.0
"""Seconds in which a busy machine comes to do a thing."""


def test_an_action_that_answers_is_an_action():
    assert within(SOON, lambda: 7) == 7
    with pytest.raises(KeyError, match="lost"):
        within(SOON, lambda: {}["lost"])


def test_actions_that_answer_share_one_thread():
    threads = {within(SOON, threading.get_ident) for _ in range(50)}
    assert len(threads) == 1
    assert threading.get_ident() not in threads


def test_an_action_that_does_not_answer_is_given_up_in_time_and_the_next_one_is_done():
    lasting = threading.Event()
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"no answer in 0\.2 s"):
        within(0.2, lasting.wait)
    assert 0.2 <= time.monotonic() - began < SOON
    before = threading.active_count()
    assert within(SOON, lambda: 8) == 8
    lasting.set()
    assert [within(SOON, lambda n=n: n) for n in range(3)] == [0, 1, 2]  # not the late answer
    assert threading.active_count() <= before


def test_many_threads_wait_at_once():
    def wait(number: int, found: list) -> None:
        found.append((number, within(SOON, lambda: time.sleep(0.01) or number)))

    found: list[tuple[int, int]] = []
    threads = [threading.Thread(target=wait, args=(n, found)) for n in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == [(n, n) for n in range(20)]


def answer(queue) -> None:
    with told("a child", 0.0):
        queue.put(within(SOON, os.getpid))
        while not waiting._watcher[0].is_alive():
            time.sleep(0.01)


def test_a_forked_process_has_threads_of_its_own():
    with told("the parent", SOON):
        within(SOON, os.getpid)
        context = multiprocessing.get_context("fork")
        queue = context.SimpleQueue()
        child = context.Process(target=answer, args=(queue,))
        child.start()
        child.join(SOON)
    assert child.exitcode == 0
    assert queue.get() == child.pid


def test_what_lasts_is_said_after_twice_four_and_eight_times_as_long_and_what_does_not_is_not(
    caplog, monkeypatch
):
    monkeypatch.setattr(waiting, "LOOK_SECONDS", 0.01)
    with told("warm up", SOON):
        time.sleep(0.3)  # the watcher may still look as seldom as before
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        with told("rank 1, corpus speech, a.parquet, row group 3", 0.2) as wait:
            wait.attempt = 2
            time.sleep(2.0)
        with told("a short read", 0.2):
            pass
        time.sleep(0.3)
    lines = [record.getMessage() for record in caplog.records]
    assert 2 <= len(lines) <= 4, lines
    start = "rank 1, corpus speech, a.parquet, row group 3: waiting for data for "
    seconds = [float(line.removeprefix(start).split(" s, attempt 2")[0]) for line in lines]
    rounded = 0.05  # they are said in tenths
    assert all(b + rounded >= 1.8 * (a - rounded) for a, b in itertools.pairwise(seconds))


def test_a_disk_that_does_not_answer_ends_in_bounded_time_and_is_named(tmp_path, caplog):
    os.mkfifo(tmp_path / "a.parquet")  # opening it waits for somebody who writes
    remote = Remote(timeout_seconds=0.2, patience_seconds=0.6, first_wait_seconds=0.05)
    file = str(tmp_path / "a.parquet")
    began = time.monotonic()
    with (
        caplog.at_level(logging.WARNING, "mtl_dist"),
        pytest.raises(
            ShardError, match=r"rank 3 on .*a\.parquet: TimeoutError: no answer in .*gave up"
        ),
    ):
        persist(lambda: read_range(file, 0, 9, bytearray(), remote), remote, 3, file)
    assert time.monotonic() - began < 0.6 + 2 * 0.2 + SOON
    assert "attempt 1, again in" in caplog.text
    assert f"{file}: waiting for data for" in caplog.text


def test_a_large_read_may_take_longer_but_never_longer_than_patience(tmp_path):
    from mtl_dist.streams.fetch import LEAST_RATE, _seconds_allowed

    remote = Remote(timeout_seconds=20, patience_seconds=120)
    assert _seconds_allowed(0, 10 * LEAST_RATE, remote) == 30
    assert _seconds_allowed(-LEAST_RATE, None, remote) == 21
    assert _seconds_allowed(0, 2**40, remote) == 120
