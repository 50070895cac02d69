"""A stand-in for openslr/librispeech_asr on tests/hub_server.py, and a process that asks it.

The client is huggingface_hub and datasets themselves. conftest.py imports the fixtures.
"""

import concurrent.futures
import json
import multiprocessing
import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import HubServer

from mtl_dist.streams.sources import Source

sys.path.insert(0, str(Path(__file__).parent / "workers"))

BUSY = 15.0
"""Seconds that a busy machine may add to what is bounded."""
FAST = {"timeout_seconds": 0.5, "patience_seconds": 20, "first_wait_seconds": 0.05}
CARD = """---
configs:
- config_name: clean
  data_files:
  - {split: train.100, path: clean/train.100/*.parquet}
  - {split: test, path: clean/test/*.parquet}
- config_name: other
  data_files:
  - {split: train.500, path: other/train.500/*.parquet}
---
# A stand-in for openslr/librispeech_asr
"""
FILES = {
    "clean/train.100": [[8, 8, 3], [5]],
    "clean/test": [[2]],
    "other/train.500": [[7], [8, 1]],
}
"""Rows of each row group of each file."""


FEATURES = {
    "file": {"dtype": "string", "_type": "Value"},
    "audio": {"sampling_rate": 16000, "_type": "Audio"},
    "text": {"dtype": "string", "_type": "Value"},
    "speaker_id": {"dtype": "int64", "_type": "Value"},
    "chapter_id": {"dtype": "int64", "_type": "Value"},
    "id": {"dtype": "string", "_type": "Value"},
}


def write_librispeech(folder: Path) -> dict[str, list[dict]]:
    """Write the data set as the Hub lays it out; return the rows of each split."""
    written: dict[str, list[dict]] = {}
    draw = np.random.default_rng(0)
    for split, files in FILES.items():
        (folder / split).mkdir(parents=True)
        rows = written[split] = []
        for number, groups in enumerate(files):
            writer = None
            for count in groups:
                part = [row_of(split, len(rows) + i, draw) for i in range(count)]
                rows += part
                table = pa.Table.from_pylist(part).replace_schema_metadata(
                    {"huggingface": json.dumps({"info": {"features": FEATURES}})}
                )
                path = folder / split / f"{number:04d}.parquet"
                writer = writer or pq.ParquetWriter(path, table.schema)
                writer.write_table(table)
            writer.close()
    (folder / "README.md").write_text(CARD)
    return written


def row_of(split: str, number: int, draw: np.random.Generator) -> dict:
    name = f"{split.replace('/', '-')}-{number:04d}"
    audio = {"bytes": draw.bytes(int(draw.integers(15_000, 20_000))), "path": f"{name}.flac"}
    return {
        "file": f"/x/{name}.flac",
        "audio": audio,
        "text": "A WORD " * 20,
        "speaker_id": number // 4,
        "chapter_id": number // 2,
        "id": name,
    }


def clean(repo: str = "openslr/librispeech_asr", split: str = "train.100") -> Source:
    return Source(path=repo, config="clean", split=split, columns={"speaker": "speaker_id"})


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A server with openslr/librispeech_asr, a client process, and the rows that were written."""
    import hub_client

    root = tmp_path_factory.mktemp("hub")
    server = HubServer(root)
    server.written = write_librispeech(root / "openslr" / "librispeech_asr")
    server.pool = concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("HF_ENDPOINT", server.endpoint)
        environment.setenv("HF_HOME", str(tmp_path_factory.mktemp("hf_home")))
        environment.setenv("HF_HUB_ETAG_TIMEOUT", "1")
        environment.delenv("HF_TOKEN", raising=False)
        server.pool.submit(hub_client.call, "warm_up").result(120)
    yield server
    server.pool.shutdown()
    server.close()


@pytest.fixture
def client(hub):
    """Call functions of tests/workers/hub_client.py in the client process; the server forgets faults and counts."""
    import hub_client

    hub.reset()

    def call(*args, **kwargs) -> dict:
        return hub.pool.submit(hub_client.call, *args, **kwargs).result(60)

    return call


@pytest.fixture(scope="module")
def opened(hub):
    """What rank 0 sends to the others, for clean/train.100."""
    import hub_client

    hub.reset()
    outcome = hub.pool.submit(hub_client.call, "open_shards", "speech", [clean()], **FAST).result(
        60
    )
    return outcome["result"]


@pytest.fixture
def copy_of_hub(hub):
    """Another data set with the same files, which no cache of the client knows: its id and folder."""
    folder = hub.folder / "copies" / f"copy-{len(list(hub.folder.glob('copies/*')))}"
    shutil.copytree(hub.folder / "openslr" / "librispeech_asr", folder)
    return f"copies/{folder.name}", folder
