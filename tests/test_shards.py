"""Laws of blocks: what was written is read, from any file system; what cannot be read is named; the cache is bounded."""

import logging
import multiprocessing
import pickle
import shutil
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from mtl_dist.streams.block_cache import BlockCache
from mtl_dist.streams.retry import Remote, ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source

GROUPS = [[16, 16, 5], [3], [1, 16]]
"""Rows of each row group of each file."""
AUDIO = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
FAST = Remote(timeout_seconds=0.5, patience_seconds=1, first_wait_seconds=0.05)


def clips(first: int, count: int) -> list[dict]:
    """Rows as `mtl-dist prepare` writes them, with 5 to 8 kB of audio each."""
    rows = []
    for number in range(first, first + count):
        draw = np.random.default_rng(number)
        audio = {"bytes": draw.bytes(int(draw.integers(5000, 8000))), "path": f"{number}.flac"}
        label = None if number % 5 == 0 else f"class {number % 3}"
        rows.append(
            {
                "id": f"clip-{number:04d}",
                "audio": audio,
                "label": label,
                "speaker": f"{number % 4}",
                "split": "train",
                "seconds": number / 8,
            }
        )
    return rows


SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "audio": AUDIO,
        "label": pa.string(),
        "speaker": pa.string(),
        "split": pa.string(),
        "seconds": pa.float64(),
    }
)


def write(folder: Path, groups: list[list[int]] = GROUPS, **options) -> list[dict]:
    """Write one file for each list of row groups; return all rows in order."""
    folder.mkdir(parents=True, exist_ok=True)
    written: list[dict] = []
    for number, counts in enumerate(groups):
        path = folder / f"train-{number:05d}-of-{len(groups):05d}.parquet"
        with pq.ParquetWriter(path, SCHEMA, **options) as writer:
            for count in counts:
                rows = clips(len(written), count)
                written += rows
                writer.write_table(pa.Table.from_pylist(rows, SCHEMA))
    return written


def write_table(path: Path, columns: dict, **options) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return str(path)


def all_rows(shards: Shards) -> list[dict]:
    return [row for block in range(len(shards)) for row in shards.read(block)]


@pytest.fixture
def folder(tmp_path):
    """A folder of three files with six blocks, and its rows."""
    return tmp_path / "corpus", write(tmp_path / "corpus")


@pytest.mark.parametrize("form", ["folder", "glob", "files", "file://", "sources"])
def test_what_was_written_is_read_however_it_is_named(folder, form):
    root, written = folder
    names = sorted(str(path) for path in root.iterdir())
    sources = {
        "folder": str(root),
        "glob": f"{root}/train-*.parquet",
        "files": names,
        "file://": f"file://{root}",
        "sources": [Source(path=names[0]), Source(path=f"{root}/*0[12]-of-*.parquet")],
    }[form]
    shards = Shards.open("mine", sources)
    assert shards.rows.tolist() == [n for counts in GROUPS for n in counts]
    assert shards.files == [
        name for name, counts in zip(names, GROUPS, strict=True) for _ in counts
    ]
    assert shards.name(2) == f"{names[0]}, row group 2"
    assert all_rows(shards) == [row["audio"] for row in written]
    listed = shards.listing().to_pylist()
    places = [(b, p) for b, count in enumerate(shards.rows) for p in range(count)]
    assert [(row.pop("block"), row.pop("place")) for row in listed] == places
    assert listed == [{k: v for k, v in row.items() if k != "audio"} for row in written]


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "none"},
        {"compression": "zstd", "use_dictionary": False},
        {"version": "1.0", "data_page_size": 4096},
        {"data_page_version": "2.0", "write_page_index": True},
    ],
)
def test_files_of_any_writer_are_read(tmp_path, options):
    written = write(tmp_path / "corpus", **options)
    assert all_rows(Shards.open("mine", str(tmp_path / "corpus"))) == [r["audio"] for r in written]


