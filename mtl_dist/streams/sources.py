"""Where the shards of a corpus lie, by one notation: a Hub id, Parquet files, a glob or a folder, local or by URL.

A source becomes a sorted list of files: absolute local paths, hf://datasets/ID@COMMIT/PATH (pinned, so that a commit
during the run changes nothing), or URLs of any other fsspec file system. Tested by tests/test_shards.py, test_hub.py.
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from pathlib import Path

import datasets
import fsspec
from huggingface_hub import HfApi

COLUMNS = ("audio", "id", "label", "speaker", "seconds")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_URL = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?"
)
GLOB = re.compile(r"[*?\[]")


@dataclasses.dataclass(kw_only=True)
class Source:
    """One place that a corpus comes from."""

    path: str
    """A data set of the Hub, such as openslr/librispeech_asr; or Parquet: a file, a glob (data/*.parquet) or a folder,
    local or of any fsspec URL (s3://, gs://, hf://datasets/, memory://). What exists locally is taken for local."""
    config: str | None = None
    """Configuration of a Hub data set, such as clean."""
    split: str | None = None
    """Split of a Hub data set, such as train.100."""
    revision: str | None = None
    """Branch, tag or commit of a Hub data set; the default is its main branch. It is pinned to a commit at the start."""
    weight: float | None = None
    """Share of the corpus' clips that come from this source, as against the weights of its other sources; all of them have
    one, or none. Without, every clip comes once an epoch; with, each source has epochs of its own."""
    columns: dict[str, str] = dataclasses.field(default_factory=dict)
    """Our names (audio, id, label, speaker, seconds) to the data set's, where they differ: {speaker: speaker_id}."""

    def __post_init__(self):
        if self.weight is not None and not 0 < self.weight < math.inf:
            raise ValueError(f"weight: {self.weight} is not allowed; use more than 0, or null")
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ValueError(
                f"columns: unknown name {unknown[0]!r} (allowed: {', '.join(COLUMNS)}); "
                "write it as our name: the data set's name"
            )

    def column(self, name: str) -> str:
        """Return the data set's name for our column `name`."""
        return self.columns.get(name, name)

    def list_files(self) -> list[str]:
        """List the Parquet files, sorted; by the Hub's own rules where it is a data set of the Hub or has a split.

        Raises:
            FileNotFoundError, ValueError: nothing there, no such configuration or split, or no Parquet.
            Whatever the file system's transport raises.
        """
        if self.config or self.split or self._on_hub():
            files = self._files_of_data_set()
        else:
            files = _files_of_path(self.path)
        others = [file for file in files if not file.endswith(".parquet")]
        if others:
            raise ValueError(
                f"{others[0]} is not Parquet; write your audio to Parquet with `mtl-dist prepare`, or, for a data set "
                "of the Hub, try revision: refs/convert/parquet"
            )
        return _pinned(files)

    def _on_hub(self) -> bool:
        return bool(HUB_ID.fullmatch(self.path)) and not (
            Path(self.path).exists() or self.path.endswith(".parquet")
        )

    def _files_of_data_set(self) -> list[str]:
        path = self.path if self._on_hub() else str(Path(self.path).expanduser())
        builder = datasets.load_dataset_builder(path, self.config, revision=self.revision)
        files = builder.config.data_files
        split = self.split or (next(iter(files)) if len(files) == 1 else None)
        if split not in files:
            raise ValueError(f"split: {self.split!r} (allowed: {', '.join(map(str, files))})")
        return sorted(files[split])


def _files_of_path(path: str) -> list[str]:
    """Files of a local path or URL that is a file, a glob or a folder."""
    system, root = fsspec.url_to_fs(path if "://" in path else str(Path(path).expanduser()))
    if GLOB.search(root):
        found = system.glob(root)
    elif system.isdir(root):
        found = [file for file in system.find(root) if file.endswith(".parquet")]
    elif system.exists(root):
        found = [root]
    else:
        raise FileNotFoundError(f"{path} does not exist")
    if not found:
        raise FileNotFoundError(f"there is no Parquet file in {path}")
    local = "file" in _protocols(system)
    return sorted(file if local else system.unstrip_protocol(file) for file in found)


def _protocols(system: fsspec.AbstractFileSystem) -> tuple[str, ...]:
    return (system.protocol,) if isinstance(system.protocol, str) else tuple(system.protocol)


def _pinned(files: Iterable[str]) -> list[str]:
    """Name the commit in the URLs of Hub files; one request per data set that has none yet."""
    commits: dict[tuple, str] = {}
    pinned = []
    for file in files:
        if match := HUB_URL.fullmatch(file):
            key = match["repo"], match["revision"]
            if key not in commits:
                known = re.fullmatch(r"[0-9a-f]{40}", match["revision"] or "")
                commits[key] = known[0] if known else _commit(*key)
            file = f"hf://datasets/{match['repo']}@{commits[key]}/{match['path']}"
        pinned.append(file)
    return pinned


def _commit(repo: str, revision: str | None) -> str:
    unquoted = revision and revision.replace("%2F", "/")
    return HfApi().dataset_info(repo, revision=unquoted).sha
