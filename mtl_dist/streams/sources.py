"""Where a corpus lies, by one notation: a Hub id, Parquet or tars, audio files, a folder as published, a CSV manifest.

A source of shards, or of audio files, becomes a sorted list of files: absolute local paths, hf://datasets/ID@COMMIT/PATH
(pinned, so that a commit during the run changes nothing), or URLs of any other fsspec file system. What a folder as
published or a manifest holds is listed by the corpus (corpora/sharded.py). Tested by tests/test_shards.py, test_hub.py,
test_tars.py, test_audio_files_by_url.py.
"""

import dataclasses
import math
import os
import re
from collections.abc import Iterable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import datasets
import fsspec
from huggingface_hub import HfApi

COLUMNS = ("audio", "id", "label", "speaker", "seconds")
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
HUB_URL = re.compile(
    r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?"
)
GLOB = re.compile(r"[*?\[]")
BRACES = re.compile(r"\{([^{}]*)\}")
SHARDS = (".parquet", ".tar")
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .caf .w64 .rf64".split()
)
"""What is audio in a folder or a tar; a manifest may name anything that libsndfile reads."""
BESIDE_AUDIO = "metadata.parquet"
"""What `datasets` reads in a folder of audio files, and is not audio in Parquet."""


class Listed(NamedTuple):
    """What a listing says of an audio file: its path below the folder of its source, its bytes, and what the Hub calls
    their content; nothing ("") elsewhere."""

    name: str
    size: int
    digest: str


@dataclasses.dataclass(kw_only=True)
class Source:
    """One place that a corpus comes from."""

    path: str
    """A data set of the Hub, such as openslr/librispeech_asr. Parquet, or tars as WebDataset writes them: a file, a glob
    (data/*.parquet), braces (tars/train-{00000..00007}.tar) or a folder, local or of any fsspec URL (s3://, gs://,
    hf://datasets/, memory://). Audio files of the Hub or of a URL: a glob or a folder, named as in a folder of this kind of
    corpus. A folder that `root` would take, as published or prepared. A CSV manifest with the column path, and optionally
    label, split, speaker and seconds. What exists locally is taken for local."""
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
    """Our names (audio, id, label, speaker, seconds) to the data set's, where they differ: {speaker: speaker_id}. In tars,
    a column is an extension (flac, cls), the field of a JSON member (json.speaker_id) or __key__."""

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

    def list_files(self) -> dict[str, Listed | None]:
        """List the files, sorted; by the Hub's own rules where it is a data set of the Hub or has a split.

        They are audio files, with what is known of each; or Parquet, or tars: with None. After tars come the index files
        that NVIDIA DALI's wds2idx wrote beside them.

        Raises:
            FileNotFoundError, ValueError: nothing there, no such configuration or split, or neither Parquet, tars nor audio.
            Whatever the file system's transport raises.
        """
        if self.config or self.split or self.on_hub():
            files = self._files_of_data_set()
        else:
            files = sorted(
                file for path in expand_braces(self.path) for file in _files_of_path(path)
            )
        audio = [file for file in files if _is_audio(file)]
        shards = [file for file in files if file.endswith((*SHARDS, *COMPRESSED))]
        if audio and {PurePosixPath(file).name for file in shards} <= {BESIDE_AUDIO}:
            return self._described(_pinned(audio))
        if audio:
            raise ValueError(
                f"there are audio files and {shards[0]} in {self.path}; name each by a source of its own, such as "
                f"{self.path}/*{PurePosixPath(audio[0]).suffix}"
            )
        for file in files:
            if file.endswith(COMPRESSED):
                raise ValueError(
                    f"{file} is compressed, so nothing in it can be found without reading all before it; unpack it to a "
                    "plain .tar (gunzip, unxz, unzstd)"
                )
            if not file.endswith(SHARDS):
                raise ValueError(
                    f"{file} is not Parquet, nor a tar or audio; write your audio to Parquet with `mtl-dist prepare`, or, "
                    "for a data set of the Hub, try revision: refs/convert/parquet"
                )
        tars = [file for file in files if file.endswith(".tar")]
        if 0 < len(tars) < len(files):
            raise ValueError(
                f"there are both Parquet files and tars in {self.path}; name each by a source of its own, such as "
                f"{self.path}/*.tar"
            )
        return dict.fromkeys(_pinned([*files, *_indices_beside(tars)]))

    def on_hub(self) -> bool:
        """Return whether the path is a data set's name on the Hub."""
        return bool(HUB_ID.fullmatch(self.path)) and not (
            Path(self.path).exists() or self.path.endswith((*SHARDS, *COMPRESSED, ".csv"))
        )

    def _files_of_data_set(self) -> list[str]:
        path = self.path if self.on_hub() else str(Path(self.path).expanduser())
        builder = datasets.load_dataset_builder(path, self.config, revision=self.revision)
        files = builder.config.data_files
        split = self.split or (next(iter(files)) if len(files) == 1 else None)
        if split not in files:
            raise ValueError(f"split: {self.split!r} (allowed: {', '.join(map(str, files))})")
        return sorted(files[split])

    def _described(self, files: list[str]) -> dict[str, Listed]:
        """Add to audio files what one listing of the folder that holds them all says; a web server is asked for each."""
        system, _ = fsspec.url_to_fs(files[0])
        paths = [fsspec.url_to_fs(file)[1] for file in files]
        if files[0].startswith(("http://", "https://")):
            found = {path: system.info(path) for path in paths}
        else:
            folder = os.path.commonpath([os.path.dirname(path) for path in paths])
            depth = max(path.removeprefix(folder).strip("/").count("/") for path in paths)
            found = system.find(folder, maxdepth=depth + 1, detail=True)
        unknown = [path for path in paths if found[path]["size"] is None]
        if unknown:
            raise ValueError(f"the server does not say how large {unknown[0]} is; copy the files")
        top = self._folder(files[0])
        listed = {
            file: Listed(
                path.removeprefix(top).strip("/"),
                found[path]["size"],
                found[path].get("blob_id", ""),
            )
            for file, path in zip(files, paths, strict=True)
        }
        # As a folder on a disk is sorted: noise is drawn by place.
        return dict(sorted(listed.items(), key=lambda item: PurePosixPath(item[1].name)))

    def _folder(self, file: str) -> str:
        """Return the folder that the source names, as the file system of one of its files calls it."""
        folder = re.split(r"[*?\[{]", self.path)[0]
        if folder != self.path or _is_audio(folder):
            folder = folder.rpartition("/")[0]
        if match := HUB_URL.fullmatch(file):
            named = HUB_URL.fullmatch(folder)
            below = (named and named["path"]) or ""
            folder = f"hf://datasets/{match['repo']}@{match['revision']}/{below}"
        elif "://" not in folder:
            folder = str(Path(folder).expanduser())
        return fsspec.url_to_fs(folder)[1]


