"""What is wrong with a tar, its index or a sample is named with the tar and the member."""

import gzip
import logging
import re
import shutil

import numpy as np
import pytest
import tars
from parquet_files import FAST, all_audio

from mtl_dist.streams import shards as shards_module
from mtl_dist.streams.retry import ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source


@pytest.fixture
def folder(tmp_path):
    return tars.write(tmp_path / "tars")


JSON = ("a.json", b'{"speaker": 1}')
WRONG = {
    "not json": ([("a.flac", b"x"), ("a.json", b"{")], {}, r"member a\.json is not a JSON object"),
    "a list": ([("a.flac", b"x"), ("a.json", b"[]")], {}, r"member a\.json is not a JSON object .it is a list"),
    "a type": (
        [("a.flac", b"x"), ("a.json", b'{"label": ["x"]}')], {},
        "sample a: column json.label is of type list, but label must be a string or a whole number",
    ),
    "seconds": ([("a.flac", b"x"), ("a.json", b'{"seconds": "1"}')], {}, ".*seconds must be a number; set columns.seconds"),
    "no audio": ([JSON, ("a.txt", b"x")], {}, r"there is no audio in it .found: json, txt.; set columns.audio"),
    "no column": (
        [("a.flac", b"x"), JSON], {"speaker": "json.who"},
        r"there is no column json.who .found: __key__, flac, json, json.speaker.; set columns.speaker",
    ),
    "twice": ([("a.flac", b"x"), ("a.FLAC", b"x")], {}, r"member a\.FLAC: the sample a has another flac"),
    "apart": (
        [("a.flac", b"x"), ("b.flac", b"x"), JSON, ("b.json", b"{}")], {},
        "sample a comes twice; its members have to follow each other",
    ),
    "empty": ([], {}, "there are no samples in it"),
    "no text": ([("a.flac", b"x"), ("a.txt", b"\xff")], {"label": "txt"}, "member a.txt is not text in UTF-8"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_in_a_tar_is_named_with_its_member(tmp_path, case):
    files, columns, reason = WRONG[case]
    tars.pack(tmp_path / "t/bad.tar", files)
    tars.pack(
        tmp_path / "t/good.tar", [("g.flac", b"x"), ("g.json", b'{"who": 1}'), ("g.txt", b"x")]
    )
    with pytest.raises(ShardError, match=rf"rank 0 on .*corpus mine, .*bad\.tar: {reason}"):
        Shards.open("mine", Source(path=str(tmp_path / "t"), columns=columns), FAST)


@pytest.mark.parametrize("indexed", [True, False])
@pytest.mark.parametrize("share", [0.0, 0.0001, 0.3, 0.6, 0.97, "end"])
def test_a_tar_cut_short_is_refused_by_name(tmp_path, share, indexed):
    files = tars.members(0, 9)
    path = tars.pack(tmp_path / "cut.tar", files, index=indexed)
    end = sum(512 + -(-len(data) // 512) * 512 for _, data in files)  # before the zeros
    path.write_bytes(path.read_bytes()[: end if share == "end" else int(share * end)])
    with pytest.raises(ShardError, match=r"corpus mine, .*cut\.tar: .*cut short"):
        Shards.open("mine", str(path), FAST)


def shifted(text: str) -> str:
    """An index as wds2idx writes it of a tar with extended headers: all offsets but the last are 1,024 too large."""
    lines = [line.split(" ") for line in text.splitlines()]
    for line in lines[1:]:
        line[1::4] = [str(int(offset) + 1024) for offset in line[1::4]]
    lines[-1][-3] = str(int(lines[-1][-3]) - 1024)
    return "\n".join(map(" ".join, lines)) + "\n"


WRONG_INDEX = {
    "older": (lambda text: text.replace("v1.2", "v1.1"), "it begins with 'v1.1 37'"),
    "a line cut off": (
        lambda text: text[: text.rindex("\nflac ")], "it begins with 'v1.2 37' and lists 36 samples",
    ),
    "no number": (lambda text: text.replace("flac 512", "flac x"), "line 2 is not: extension"),
    "a member cut off": (
        lambda text: text[: text.rindex(" json ")] + "\n", "it lacks member part.one/clip-0036.json",
    ),
    "extended headers": (shifted, "no header lies before member part.one/clip-0000.flac"),
    "one member": (
        lambda text: text.replace("json 6656", "json 7168", 1), "no header lies before member",
    ),
    "a size": (lambda text: re.sub(r"^flac 512 (\d+)", "flac 512 1", text, flags=re.M), "not 1"),
    "empty": (lambda text: "v1.2 0\n", "it lacks member part.one/clip-0000.flac"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_INDEX)
def test_an_index_that_does_not_fit_is_a_warning_and_the_headers_are_read(folder, caplog, case):
    truth = Shards.open("mine", str(folder))
    assert not caplog.records
    change, reason = WRONG_INDEX[case]
    index = folder / "train-00000.idx"
    assert change(index.read_text()) != index.read_text()
    index.write_text(change(index.read_text()))
    shards = Shards.open("mine", str(folder))
    assert reason in caplog.text
    assert "train-00000.idx does not fit its tar" in caplog.text
    assert shards.fingerprint() == truth.fingerprint()
    assert all_audio(shards) == all_audio(truth)


def test_what_is_no_plain_tar_is_refused_with_the_remedy(folder, tmp_path):
    data = (folder / "train-00001.tar").read_bytes()
    (tmp_path / "z").mkdir()
    (tmp_path / "z/a.tar.gz").write_bytes(gzip.compress(data))
    for path in ("z/a.tar.gz", "z", "z/*.gz"):
        with pytest.raises(ShardError, match=r"a\.tar\.gz is compressed, .*unpack it"):
            Shards.open("mine", str(tmp_path / path), FAST)
    (tmp_path / "b.tar").write_bytes(gzip.compress(data))
    with pytest.raises(ShardError, match=r"b\.tar: not a tar, cut short or damaged"):
        Shards.open("mine", str(tmp_path / "b.tar"), FAST)
    (folder / "x.parquet").touch()
    with pytest.raises(ShardError, match="both Parquet files and tars in"):
        Shards.open("mine", str(folder), FAST)
    with pytest.raises(ShardError, match=r"train-00003\.tar does not exist"):
        Shards.open("mine", f"{folder}/train-{{00000..00003}}.tar", FAST)


def test_a_damaged_header_in_the_middle_is_refused(folder):
    path = folder / "train-00002.tar"
    data = bytearray(path.read_bytes())
    second = data.index(b"part.one/clip-0210.flac")
    data[second : second + 512] = b"\xff" * 512
    path.write_bytes(data)
    with pytest.raises(
        ShardError, match=r"train-00002\.tar: .*after member part.one/clip-0209.json"
    ):
        Shards.open("mine", str(folder), FAST)


def test_a_tar_that_changes_during_the_run_or_since_the_checkpoint_is_named(folder, tmp_path):
    path, shards = folder / "train-00001.tar", Shards.open("mine", str(folder))
    saved, block = shards.fingerprint(), 3
    elsewhere = shutil.copytree(folder, tmp_path / "elsewhere")
    Shards.open("mine", str(elsewhere)).refuse_changes(saved)
    size = path.stat().st_size
    draw = np.random.default_rng(0)
    for data, reason in (
        (draw.bytes(size), "its bytes are damaged, or the file was changed in place"),
        (path.read_bytes()[:500], "has become shorter"),
        (path.read_bytes() + b"x", "and had"),
    ):
        path.write_bytes(data)
        with pytest.raises(ShardError, match=rf"train-00001\.tar, samples 0 to 2: .*{reason}"):
            shards.read(block)
    tars.pack(path, tars.members(101, tars.COUNTS[1]))
    with pytest.raises(
        ShardError, match=r"source 0: train-00001\.tar changed since the checkpoint"
    ):
        Shards.open("mine", str(folder)).refuse_changes(saved)


def test_the_log_says_how_far_a_long_listing_is(folder, monkeypatch, caplog):
    monkeypatch.setattr(shards_module, "SAY_EVERY_SECONDS", 0.0)
    with caplog.at_level(logging.INFO, "mtl_dist"):
        Shards.open("mine", str(folder))
    assert f"corpus mine, source {folder}: 2 of 3 files read" in caplog.text
