"""Parquet's plain pages: what is read as views of them is what Arrow reads, and anything else is left to Arrow."""

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parquet_files import all_audio, audio_of, write, write_table

from mtl_dist.streams.parquet import chunk_range, plain_values
from mtl_dist.streams.shards import Shards

PLAIN = {"compression": "NONE", "use_dictionary": False}


def chunk_of(path: str, rows: int) -> list[memoryview] | None:
    """The plain values of the first row group of a file with one column."""
    begin, end = chunk_range(pq.read_metadata(path), 0, 0)
    with open(path, "rb") as file:
        return plain_values(memoryview(file.read()[begin:end]), rows)


@pytest.mark.parametrize("page", [None, 100, 20_000], ids="one page|a page a row|some".split("|"))
@pytest.mark.parametrize("statistics", [False, True])
def test_prepared_shards_are_read_without_arrow(tmp_path, monkeypatch, page, statistics):
    options = PLAIN | {"data_page_size": page, "write_statistics": statistics}
    written = write(tmp_path, write_batch_size=1, **options)
    monkeypatch.setattr("mtl_dist.streams.parquet_file.ParquetFile._decode", None)
    read = all_audio(Shards.open("mine", str(tmp_path)))
    assert read == audio_of(written)
    assert all(isinstance(audio, memoryview) for audio in read)


OTHERS = {
    "compressed": {"compression": "SNAPPY", "use_dictionary": False},
    "dictionary": {"compression": "NONE", "use_dictionary": True},
    "pages of version 2": PLAIN | {"data_page_version": "2.0"},
    "delta": PLAIN | {"column_encoding": {"audio": "DELTA_LENGTH_BYTE_ARRAY"}},
    "required": PLAIN,
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_plain_is_left_to_arrow(tmp_path, case):
    values = [b"a" * 9, b"", b"bcd" * 1000, b"a" * 9]
    field = pa.field("audio", pa.binary(), nullable=case != "required")
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table([values], schema=pa.schema([field])), path, **OTHERS[case])
    assert chunk_of(path, 4) is None
    assert Shards.open("mine", path).read(0) == values


@given(st.lists(st.one_of(st.none(), st.binary(max_size=300)), min_size=1, max_size=40))
def test_any_values_are_read_as_arrow_reads_them(tmp_path_factory, values):
    path = write_table(
        tmp_path_factory.mktemp("plain") / "a.parquet",
        {"audio": pa.array(values, pa.binary())},
        data_page_size=500,
        write_batch_size=2,
        **PLAIN,
    )
    assert Shards.open("mine", path).read(0) == values
    assert (chunk_of(path, len(values)) is None) == (None in values)


def test_damaged_pages_are_not_values(tmp_path):
    path = write_table(tmp_path / "a.parquet", {"audio": pa.array([b"one", b"two"])}, **PLAIN)
    begin, end = chunk_range(pq.read_metadata(path), 0, 0)
    chunk = (tmp_path / "a.parquet").read_bytes()[begin:end]
    assert plain_values(memoryview(chunk), 2) == [b"one", b"two"]
    for cut in range(len(chunk)):
        assert plain_values(memoryview(chunk[:cut]), 2) is None
    for place in range(len(chunk)):
        for value in (0, 255, chunk[place] ^ 1):
            bad = memoryview(chunk[:place] + bytes([value]) + chunk[place + 1 :])
            values = plain_values(bad, 2)
            assert values is None or len(values) == 2