def _is_audio(file: str) -> bool:
    return PurePosixPath(file).suffix.lower() in AUDIO_SUFFIXES


def expand_braces(path: str) -> list[str]:
    """Return what a shell makes of {00..12} and {a,b}: a path for each number or word; 00 keeps its zeros."""
    match = BRACES.search(path)
    if match is None:
        return [path]
    words = match[1].split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        width = max(map(len, span.groups())) if "0" in (span[1][0], span[2][0]) else 0
        first, last = sorted(map(int, span.groups()))
        words = [f"{number:0{width}d}" for number in range(first, last + 1)]
    before, after = path[: match.start()], path[match.end() :]
    return [whole for word in words for whole in expand_braces(f"{before}{word}{after}")]


def _files_of_path(path: str) -> list[str]:
    """Files of a local path or URL that is a file, a glob or a folder."""
    system, root = fsspec.url_to_fs(path if "://" in path else str(Path(path).expanduser()))
    if GLOB.search(root):
        found = system.glob(root)
    elif system.isdir(root):
        every = system.find(root)
        found = [file for file in every if file.endswith(SHARDS) or _is_audio(file)] or [
            file for file in every if file.endswith(COMPRESSED)
        ]
    elif system.exists(root):
        found = [root]
    else:
        raise FileNotFoundError(f"{path} does not exist")
    if not found:
        raise FileNotFoundError(f"there is no Parquet file in {path}, no tar and no audio")
    local = "file" in _protocols(system)
    return [file if local else system.unstrip_protocol(file) for file in found]


def index_of(tar: str) -> str:
    """Return where NVIDIA DALI's wds2idx writes the index of a tar: beside it, named up to the first dot."""
    folder, slash, name = tar.rpartition("/")
    return f"{folder}{slash}{name.partition('.')[0]}.idx"


def _indices_beside(tars: list[str]) -> list[str]:
    """List the index files of tars, by one request a folder; a web server lists no folders."""
    there = set()
    for folder in sorted({tar.rpartition("/")[0] for tar in tars}):
        if not folder.startswith(("http://", "https://")):
            system, root = fsspec.url_to_fs(folder)
            names = [name.rpartition("/")[2] for name in system.ls(root, detail=False)]
            there |= {f"{folder}/{name}" for name in names if name.endswith(".idx")}
    return sorted({index_of(tar) for tar in tars} & there)


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
