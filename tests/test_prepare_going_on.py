"""`mtl-dist prepare` that was killed or ran out of disk goes on where it was, and ends with the same bytes."""

import multiprocessing
import os
import signal
import time
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import psutil
import pytest
import soundfile
import tiny
import worlds
from preparation import SMALL, files_of, prepare, refused, write_clips

from mtl_dist import prepare as preparing
from mtl_dist.preparing import encoding


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


def start(*words: object) -> worlds.Rank:
    """Start `mtl-dist prepare` as a process of its own."""
    script = ["-m", "mtl_dist.cli", "prepare", *map(str, words)]
    return worlds.Rank(script, dict(os.environ), tiny.REPOSITORY)


def wait_for_shards(process: worlds.Rank, out: Path, count: int) -> list[str]:
    """Return the names of the whole shards once there are as many, before the process has ended."""
    until = time.monotonic() + 120
    while len(notes := list(out.glob(".preparing/*-of-*.json"))) < count:
        assert process.poll() is None, "it ended too early"
        assert time.monotonic() < until
        time.sleep(0.002)
    return [f"{note.stem}.parquet" for note in notes]


def inodes(out: Path) -> dict[str, int]:
    return {path.name: path.stat().st_ino for path in out.glob("*.parquet")}


@pytest.mark.slow
def test_killed_and_started_again_it_ends_with_the_bytes_of_one_that_was_left_alone(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for n in range(400):
        soundfile.write(tmp_path / "clips" / f"{n}.wav", rng.uniform(-1, 1, 66_150), 44_100)
    words = ("folder", tmp_path / "clips", tmp_path / "out", "--workers", 2, "--shard_mb", 0.2)
    prepare("folder", tmp_path / "clips", tmp_path / "whole", "--shard_mb", "0.2")
    whole = files_of(tmp_path / "whole")
    assert len(whole) > 20
    out, kept = tmp_path / "out", {}
    for more in (3, 6):
        process = start(*words)
        try:
            wait_for_shards(process, out, len(kept) + more)
            assert "OUT: another process is preparing" in refused(*words)
            family = psutil.Process(process.process.pid).children(recursive=True)
        finally:
            process.kill()
        assert len(family) == 2
        assert psutil.wait_procs(family, timeout=10)[1] == []
        assert not (out / "manifest.json").exists()
        assert kept.items() <= inodes(out).items()
        noted = [f"{note.stem}.parquet" for note in out.glob(".preparing/*-of-*.json")]
        kept = {name: inodes(out)[name] for name in noted}
    assert start(*words).wait(120) == 0
    assert kept.items() <= inodes(out).items()
    assert files_of(out) == whole


def test_a_full_disk_is_an_error_and_what_is_whole_is_kept(clips, tmp_path):
    long = np.random.default_rng(1).uniform(-1, 1, 80_000)
    soundfile.write(clips / "cat" / "long.wav", long, 16_000)
    words = ("--shard_mb", "0.004", "--rows_per_group", "1", "--workers", "1")
    (tmp_path / "limited.py").write_text(
        "import resource, sys\nfrom mtl_dist import cli\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60000, 60000))\ncli.main(sys.argv[1:])\n"
    )
    script = [tmp_path / "limited.py", "prepare", "folder", clips, tmp_path / "out", *words]
    done = worlds.run(*map(str, script))
    assert done.returncode == 1
    assert "could not be written: File too large; the shards before it are whole" in done.stderr
    kept = inodes(tmp_path / "out")
    assert len(kept) > 1
    assert not list((tmp_path / "out").glob(".*.partial"))
    prepare("folder", clips, tmp_path / "out", *words)
    prepare("folder", clips, tmp_path / "whole", *words)
    assert kept.items() <= inodes(tmp_path / "out").items()
    assert files_of(tmp_path / "out") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("finished", [False, True])
def test_other_settings_than_it_was_begun_with_are_refused_by_name(
    clips, tmp_path, finished, monkeypatch
):
    out = tmp_path / "out"
    words = ("folder", clips, out, *SMALL)
    if finished:
        prepare(*words)
    else:
        write, calls = preparing.write_shard, []

        def full(*args):
            calls.append(args)
            if len(calls) > 2:
                raise OSError(28, "No space left on device")
            return write(*args)

        monkeypatch.setattr(preparing, "write_shard", full)
        assert "No space left" in refused(*words)
        monkeypatch.undo()
    before = files_of(out) if finished else sorted(p.name for p in out.iterdir())
    for field, other in {
        "seed": ("--seed", 1),
        "rows_per_group": ("--rows_per_group", 3),
        "shard_mb": ("--shard_mb", 1),
    }.items():
        message = refused(*words, *other)
        assert f"error: {field}: is {other[1]!r}" in message.replace("1.0", "1")
    assert "error: FROM: holds other files" in refused(*words, "--labelled")
    (clips / "cat" / "01.wav").rename(clips / "cat" / "01b.wav")
    assert "error: FROM: holds other files than when" in refused(*words)
    (clips / "cat" / "01b.wav").rename(clips / "cat" / "01.wav")
    assert before == (files_of(out) if finished else sorted(p.name for p in out.iterdir()))
    prepare(*words)
    prepare("folder", clips, tmp_path / "whole", *SMALL)
    assert files_of(out) == files_of(tmp_path / "whole")


def test_a_worker_that_is_killed_is_an_error_that_says_how_to_go_on(tmp_path):
    rng = np.random.default_rng(0)
    (tmp_path / "clips").mkdir()
    for n in range(200):
        soundfile.write(tmp_path / "clips" / f"{n}.wav", rng.uniform(-1, 1, 66_150), 44_100)
    words = ("folder", tmp_path / "clips", tmp_path / "out", "--workers", 2, "--shard_mb", 0.1)
    process = start(*words)
    try:
        wait_for_shards(process, tmp_path / "out", 2)
        os.kill(psutil.Process(process.process.pid).children()[0].pid, signal.SIGKILL)
        assert process.wait(60) == 1
    finally:
        process.kill()  # pytest would wait at its exit for one that hangs
    _, text = process.texts()
    assert "error: a worker was killed" in text
    assert "Traceback" not in text


def die_while_sending(task: int) -> bytes:
    """Return a megabyte; of task 3 a half arrives, and the process is killed."""

    def half(connection, data):
        os.write(connection.fileno(), data[: len(data) // 2])
        os.kill(os.getpid(), signal.SIGKILL)

    if task == 3:
        Connection._send = half
    return bytes(1_000_000)


def results_of_a_killed_worker(queue) -> None:
    with encoding.Workers(2) as workers:
        try:
            queue.put(len(list(workers.in_order(die_while_sending, range(20)))))
        except BrokenProcessPool:
            queue.put("broken")


def test_a_worker_killed_while_it_sends_does_not_leave_the_others_waiting():
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=results_of_a_killed_worker, args=(queue,))
    process.start()
    process.join(20)
    stuck = process.is_alive()
    process.kill()
    assert not stuck
    assert queue.get(timeout=1) == "broken"
