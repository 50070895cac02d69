"""Laws of tars: the samples are those that `datasets` lists, however they are found.

That `webdataset` itself lists the same was seen by hand: it is no dependency.
"""

import concurrent.futures
import logging
import multiprocessing
import pickle
import shutil
import sys
from pathlib import Path

import datasets
import fsspec
import pytest
import tars
from fsspec.implementations.memory import MemoryFileSystem
from hub_server import Fault, HubServer
from parquet_files import FAST, all_audio

from mtl_dist.streams import shards as shards_module
from mtl_dist.streams import tar_file, tar_samples
from mtl_dist.streams.retry import Remote, ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source, expand_braces

sys.path.insert(0, str(Path(__file__).parent / "workers"))
import hub_client


@pytest.fixture
def folder(tmp_path):
    return tars.write(tmp_path / "tars")


def listed_by_datasets(paths) -> list[dict]:
    """Rows as the `webdataset` builder of `datasets` has them, with the audio as bytes."""
    text = datasets.Value("string")
    about = {
        "speaker": datasets.Value("int64"),
        "label": text,
        "seconds": datasets.Value("float64"),
    }
    features = {"flac": datasets.Value("binary"), "json": about, "txt": text, "__key__": text}
    return list(
        datasets.load_dataset(
            "webdataset",
            data_files=[str(path) for path in paths],
            split="train",
            streaming=True,
            features=datasets.Features(features | {"__url__": text}),
        )
    )


@pytest.mark.parametrize(
    "form", ["", "/train-*.tar", "/train-{00000..00002}.tar", "/train-0000{2,0,1}.tar"]
)
def test_samples_and_bytes_are_those_that_datasets_lists(folder, form):
    theirs = listed_by_datasets(sorted(folder.glob("*.tar")))
    shards = Shards.open("mine", f"{folder}{form}")
    listed = shards.listing().to_pylist()
    assert [row["id"] for row in listed] == [row["__key__"] for row in theirs]
    for column in ("label", "seconds"):
        assert [row[column] for row in listed] == [row["json"][column] for row in theirs]
    assert [row["speaker"] for row in listed] == [str(row["json"]["speaker"]) for row in theirs]
    assert all_audio(shards) == [row["flac"] for row in theirs]


def test_braces_are_what_a_shell_makes_of_them():
    assert expand_braces("a{08..11}.tar") == ["a08.tar", "a09.tar", "a10.tar", "a11.tar"]
    assert expand_braces("{x,y}{1..2}") == ["x1", "x2", "y1", "y2"]
    assert expand_braces("plain.tar") == ["plain.tar"]


def test_blocks_are_runs_of_samples_each_read_by_one_request(folder, monkeypatch):
    monkeypatch.setattr(tar_samples, "BLOCK_BYTES", 40_000)
    shards, asked = Shards.open("mine", str(folder)), []
    read_range = shards_module.read_range

    def noting(file, start, end, *more):
        asked.append((file, start, end))
        return read_range(file, start, end, *more)

    monkeypatch.setattr(shards_module, "read_range", noting)
    sizes = [[len(audio) for audio in shards.read(block)] for block in range(len(shards))]
    assert len(asked) == len(shards) > 5
    assert all(end - start <= 40_512 for _, start, end in asked)
    assert [len(block) for block in sizes] == shards.rows.tolist()
    assert sum(map(sum, sizes)) > 0.6 * sum(end - start for _, start, end in asked)
    for one, two, block in zip(asked[:-1], asked[1:], sizes[1:], strict=True):
        if one[0] == two[0]:  # the next sample would have made it too long
            assert two[1] + 512 + block[0] - one[1] - 512 > 40_000
    assert "train-00000.tar, samples 0 to " in shards.name(0)
    monkeypatch.setattr(tar_samples, "BLOCK_BYTES", 1 << 30)
    assert Shards.open("mine", str(folder)).rows.tolist() == [16, 16, 5, 3, 16, 4]
    monkeypatch.setattr(tar_samples, "BLOCK_BYTES", 100)
    assert set(Shards.open("mine", str(folder)).rows) == {1}


