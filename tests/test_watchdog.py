"""A rank that hangs is named with its phase and round, once, before the time limit; no rank outlives the limit for long."""

import logging
import time

import pytest
import tiny
import worlds
from torch.distributed import HashStore

from mtl_dist import watchdog
from mtl_dist.phases import Phases, Sign
from mtl_dist.runtime import World
from mtl_dist.watchdog import GRACE_SECONDS, Posted, Watchdog, judge

LIMIT = 12.0
"""run.timeout_seconds of the runs that hang."""
TO_LEAVE = 10.0
"""Seconds that a Python process may take to end on a busy machine."""


def posted(place: int, phase: str, since: float, number: int = 0) -> Posted:
    return Posted(sign=Sign(place, phase, 17, since), host=f"node{number}", pid=100 + number)


def test_those_with_the_lowest_place_are_named_with_phase_round_host_and_process():
    signs = {n: posted(9, "collective", 70.0 + n, n) for n in range(4)}
    signs[3] = posted(8, "data", 60.0, 3)
    verdict = judge(signs, now=100.0)
    assert verdict.behind == (3,)
    assert verdict.waited == 30.0, "as long as the first of the others waits"
    assert verdict.text == (
        "rank 3 (host node3, pid 103) hangs in data of round 17, for 40 s; the others wait in collective of round 17, "
        "for 30 s"
    )


def test_of_several_that_hang_some_are_named_and_the_rest_are_counted():
    signs = {n: posted(8, "data", 60.0, n) for n in range(12)} | {12: posted(9, "collective", 70.0)}
    verdict = judge(signs, now=100.0)
    assert verdict.behind == tuple(range(12))
    assert "rank 7 (host node7, pid 107), 4 more hang in data" in verdict.text
    assert "rank 8" not in verdict.text


def test_ranks_that_are_in_a_long_phase_together_do_not_hang():
    verdict = judge({n: posted(8, "validation", 60.0 + n) for n in range(3)}, now=400.0)
    assert (verdict.behind, verdict.waited) == ((), 0.0)
    assert verdict.text.startswith("all ranks are in validation of round 17, for 340 s")


@pytest.fixture
def watch(monkeypatch):
    """watch(timeout) -> the phases of two ranks with a watchdog each on one store, in this process; ended: exit codes."""
    made, store = [], HashStore()
    watch_ended: list[int] = []
    monkeypatch.setattr(watchdog, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda **_: None)
    monkeypatch.setattr(watchdog.os, "_exit", watch_ended.append)

    def make(timeout):
        phases = [Phases(), Phases()]
        made.extend(
            Watchdog(p, World(rank, 2), timeout, lambda: store) for rank, p in enumerate(phases)
        )
        return *phases, watch_ended

    yield make
    for dog in made:
        dog.close()


def together(*ranks: Phases, phases=("data", "collective", "forward/backward"), round_=1) -> None:
    for phase in phases:
        for rank in ranks:
            rank.enter(phase, round_)


def test_a_hang_is_said_once_after_half_the_limit_and_ends_the_processes_after_it(watch, caplog):
    first, second, ended = watch(timeout=1.0)
    together(first, second)
    first.enter("collective")
    time.sleep(0.35)
    assert not caplog.records
    time.sleep(0.4)
    (line,) = (r for r in caplog.records if r.levelno == logging.ERROR)
    assert "rank 1 (" in line.message
    assert "hangs in forward/backward of round 1" in line.message
    assert not ended
    time.sleep(0.9)
    assert set(ended) == {1}
    assert sum("hang" in r.message for r in caplog.records) == 1


def test_a_long_phase_of_all_ranks_ends_nothing_and_the_hang_after_it_is_named(watch, caplog):
    first, second, ended = watch(timeout=0.6)
    together(first, second, phases=("validation",), round_=5)
    time.sleep(1.2)
    (line,) = caplog.records
    assert line.levelno == logging.WARNING
    assert "all ranks are in validation of round 5" in line.message
    second.enter("collective")
    time.sleep(0.2)
    assert len(caplog.records) == 1, "the other has only begun to wait"
    time.sleep(0.3)
    assert "rank 0 (" in caplog.records[1].message
    assert not ended


