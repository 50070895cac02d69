"""The Hub's stand-in with its data sets; this process and those that it starts are its clients. Imported by conftest.py."""

import shutil
import sys
from pathlib import Path

import datasets
import hub_corpora
import huggingface_hub
import pytest
from hub_corpora import NOISE, SPEECH
from hub_server import RESERVED, HubServer

sys.path.insert(0, str(Path(__file__).parent / "workers"))
TOKEN = "hf_aVerySecretToken"
BUSY = 20.0
"""Seconds that a busy machine may add to what is bounded."""
RETRIED = {"Retry-After": "0"}
"""With this the client waits for 1 s only."""


@pytest.fixture(scope="session")
def hub_data(tmp_path_factory):
    """The server, with the clips that were written to it."""
    folder = tmp_path_factory.mktemp("hub")
    server = HubServer(folder, RESERVED.getsockname()[1])
    server.written = hub_corpora.write_speech(folder / SPEECH)
    hub_corpora.write_noise(folder / NOISE)
    yield server
    server.close()


@pytest.fixture
def hub(hub_data, monkeypatch):
    """The server without faults, counts or a token, and a client that knows nothing of it and has its own settings."""
    hub_data.reset()
    monkeypatch.delenv("HF_TOKEN", raising=False)
    constants, config = huggingface_hub.constants, datasets.config
    for name in ("HF_HUB_DOWNLOAD_TIMEOUT", "HF_HUB_ETAG_TIMEOUT"):
        monkeypatch.setattr(constants, name, getattr(constants, name))
    for name in [name for name in vars(config) if name.startswith("STREAMING_")]:
        monkeypatch.setattr(config, name, getattr(config, name))
    huggingface_hub.HfFileSystem.clear_instance_cache()
    yield hub_data
    for library in (datasets, huggingface_hub):
        library.logging.enable_propagation()


@pytest.fixture
def copy_of_hub(hub):
    """Another data set with the same files, which may be spoilt: its id and its folder."""
    folder = hub.folder / "copies" / f"copy-{len(list(hub.folder.glob('copies/*')))}"
    shutil.copytree(hub.folder / SPEECH, folder)
    return f"copies/{folder.name}", folder
