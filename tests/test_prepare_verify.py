"""`mtl-dist prepare --verify` finds what became of shards, and names shard and row."""

import shutil
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from preparation import SMALL, prepare, rows_of, write_clips

from mtl_dist import cli


@pytest.fixture
def clips(tmp_path):
    return write_clips(tmp_path / "clips")


@pytest.fixture
def prepared(clips, tmp_path):
    prepare("folder", clips, tmp_path / "out", *SMALL)
    return tmp_path / "out"


def verified(out: Path, capsys) -> tuple[int, str]:
    capsys.readouterr()
    try:
        cli.main(["prepare", "--verify", str(out), "--workers", "1"])
    except SystemExit as stop:
        return stop.code, capsys.readouterr().out
    return 0, capsys.readouterr().out


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("byte", [30, 2000], ids=["stream info", "frame"])
def test_verify_names_shard_and_row_of_a_flipped_byte(prepared, capsys, row, byte):
    assert verified(prepared, capsys)[0] == 0
    path = sorted(prepared.glob("*.parquet"))[1]
    (clip,) = pq.read_table(path).slice(row, 1).to_pylist()
    whole = bytearray(path.read_bytes())
    whole[whole.index(clip["audio"]["bytes"]) + byte] ^= 16
    path.write_bytes(whole)
    code, text = verified(prepared, capsys)
    assert code == 1
    assert f"{path.name}: blake2b is" in text
    assert f"{path.name}, row {row} ({clip['id']}): " in text
    assert text.count(", row ") == 1


def test_verify_finds_lost_cut_repeated_and_foreign_shards(prepared, capsys):
    first, second, third = sorted(prepared.glob("*.parquet"))[:3]
    kept = second.read_bytes()
    second.unlink()
    code, text = verified(prepared, capsys)
    assert (code, f"{second.name}: is not there" in text) == (1, True)
    assert "train: 10 clips" in text
    second.write_bytes(kept[:-100])
    code, text = verified(prepared, capsys)
    assert (code, f"{second.name}: cannot be read as Parquet" in text) == (1, True)
    second.write_bytes(first.read_bytes())
    code, text = verified(prepared, capsys)
    assert f"{second.name}, row 0 ({rows_of(prepared)[0]['id']}): stands in {first.name}" in text
    second.write_bytes(kept)
    shutil.copy(third, prepared / "train-00007-of-00009.parquet")
    code, text = verified(prepared, capsys)
    assert (code, "train-00007-of-00009.parquet: the manifest does not know it" in text) == (1, 1)