def test_a_split_of_a_local_folder_follows_the_rules_of_the_hub(folder):
    root, written = folder
    write_table(
        root / "test-00000-of-00001.parquet", {"id": ["t"], "audio": pa.array([None], AUDIO)}
    )
    shards = Shards.open("mine", Source(path=str(root), split="train"))
    assert shards.rows.sum() == len(written)
    with pytest.raises(ShardError, match=r"split: 'dev' .allowed: train, test"):
        Shards.open("mine", Source(path=str(root), split="dev"))


def test_files_of_another_file_system_are_read_and_cached(folder, tmp_path):
    root, written = folder
    memory = fsspec.filesystem("memory")
    for path in root.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote = Remote(cache=str(tmp_path / "cache"), cache_gigabytes=0.01)
    shards = Shards.open("mine", "memory://bucket", remote)
    assert shards.files[0] == "memory:///bucket/train-00000-of-00003.parquet"
    assert all_rows(shards) == [row["audio"] for row in written]
    assert len(shards.listing()) == len(written)
    memory.rm("/bucket", recursive=True)
    assert all_rows(pickle.loads(pickle.dumps(shards))) == [row["audio"] for row in written]


def read_in_child(shards: Shards, blocks: list[int], queue) -> None:
    queue.put([shards.read(block) for block in blocks])


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_the_object_works_in_other_processes_that_list_nothing(folder, method):
    root, written = folder
    shards = Shards.open("mine", str(root))
    shards.read(0)
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    child = context.Process(target=read_in_child, args=(shards, [5, 0], queue))
    child.start()
    assert queue.get(timeout=60) == [
        [row["audio"] for row in written[41:]],
        [row["audio"] for row in written[:16]],
    ]
    child.join()


def test_the_object_is_small(tmp_path):
    write(tmp_path / "corpus", [[1] * 400] * 2)
    assert len(pickle.dumps(Shards.open("mine", str(tmp_path / "corpus")))) < 300 * 800


def test_the_hubs_types_become_ours(tmp_path):
    features = datasets.Features(
        {
            "audio": {"bytes": datasets.Value("large_binary")},
            "number": datasets.Value("int32"),
            "category": datasets.ClassLabel(names=["dog", "cat"]),
            "duration": datasets.Value("float32"),
        }
    )
    rows = {
        "audio": [{"bytes": b"a"}, {"bytes": None}, None],
        "number": [1, 2, 3],
        "category": [1, 0, -1],
        "duration": [0.5, 1.5, 2.5],
    }
    datasets.Dataset.from_dict(rows, features).to_parquet(tmp_path / "a.parquet")
    columns = {"id": "number", "label": "category", "seconds": "duration"}
    shards = Shards.open("mine", Source(path=str(tmp_path / "a.parquet"), columns=columns))
    listed = shards.listing()
    assert listed.column("id").to_pylist() == ["1", "2", "3"]
    assert listed.column("label").to_pylist() == ["cat", "dog", None]
    types = {field.name: field.type for field in listed.schema}
    assert types == {
        "id": pa.string(),
        "label": pa.string(),
        "seconds": pa.float64(),
        "block": pa.int64(),
        "place": pa.int64(),
    }
    bare = {"path": None}
    assert shards.read(0) == [
        {"bytes": b"a"} | bare,
        {"bytes": None} | bare,
        {"bytes": None} | bare,
    ]


def test_audio_may_be_plain_bytes_and_a_row_may_lack_them(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"wav": pa.array([b"one", None, b"three"])})
    shards = Shards.open("mine", Source(path=path, columns={"audio": "wav"}))
    assert [row["bytes"] for row in shards.read(0)] == [b"one", None, b"three"]
    path = write_table(tmp_path / "b.parquet", {"audio": pa.array([None, None], pa.binary())})
    assert [row["bytes"] for row in Shards.open("mine", path).read(0)] == [None, None]


def test_empty_files_and_row_groups_among_others_are_passed_over(tmp_path):
    written = write(tmp_path / "corpus", [[0, 4, 0], [0], [2]])
    shards = Shards.open("mine", str(tmp_path / "corpus"))
    assert shards.rows.tolist() == [4, 2]
    assert all_rows(shards) == [row["audio"] for row in written]
    assert shards.listing().column("id").to_pylist() == [row["id"] for row in written]


