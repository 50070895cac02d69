"""The cache of blocks: bounded, also by several processes, and the oldest goes first."""

import multiprocessing
import time
from pathlib import Path

import numpy as np
import pytest

from mtl_dist.streams.block_cache import BlockCache


def fill(folder: Path, limit: int, seed: int) -> None:
    cache = BlockCache(folder, limit)
    draw = np.random.default_rng(seed)
    for number in range(200):
        key = f"{seed}-{number}"
        block = draw.bytes(int(draw.integers(1000, 5000)))
        cache.put(key, block)
        found = cache.get(key, len(block))
        assert found in (block, None)


def test_the_cache_is_bounded_also_when_processes_share_it(tmp_path):
    limit = 200_000
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=fill, args=(tmp_path, limit, seed)) for seed in range(4)]
    for child in children:
        child.start()
    sizes = []
    while any(child.is_alive() for child in children):
        sizes.append(size_of(tmp_path))
        time.sleep(0.005)
    assert [child.exitcode for child in children] == [0] * 4
    sizes.append(size_of(tmp_path))
    assert max(sizes) <= limit
    assert sizes[-1] > limit / 2


def size_of(folder: Path) -> int:
    total = 0
    for path in folder.iterdir():
        try:
            total += path.stat().st_size
        except FileNotFoundError:
            continue
    return total


def test_the_block_that_was_not_used_for_longest_goes_first(tmp_path):
    cache = BlockCache(tmp_path, 100_000)
    for number in range(17):
        cache.put(str(number), bytes(5000))
        time.sleep(0.002)
    assert cache.get("0", 5000) == bytes(5000)
    for number in range(17, 20):
        cache.put(str(number), bytes(5000))
        time.sleep(0.002)
    assert cache.get("0", 5000) is not None
    assert cache.get("1", 5000) is None
    assert cache.get("19", 5000) is not None


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path, caplog):
    cache = BlockCache(tmp_path / "cache", 100_000)
    (tmp_path / "cache").rmdir()
    cache.put("a", b"block")
    cache.put("b", b"block")
    assert cache.get("a", 5) is None
    assert len(caplog.records) == 1
    with pytest.raises(ValueError, match="cache: cannot make the folder"):
        BlockCache(Path(__file__) / "cache", 100_000)
