"""Laws of blocks: what was written is read, from any file system that works or can be waited for."""

import dataclasses
import logging
import multiprocessing
import pickle
import time

import datasets
import fsspec
import pyarrow as pa
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from parquet_files import AUDIO, FAST, GROUPS, all_audio, audio_of, write, write_table

from mtl_dist.streams import parquet_file
from mtl_dist.streams.retry import Remote, ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source


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
    assert all_audio(shards) == audio_of(written)
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
    assert all_audio(Shards.open("mine", str(tmp_path / "corpus"))) == audio_of(written)


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
    assert all_audio(shards) == audio_of(written)
    assert len(shards.listing()) == len(written)
    memory.rm("/bucket", recursive=True)
    assert all_audio(pickle.loads(pickle.dumps(shards))) == audio_of(written)


def read_in_child(shards: Shards, blocks: list[int], queue) -> None:
    queue.put([[*map(bytes, shards.read(block))] for block in blocks])


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
        audio_of(written[41:]),
        audio_of(written[:16]),
    ]
    child.join()


def test_the_object_is_small(tmp_path):
    write(tmp_path / "corpus", [[1] * 400] * 2)
    assert len(pickle.dumps(Shards.open("mine", str(tmp_path / "corpus")))) < 300 * 800


def test_a_footer_is_parsed_once_however_often_blocks_of_its_file_are_read(tmp_path, monkeypatch):
    write(tmp_path / "corpus", [[1, 1]] * 40)
    parse, parsed = parquet_file.parse_footer, []
    monkeypatch.setattr(parquet_file, "parse_footer", lambda f: (parsed.append(f), parse(f))[1])
    shards = pickle.loads(pickle.dumps(Shards.open("mine", str(tmp_path / "corpus"))))
    parsed.clear()
    for block in [*range(len(shards))] * 2:
        shards.read(block)
    assert len(parsed) == 40


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
    assert shards.read(0) == [b"a", None, None]


def test_audio_may_be_plain_bytes_and_a_row_may_lack_them(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"wav": pa.array([b"one", None, b"three"])})
    shards = Shards.open("mine", Source(path=path, columns={"audio": "wav"}))
    assert shards.read(0) == [b"one", None, b"three"]
    path = write_table(tmp_path / "b.parquet", {"audio": pa.array([None, None], pa.binary())})
    assert Shards.open("mine", path).read(0) == [None, None]


def test_empty_files_and_row_groups_among_others_are_passed_over(tmp_path):
    written = write(tmp_path / "corpus", [[0, 4, 0], [0], [2]])
    shards = Shards.open("mine", str(tmp_path / "corpus"))
    assert shards.rows.tolist() == [4, 2]
    assert all_audio(shards) == audio_of(written)
    assert shards.listing().column("id").to_pylist() == [row["id"] for row in written]


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
    shards = Shards.open("mine", "memory://faulty", FAST)
    shards.remote = dataclasses.replace(FAST, timeout_seconds=0.5)
    return shards, faults, audio_of(written[:16])


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
    shards.remote.patience_seconds = 1
    began = time.monotonic()
    with pytest.raises(
        ShardError, match=r"rank 0 on .*row group 0.*SlowDown.*gave up after attempt"
    ):
        shards.read(0)
    assert time.monotonic() - began < 1 + 15