def test_a_source_without_rows_is_refused(tmp_path):
    write(tmp_path / "corpus", [[0], [0, 0]])
    with pytest.raises(
        ShardError, match=r"corpus mine, source .*corpus: there are no rows in its 2"
    ):
        Shards.open("mine", str(tmp_path / "corpus"))


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.9, 0.9999])
def test_a_file_cut_short_is_refused_by_name(folder, share):
    root, _ = folder
    path = root / "train-00001-of-00003.parquet"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ShardError, match=r"rank 0 on .*, corpus mine, .*train-00001.*cut short"):
        Shards.open("mine", str(root), FAST)


def test_a_damaged_footer_is_refused_by_name(folder):
    root, _ = folder
    path = root / "train-00001-of-00003.parquet"
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[-8:-4], "little")
    data[-8 - length : -8] = b"\xff" * length
    path.write_bytes(data)
    with pytest.raises(ShardError, match="train-00001"):
        Shards.open("mine", str(root), FAST)
    path.write_bytes(data[:-8] + b"\xff\xff\xff\x7fPAR1")
    with pytest.raises(ShardError, match=r"train-00001.*the footer would be longer than the file"):
        Shards.open("mine", str(root), FAST)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda path: path.unlink(), "No such file"),
        (lambda path: path.write_bytes(path.read_bytes()[:500]), "has become shorter"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "and had"),
        (lambda path: path.write_bytes(bytes(path.stat().st_size)), "damaged"),
    ],
)
def test_a_shard_that_vanishes_or_changes_during_the_run_is_named_at_once(folder, damage, reason):
    root, written = folder
    shards = Shards.open("mine", str(root))
    shards.rank = 7
    damage(root / "train-00000-of-00003.parquet")
    with pytest.raises(
        ShardError, match=rf"rank 7 on .*mine, .*train-00000.*row group 1.*{reason}"
    ):
        shards.read(1)
    assert shards.read(3) == [row["audio"] for row in written[37:40]]


def test_a_shard_that_changed_since_a_checkpoint_is_refused_by_name(folder, tmp_path):
    root, _ = folder
    saved = Shards.open("mine", str(root)).fingerprint()
    Shards.open("mine", str(root)).refuse_changes(saved)
    victim = root / "train-00002-of-00003.parquet"
    elsewhere = shutil.copytree(root, tmp_path / "elsewhere", copy_function=shutil.copyfile)
    Shards.open("mine", str(elsewhere)).refuse_changes(saved)
    rows = clips(40, 17)
    rows[0]["audio"]["bytes"] += b"!"
    pq.write_table(pa.Table.from_pylist(rows, SCHEMA), victim)
    with pytest.raises(
        ShardError, match=r"corpus mine, source 0: train-00002-of-00003.parquet changed"
    ):
        Shards.open("mine", str(root)).refuse_changes(saved)
    victim.unlink()
    with pytest.raises(ShardError, match=r"train-00002-of-00003.parquet is gone"):
        Shards.open("mine", str(root)).refuse_changes(saved)


@pytest.mark.parametrize(
    ("columns", "mapping", "reason"),
    [
        ({"id": ["a"]}, {}, "there is no column audio .found: id.*columns.audio"),
        ({"audio": ["a.wav"]}, {}, "column audio is of type string, but audio must be binary"),
        (
            {"audio": [b"a"], "id": [1.5]},
            {},
            "column id is of type double, but id must be a string",
        ),
        ({"audio": [b"a"], "label": [["x"]]}, {}, "column label is of type list.*label must be"),
        (
            {"audio": [b"a"], "length": ["1"]},
            {"seconds": "length"},
            "column length is of type string",
        ),
        ({"audio": [b"a"]}, {"speaker": "who"}, "there is no column who"),
    ],
)
def test_a_column_that_is_missing_or_of_another_type_is_named(tmp_path, columns, mapping, reason):
    write_table(tmp_path / "corpus" / "a.parquet", columns)
    with pytest.raises(ShardError, match=rf"a\.parquet: {reason}"):
        Shards.open("mine", Source(path=str(tmp_path / "corpus"), columns=mapping))


