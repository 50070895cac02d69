"""Shared fixtures: tiny corpora in the published layouts, a tiny configuration and experiment."""

import os

import hub_server

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HOME"] = hub_server.HOME.name
os.environ["HF_ENDPOINT"] = hub_server.reserved_endpoint()  # no test asks the real one

import pytest
import tiny
import torch
from hub_fixtures import copy_of_hub, hub, hub_data  # noqa: F401

torch.set_num_threads(1)
LONGEST = (
    "slurm",
    "readme",
    "hub_run",
    "launch",
    "demo",
    "failures",
    "engines",
    "resume",
    "bad_launch",
    "watchdog",
    "hub_faults",
    "hub",
)


def pytest_collection_modifyitems(items):
    """Begin with the files that take longest, so that no worker is left alone with one of them at the end."""
    place = {f"test_{name}.py": number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path.name, len(place)))


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Keep made-up corpora (root: synthetic) out of the home folder; pytest's own workers share them."""
    several = "PYTEST_XDIST_WORKER" in os.environ
    folder = tmp_path_factory.getbasetemp().parent / "cache" if several else None
    folder = folder or tmp_path_factory.mktemp("cache")
    os.environ["MTL_DIST_CACHE"] = str(folder)
    return folder


@pytest.fixture(scope="session")
def corpora_root(tmp_path_factory):
    """A folder with FSDKaggle2018, LibriSpeech and CHiME3, tiny and read only."""
    return tiny.write_corpora(tmp_path_factory.mktemp("corpora"))


@pytest.fixture(scope="session")
def tiny_experiment(corpora_root):
    """All four tasks on the tiny corpora, as `build_experiment` makes them."""
    from mtl_dist.config import load_config
    from mtl_dist.experiment import build_experiment

    return build_experiment(load_config(tiny.tiny_words(corpora_root)))