def test_an_index_and_the_headers_tell_the_same_and_neither_reads_audio(tmp_path, monkeypatch):
    path = tars.pack(tmp_path / "a.tar", tars.members(0, 20, size=400_000), index=True)
    read, read_range = [], tar_file.read_range

    def noting(file, start, end, *more):
        read.append(end - start)
        return read_range(file, start, end, *more)

    monkeypatch.setattr(tar_file, "read_range", noting)
    indexed = Shards.open("mine", str(path))
    by_index, read[:] = sum(read), []
    path.with_suffix(".idx").unlink()
    scanned = Shards.open("mine", str(path))
    assert indexed.fingerprint() == scanned.fingerprint()
    assert indexed.listing().equals(scanned.listing())
    assert all_audio(indexed) == all_audio(scanned)
    assert 0 < min(by_index, sum(read))
    assert max(by_index, sum(read)) < 0.15 * path.stat().st_size


def test_small_samples_of_a_file_far_away_are_listed_by_few_requests(folder, monkeypatch):
    memory = fsspec.filesystem("memory")
    data = (folder / "train-00000.tar").read_bytes()
    memory.pipe("/far/a.tar", data)
    asked, cat_file = [], MemoryFileSystem.cat_file
    monkeypatch.setattr(
        MemoryFileSystem, "cat_file", lambda *a, **k: asked.append(a) or cat_file(*a, **k)
    )
    shards = Shards.open("mine", "memory://far/a.tar")
    assert len(asked) < 12 < 2 * tars.COUNTS[0]
    assert shards.listing().equals(Shards.open("mine", str(folder / "train-00000.tar")).listing())


def test_tars_of_another_file_system_are_read_and_cached(folder, tmp_path):
    memory = fsspec.filesystem("memory")
    for path in folder.iterdir():
        memory.pipe(f"/bucket/{path.name}", path.read_bytes())
    remote = Remote(cache=str(tmp_path / "cache"), cache_gigabytes=0.1)
    shards = Shards.open("mine", "memory://bucket", remote)
    near = Shards.open("mine", str(folder))
    assert shards.fingerprint() == near.fingerprint()
    assert all_audio(shards) == all_audio(near)
    memory.rm("/bucket", recursive=True)
    assert all_audio(pickle.loads(pickle.dumps(shards))) == all_audio(near)
    assert len(pickle.dumps(shards)) < 5000 + 100 * sum(tars.COUNTS)


def test_a_data_set_of_the_hub_may_be_tars(folder, tmp_path, monkeypatch):
    root = tmp_path / "hub"
    shutil.copytree(folder, root / "me/speech")
    server = HubServer(root)
    monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    near = Shards.open("mine", str(folder))
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:

        def call(*args, **kwargs) -> dict:
            return pool.submit(hub_client.call, *args, **kwargs).result(120)

        server.faults.append(Fault("cut", route="resolve", path="train-00002.tar"))
        opened = call("open_shards", "mine", [Source(path="me/speech")], first_wait_seconds=0.05)
        sent = opened["result"]
        assert ["train-00002.tar" in line and "again in" in line for line in opened["lines"]] == [
            True
        ]
        assert sum("GET" in line and ".idx" in line for line in server.log) == 1
        assert call("listing", sent)["result"] == near.listing().to_pylist()
        server.reset()
        read = call("read", sent, [0, 4])["result"]
        assert read == [near.read(0), near.read(4)]
        assert server.requests == {"resolve": 2}
    assert pickle.loads(sent).name(3).startswith("me/speech/train-00001.tar, samples 0 to 2")
    server.close()