def test_a_column_that_changes_its_type_between_files_is_named(tmp_path):
    write_table(tmp_path / "a.parquet", {"audio": [b"a"], "year": [1999], "id": ["a"]})
    write_table(tmp_path / "b.parquet", {"audio": [b"b"], "year": ["1999"], "id": [2]})
    shards = Shards.open("mine", str(tmp_path))
    with pytest.raises(
        ShardError, match=r"b\.parquet: a column has another type than in .*a\.parquet"
    ):
        shards.listing()
    assert shards.listing([]).column("id").to_pylist() == ["a", "2"]


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("/nowhere/at/all", "/nowhere/at/all does not exist"),
        ("memory://nowhere", "memory://nowhere does not exist"),
        ("/tmp/*.no-such.parquet", "there is no Parquet file in"),
        (__file__, "test_shards.py is not Parquet.*mtl-dist prepare"),
        ("nosuchprotocol://x/y.parquet", "nosuchprotocol"),
    ],
)
def test_a_source_that_is_not_there_is_named(source, reason):
    with pytest.raises(ShardError, match=rf"corpus mine, source .*{reason}"):
        Shards.open("mine", source, FAST)


def test_a_wrong_setting_is_refused_by_its_name():
    with pytest.raises(ValueError, match=r"corpora\.mine: there are no sources"):
        Shards.open("mine", [])
    with pytest.raises(ValueError, match=r"columns: unknown name 'speakr' .allowed: audio, id"):
        Source(path="x", columns={"speakr": "speaker_id"})
    with pytest.raises(ValueError, match="patience_seconds: 0 is not allowed"):
        Remote(patience_seconds=0)


class Faults:
    """Makes the file system in memory fail, or hang and fail, `failures` times."""

    def __init__(self):
        self.failures, self.hang = 0, 0.0

    def cat_file(self, system, path, start=None, end=None, **kwargs):
        if self.failures:
            self.failures -= 1
            time.sleep(self.hang)
            raise RuntimeError("SlowDown: please reduce your request rate")
        return CAT_FILE(system, path, start, end, **kwargs)


CAT_FILE = MemoryFileSystem.cat_file


@pytest.fixture
def remote(folder, monkeypatch):
    """Shards on another file system, the faults that it shall have, and the rows of block 0."""
    root, written = folder
    monkeypatch.setattr("mtl_dist.streams.fetch.LEAST_RATE", 1e6)
    faults = Faults()
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda *a, **k: faults.cat_file(*a, **k))
    for path in root.iterdir():
        fsspec.filesystem("memory").pipe(f"/faulty/{path.name}", path.read_bytes())
    return Shards.open("mine", "memory://faulty", FAST), faults, [r["audio"] for r in written[:16]]


def test_the_errors_of_any_file_system_are_retried_with_a_log(remote, caplog):
    shards, faults, first = remote
    faults.failures = 3
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        assert shards.read(0) == first
    lines = [record.getMessage() for record in caplog.records]
    lines = [line for line in lines if ": waiting for data for " not in line]
    assert len(lines) == 3
    assert all(
        "corpus mine" in line and "row group 0" in line and "SlowDown" in line for line in lines
    )


def test_a_file_system_that_hangs_is_noticed(remote, caplog):
    shards, faults, first = remote
    faults.failures, faults.hang = 1, 30
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        assert shards.read(0) == first
    assert "no answer in 0.6 s" in caplog.text


def test_a_file_system_that_stays_away_ends_in_bounded_time(remote):
    shards, faults, _ = remote
    faults.failures = 1000
    began = time.monotonic()
    with pytest.raises(
        ShardError, match=r"rank 0 on .*row group 0.*SlowDown.*gave up after attempt"
    ):
        shards.read(0)
    assert time.monotonic() - began < FAST.patience_seconds + 15


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
