"""Where a corpus lies, by one notation, and the stream that `datasets` makes of it.

A Hub id, or a folder of Parquet, tars or the like, is read by the Hub's own rules (its card, the names of its files); files,
globs and URLs by the builder of their kind. The files of a source are its blocks or hold them. What a folder as published
or a CSV manifest holds is listed by the corpus (corpora/base.py). Tested by tests/test_sources.py and tests/test_hub.py.
"""

import dataclasses
import functools
import math
import re
from pathlib import Path, PurePosixPath

import fsspec
from datasets import DatasetDict, load_dataset, load_dataset_builder, load_from_disk
from datasets.data_files import DataFilesList

from mtl_dist.data.columns import COLUMNS, Columns
from mtl_dist.data.faults import named
from mtl_dist.data.streams import MOST_ROWS, StreamFiles

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
COMMIT = re.compile(r"hf://datasets/[^/@]+/[^/@]+@([0-9a-f]{40})/")
BRACES = re.compile(r"\{([^{}]*)\}")
BUILDERS = {
    ".parquet": "parquet",
    ".tar": "webdataset",
    ".arrow": "arrow",
    ".jsonl": "json",
    ".json": "json",
}
DATA = BUILDERS.keys() - {".json"}
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
AUDIO_SUFFIXES = frozenset(
    ".wav .wave .flac .ogg .oga .opus .mp3 .aiff .aif .aifc .au .snd .caf .w64 .rf64".split()
)
"""What is audio in a folder; a manifest may name anything that libsndfile reads."""
SAVED_BLOCK_ROWS, SAVED_BLOCKS = 16, 1024
"""Blocks of what Dataset.save_to_disk wrote: so many rows, or more where there would be more blocks."""
SPLITS = ("train", "validation", "test")
READ_AHEAD = {"hf": {"block_size": 1 << 16}}
"""Bytes of a Parquet file of the Hub that are fetched beyond what is asked for; by default 5 MB after every row group."""


@dataclasses.dataclass(kw_only=True)
class Source:
    """One place that a corpus comes from."""

    path: str
    """A data set of the Hub, such as openslr/librispeech_asr. Parquet, WebDataset tars, Arrow or JSON lines: a file, a glob
    (data/*.parquet), braces (tars/train-{00000..00007}.tar) or a folder, local or of any fsspec URL (s3://, gs://,
    hf://datasets/, memory://). What `Dataset.save_to_disk` wrote. A folder of audio that `root` would take, or audio files
    of the Hub or of a URL. A CSV manifest with the column path, and optionally label, split, speaker and seconds. What
    exists locally is taken for local."""
    config: str | None = None
    """Configuration of a data set, such as clean."""
    split: str | None = None
    """Split of a data set, such as train.100; null for all. Those that begin with validation, dev or test are ours of that
    name."""
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

    def on_hub(self) -> bool:
        """Return whether the path is a data set's name on the Hub."""
        suffixes = (*BUILDERS, *COMPRESSED, ".csv")
        return bool(HUB_ID.fullmatch(self.path)) and not (
            Path(self.path).exists() or self.path.endswith(suffixes)
        )

    def local(self) -> Path:
        """Return the path as a local one."""
        return Path(self.path).expanduser()


def open_source(source: Source) -> dict[str, StreamFiles | list[str]]:
    """Return {split of the data set: its files as streams, or their addresses where each is audio}.

    Files, globs and URLs, of which nothing says a split, are all `train`. Blocks the caller while the Hub is asked.

    Raises:
        ValueError: nothing there, no such configuration or split, a format that is not known, a column that is missing.
        Whatever the file system's transport raises.
    """
    by_rules = source.on_hub() or source.local().is_dir()
    if by_rules:
        if not source.on_hub() and not (source.local() / "README.md").exists():
            _refuse_kinds({path.suffix for path in source.local().rglob("*")} & DATA, source)
        path = source.path if source.on_hub() else str(source.local())
        builder = load_dataset_builder(path, source.config, revision=source.revision)
        files = {str(split): list(found) for split, found in builder.config.data_files.items()}
        first = next(iter(files.values()))[0]
        commit = COMMIT.match(first)
        load = functools.partial(
            load_dataset, path, source.config, revision=commit[1] if commit else None
        )
    else:
        files, load = {"train": _expand(source.path)}, None
    wanted = {source.split: files.get(source.split)} if source.split and by_rules else files
    if None in wanted.values():
        raise ValueError(f"split: {source.split!r} (allowed: {', '.join(files)})")
    if source.split and by_rules:  # the data set's own other sides, which cost no search
        own = (split for split in files if ours(split) != "train" and ours(source.split) == "train")
        wanted |= {split: files[split] for split in own}
    return {split: _open_files(source, split, found, load) for split, found in wanted.items()}