def test_a_fault_while_headers_are_read_costs_one_request_more(folder, monkeypatch, caplog):
    fsspec.filesystem("memory").pipe(
        "/faulty_tars/a.tar", (folder / "train-00000.tar").read_bytes()
    )
    calls, cat_file = [], MemoryFileSystem.cat_file

    def failing(*args, **kwargs):
        calls.append(args)
        if len(calls) == 4:
            raise RuntimeError("SlowDown")
        return cat_file(*args, **kwargs)

    monkeypatch.setattr(MemoryFileSystem, "cat_file", failing)
    with caplog.at_level(logging.WARNING, "mtl_dist"):
        Shards.open("mine", "memory://faulty_tars/a.tar", FAST)
    faulty, calls[:] = len(calls), [()] * 10
    Shards.open("mine", "memory://faulty_tars/a.tar", FAST)
    assert faulty == len(calls) - 10 + 1
    assert "corpus mine, memory:///faulty_tars/a.tar: RuntimeError: SlowDown" in caplog.text


def test_keys_that_come_in_several_tars_have_their_tars_name_before_them(tmp_path):
    for part in ("a", "b"):
        tars.pack(tmp_path / part / "0.tar", tars.members(0, 3))
    listed = Shards.open("mine", str(tmp_path)).listing()["id"].to_pylist()
    keys = [f"part.one/clip-{number:04d}" for number in range(3)]
    assert listed == [f"{part}/0/{key}" for part in ("a", "b") for key in keys]
    apart = Shards.open("mine", [str(tmp_path / "a"), str(tmp_path / "b")])
    assert apart.listing()["id"].to_pylist() == keys * 2  # which the corpus refuses
    mapped = Shards.open("mine", Source(path=str(tmp_path), columns={"id": "json.label"}))
    assert mapped.listing()["id"].to_pylist() == ["class 0", "class 1", "class 2"] * 2


COLUMNS = [
    ({"label": "cls"}, "label", ["3", "7"]),
    ({"label": "txt"}, "label", ["dog", "cat"]),
    ({"speaker": "json.speaker_id"}, "speaker", ["17", "x"]),
    ({"id": "json.name"}, "id", ["one", "two"]),
    ({"label": "meta.json.kind"}, "label", ["k", None]),
    ({}, "label", [None, None]),
]
SAMPLES = [
    ("a.cls", b"3"), ("a.txt", b"dog\n"), ("a.FLAC", b"A"), ("a.json", b'{"speaker_id": 17, "name": "one"}'),
    ("a.meta.json", b'{"kind": "k"}'), ("b.cls", b"7"), ("b.txt", b"cat"), ("b.left.wav", b"B"),
    ("b.json", b'{"speaker_id": "x", "name": "two"}'),
    ("._b.flac", b"hidden"), ("README", b"no extension"), ("__meta__.json", b"not a sample"),
]  # fmt: skip


@pytest.mark.parametrize(("mapping", "ours", "values"), COLUMNS)
def test_columns_are_extensions_and_fields_of_json(tmp_path, mapping, ours, values):
    path = tars.pack(tmp_path / "a.tar", SAMPLES, index=False)
    shards = Shards.open("mine", Source(path=str(path), columns=mapping))
    assert shards.listing()[ours].to_pylist() == values
    assert shards.read(0) == [b"A", b"B"]


def test_the_audio_may_be_named_and_a_sample_may_lack_it(tmp_path):
    files = [("a.wav", b"1"), ("a.flac", b"2"), ("b.wav", b"3"), ("c.flac", b""), ("d.flac", b"4")]
    path = tars.pack(tmp_path / "a.tar", files)
    with pytest.raises(ShardError, match="sample a: wav and flac are audio; say which by columns"):
        Shards.open("mine", str(path))
    shards = Shards.open("mine", Source(path=str(path), columns={"audio": "flac"}))
    assert shards.read(0) == [b"2", None, b"", b"4"]
    files = [*files[:1], *((f"t{n:02d}.txt", b"x") for n in range(40)), ("z.wav", b"9")]
    shards = Shards.open("mine", str(tars.pack(tmp_path / "b.tar", files)))
    assert all_audio(shards) == [b"1", *[None] * 40, b"9"]
