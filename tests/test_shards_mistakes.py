"""Shards that cannot be read are named: cut short, damaged, gone, changed, or with other columns."""

import shutil

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parquet_files import FAST, SCHEMA, audio_of, clips, write, write_table

from mtl_dist.streams.retry import Remote, ShardError
from mtl_dist.streams.shards import Shards
from mtl_dist.streams.sources import Source


@pytest.fixture
def folder(tmp_path):
    """A folder of three files with six blocks, and its rows."""
    return tmp_path / "corpus", write(tmp_path / "corpus")


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
    assert shards.read(3) == audio_of(written[37:40])


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
        (__file__, "test_shards_mistakes.py is not Parquet.*mtl-dist prepare"),
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
