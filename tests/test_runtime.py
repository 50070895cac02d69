"""A world ends when its work is done."""

import pytest
import tiny
import worlds

TIMES = 20
"""Without the cure a world of two hangs in one of its first ten ends."""


@pytest.mark.slow
@pytest.mark.timeout(150)
def test_a_world_that_ends_right_after_a_collective_does_not_hang():
    worker = str(tiny.REPOSITORY / "tests/workers/leaver.py")
    ended = worlds.launch("two_cpu_processes", worker, str(TIMES), timeout=60.0)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.count("left every time") == 2