def is_saved(folder: Path) -> bool:
    """Return whether Dataset.save_to_disk wrote a folder."""
    return any((folder / name).is_file() for name in ("state.json", "dataset_dict.json"))


def open_saved(source: Source) -> dict[str, StreamFiles]:
    """Open what Dataset.save_to_disk wrote."""
    found = load_from_disk(str(source.local()))
    found = found if isinstance(found, DatasetDict) else {"train": found}
    files = {}
    for split, rows in found.items():
        if source.split in (None, split):
            blocks = min(SAVED_BLOCKS, max(1, len(rows) // SAVED_BLOCK_ROWS))
            stream = rows.to_iterable_dataset(num_shards=blocks)
            columns = Columns.of(stream, source.columns)
            files[split] = StreamFiles.open([source.path], stream, columns)
    if not files:
        raise ValueError(f"split: {source.split!r} (allowed: {', '.join(found)})")
    return files


def ours(split: str | None) -> str:
    """Return which of our splits one of a data set is, by how its name begins."""
    first = re.split(r"[.\-_]", split or "train")[0]
    return {"dev": "validation", "valid": "validation"}.get(
        first, first if first in SPLITS else "train"
    )


def _open_files(source: Source, split: str, files: list[str], load) -> StreamFiles | list[str]:
    suffixes = {PurePosixPath(file.lower()).suffix for file in files}
    if suffixes <= AUDIO_SUFFIXES:
        return files
    compressed = next((file for file in files if file.endswith(COMPRESSED)), None)
    if compressed:
        raise ValueError(
            f"{compressed} is compressed, so nothing in it is found without reading all before it; unpack it to a plain .tar"
        )
    _refuse_kinds(suffixes, source)
    builder = BUILDERS[next(iter(suffixes))]
    if load is None:
        hub = files[0].startswith("hf://")  # others would be looked up again, one by one
        listed = {"train": files if hub else DataFilesList(files, [])}
        load, split = functools.partial(load_dataset, builder, data_files=listed), "train"
    load = functools.partial(load, split=split, streaming=True)
    if builder == "parquet":
        load = functools.partial(load, storage_options=READ_AHEAD, batch_size=MOST_ROWS)
    with named(files[0]):  # whose types are those of all
        stream = load()
        columns = Columns.of(stream, source.columns, files)
        return StreamFiles.open(files, stream, columns, load if builder == "parquet" else None)


def _refuse_kinds(suffixes: set[str], source: Source) -> None:
    builders = {BUILDERS.get(suffix) for suffix in suffixes}
    if None in builders or len(builders) > 1:
        raise ValueError(
            f"{', '.join(sorted(suffixes))} files in {source.path}; name files of one kind ({', '.join(BUILDERS)} or audio) "
            "by each source, or write your audio to Parquet with `mtl-dist prepare`; of the Hub try revision: "
            "refs/convert/parquet"
        )


def _expand(path: str) -> list[str]:
    """Return the sorted files of a path, a glob, braces or a folder at a URL."""
    files: list[str] = []
    for one in expand_braces(path):
        try:
            system, root = fsspec.url_to_fs(
                str(Path(one).expanduser()) if "://" not in one else one
            )
        except ImportError as error:
            raise ValueError(f"{one}: {error}") from error
        if re.search(r"[*?\[]", one):
            found = system.glob(root)
        elif system.isdir(root):
            every = system.find(root)
            kinds = (".parquet", ".tar", ".arrow", ".jsonl")
            found = [f for f in every if f.endswith(kinds)] or [
                f for f in every if PurePosixPath(f.lower()).suffix in AUDIO_SUFFIXES
            ]
        else:
            found = [root] if system.exists(root) else []
        if not found:
            raise ValueError(f"{one} does not exist, or holds neither data nor audio files")
        local = "file" in ((p := system.protocol), *(p if isinstance(p, tuple) else ()))
        files += found if local else [system.unstrip_protocol(file) for file in found]
    return sorted(files)


def expand_braces(path: str) -> list[str]:
    """Return what a shell makes of {00..12} and {a,b}: a path for each number or word; 00 keeps its zeros."""
    match = BRACES.search(path)
    if match is None:
        return [path]
    if numbers := re.fullmatch(r"(\d+)\.\.(\d+)", match[1]):
        first, last = numbers.groups()
        words = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    else:
        words = match[1].split(",")
    return [
        whole
        for word in words
        for whole in expand_braces(f"{path[: match.start()]}{word}{path[match.end() :]}")
    ]