def test_ranks_that_go_on_slowly_are_not_said_to_hang(watch, caplog):
    first, second, ended = watch(timeout=0.6)
    for round_ in range(1, 7):
        for rank in (first, second):
            rank.enter("data", round_)
            time.sleep(0.1)
        first.enter("collective")
        second.enter("collective")
    assert not caplog.records
    assert not ended


def test_one_process_alone_has_no_thread():
    dog = Watchdog(Phases(), World(0, 1), 1.0, connect=None)
    assert not dog.thread.is_alive()
    dog.close()


def test_after_an_error_a_process_ends_even_if_its_exit_hangs():
    program = (
        "import threading, time\n"
        "from torch.distributed import HashStore\n"
        "from mtl_dist import watchdog\n"
        "from mtl_dist.phases import Phases\n"
        "from mtl_dist.runtime import World\n"
        "watchdog.SECONDS_TO_EXIT = 1.0\n"
        "dog = watchdog.Watchdog(Phases(), World(0, 2), 60.0, HashStore)\n"
        "threading.Thread(target=time.sleep, args=(1000,)).start()\n"
        "try:\n"
        "    raise RuntimeError('lost')\n"
        "finally:\n"
        "    dog.close()\n"
    )
    done = tiny.run_process(["-c", program], timeout=60)
    assert done.returncode == 1
    assert "RuntimeError: lost" in done.stderr


HANGS = [(1, "start", 0), (1, "data", 3), (1, "validation", 4), (0, "frozen", 3)]
"""(rank, how, round)."""


def hang(corpora, run, rank: int, how: str, round_: int) -> list[worlds.Rank]:
    """Start two ranks, of which `rank` hangs."""
    words = ["--run.timeout_seconds", str(LIMIT), "--run.dir", str(run)]
    script = ["tests/workers/hanging.py", str(rank), how, str(round_)]
    file = ["--config_file", str(tiny.REPOSITORY / "launch_configs/two_cpu_processes.yaml")]
    return worlds.start([*file, *script, *tiny.tiny_words(corpora, *words)])


@pytest.fixture(scope="module")
def hung(corpora_root, tmp_path_factory):
    """{which of HANGS: ([exit code or None for a frozen rank], [stderr], seconds of the last)}; all at once, as all wait."""
    out, ended, found = tmp_path_factory.mktemp("hangs"), {}, {}
    running = {case: hang(corpora_root, out / case[1], *case) for case in HANGS}
    until = time.monotonic() + 150
    try:
        while len(ended) < len(HANGS):
            assert time.monotonic() < until, f"only {[*ended]} have ended"
            for case in running.keys() - ended.keys():
                alive = [n for n in range(2) if case[1] != "frozen" or n != case[0]]
                if all(running[case][n].poll() is not None for n in alive):
                    ended[case] = time.time()
            time.sleep(0.05)
        codes = {case: [rank.poll() for rank in ranks] for case, ranks in running.items()}
    finally:
        for rank in (rank for ranks in running.values() for rank in ranks):
            rank.kill()
    for case, ranks in running.items():
        texts = [rank.texts() for rank in ranks]
        began = float(texts[case[0]][0].split("hangs since ")[1].split()[0])
        found[case] = codes[case], [error for _, error in texts], ended[case] - began
    return found


@pytest.mark.slow
@pytest.mark.timeout(180)
@pytest.mark.parametrize(("rank", "how", "round_"), HANGS)
def test_a_run_with_a_hanging_rank_names_it_and_ends(hung, rank, how, round_):
    codes, texts, seconds = hung[rank, how, round_]
    named = [line for text in texts for line in text.splitlines() if " hangs in " in line]
    assert len(named) == 1, texts
    phase = "data" if how == "frozen" else how
    assert named[0].startswith(f"ERROR: rank {rank} (host ")
    assert f" hangs in {phase} of round {round_}, for " in named[0]
    assert f"the others wait in collective of round {round_}" in named[0]
    other = texts[1 - rank]
    assert "Timed out waiting 12000ms" in other
    assert codes[1 - rank] == 1
    assert LIMIT < seconds < LIMIT + GRACE_SECONDS + TO_LEAVE
    if how == "frozen":
        assert codes[rank] is None, "a frozen process is left to its launcher"
        assert other.index("hangs in") < other.index("Timed out")
    else:
        assert codes[rank] == 1
        assert "hanging.py" in texts[rank], "the stack of the rank that hangs"
