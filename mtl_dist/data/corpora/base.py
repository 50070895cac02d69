"""The kinds of corpora: what each can be told, what its sources mean, and a registry by name.

A kind is a dataclass of settings below CorpusConfig, or a function that returns a stream, with @register_corpus("its_name").
Tested by tests/test_corpora.py and tests/test_sources.py.
"""

import abc
import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from pathlib import PurePosixPath
from typing import ClassVar

import fsspec
from datasets import IterableDataset

from mtl_dist.data.columns import Columns
from mtl_dist.data.corpora.corpus import Corpus
from mtl_dist.data.corpora.dividing import make_corpus
from mtl_dist.data.corpora.listing import Listing, read_manifest
from mtl_dist.data.corpora.synthetic import SYNTHETIC
from mtl_dist.data.sources import (
    AUDIO_SUFFIXES,
    BUILDERS,
    COMMIT,
    COMPRESSED,
    SPLITS,
    Source,
    is_saved,
    open_saved,
    open_source,
    ours,
)
from mtl_dist.data.streams import StreamFiles

DATA = (*(suffix for suffix in BUILDERS if suffix != ".json"), *COMPRESSED)
CORPORA: dict[str, type] = {}


def register_corpus(name: str) -> Callable:
    """Decorator: make a kind of corpus known under `name` in section `corpora`.

    Of a class: a dataclass below CorpusConfig. Of a function (split, **settings) -> IterableDataset | None: its settings,
    which need annotations and defaults, become the fields of the section; None says that there is no such split.
    """

    def register(kind):
        config = _config_of(kind) if inspect.isfunction(kind) else kind
        if name in CORPORA and CORPORA[name].__qualname__ != config.__qualname__:
            raise ValueError(f"corpus {name!r} is registered twice: {CORPORA[name]} and {config}")
        CORPORA[name] = config
        return kind

    return register


@dataclasses.dataclass(kw_only=True)
class CorpusConfig(abc.ABC):
    """What a kind of corpus can be told of its sources; its `root` is the short form of one: a folder."""

    LABELLED: ClassVar[bool] = False
    """Whether streams with a column of labels are listed."""
    CLASSES_GROW: ClassVar[bool] = False
    """Whether a source may have classes that another has not."""

    train_share: ClassVar[float] = 1.0
    """What labelled kinds have as a field."""

    sources: list[Source] = dataclasses.field(default_factory=list)
    """Instead of root, a list of any of these: data sets of the Hub, Parquet, tars, JSON lines, of a disk or of a URL;
    folders that root would take; CSV manifests; audio files of the Hub or of a URL. Such as [{path: openslr/librispeech_asr,
    config: clean, split: train.100, columns: {speaker: speaker_id}}, {path: "tars/train-{00000..00007}.tar"}, {path:
    data/LibriSpeech}, {path: clips.csv}], or [{path: chimechallenge/chime3-background-noise}]."""

    @abc.abstractmethod
    def published(self, name: str, root: str | None, field: str) -> Listing:
        """List the clips of a folder as published; `field` is what named it. Raises ValueError for what is wrong in it."""

    @abc.abstractmethod
    def clip_at(self, place: PurePosixPath, field: str) -> dict:
        """Return the row of an audio file, but for its path, by its place below the folder of its source.

        Raises ValueError for what is wrong with it.
        """

    def divide(self, rows: list[dict], name: str, seed: int) -> list[dict]:
        """Return the listed rows, each with its split. Raises ValueError for what is wrong with them."""
        return [row | {"split": row["split"] or "train"} for row in rows]

    def heldout_shares(self) -> tuple[float, float]:
        """Return the shares of a stream's blocks for validation and test, where it has no such splits."""
        return 0.0, 0.0

    def chosen_splits(self, there: list[str]) -> list[str]:
        """Return which splits of a data set are taken, of which none was named. Raises ValueError where one is missing."""
        return there

    def keep(self) -> Callable[[str], bool] | None:
        """Return which ids of a stream are taken; None for all."""
        return None

    def open(self, name: str, seed: int) -> Corpus:
        """Find the corpus: list what is listed, open what is streamed. Rank 0 calls it, for all.

        Raises:
            ValueError: what is wrong, with the name of the field, file, column or row.
            Whatever the file systems' transports raise.
        """
        listing, streams = Listing(rows=[]), []
        given = [source.weight is not None for source in self.sources]
        if any(given) and not all(given):
            raise ValueError(f"corpora.{name}.sources: give every source a weight, or none")
        for number, source in enumerate(self.sources or [None]):
            field = f"corpora.{name}." + ("root" if source is None else f"sources[{number}]")
            found = self._look(name, field, source)
            if isinstance(found, Listing):
                rows = [row | {"source": number} for row in found.rows]
                found = dataclasses.replace(found, rows=rows)
                listing = listing.with_more(found, name, self.CLASSES_GROW)
            else:
                streams += [(number, split, files) for split, files in found.items()]
        corpus = make_corpus(
            name,
            listing,
            streams,
            seed=seed,
            divide=self.divide,
            labelled=self.LABELLED,
            keep=self.keep(),
            shares=self.heldout_shares(),
            train_share=self.train_share,
        )
        if any(given):
            corpus.weights = [source.weight for source in self.sources]
        return corpus

    def _look(
        self, name: str, field: str, source: Source | None
    ) -> Listing | dict[str, StreamFiles]:
        """Return what a source holds: rows, or {split of the data set: files}; of `root` where there are no sources."""
        root = self.root if source is None else source.path
        source = source or Source(path=str(root))
        try:
            if source.path.endswith(".csv"):
                return read_manifest(source.path, None, field, source.columns)
            if is_saved(source.local()):
                return open_saved(source)
            if root is None or root == SYNTHETIC or _is_published(source):
                if source.columns:
                    raise ValueError(f"{field}.columns: a folder of audio has no columns")
                return self.published(name, root, field)
            found = open_source(source)
        except (ValueError, RuntimeError, FileNotFoundError) as error:
            if str(error).startswith("corpora."):
                raise
            where = (
                "" if str(error).startswith("/") else f"{source.path}: "
            )  # a file's name says it
            raise ValueError(f"{field}: {where}{error}") from error
        if any(isinstance(files, list) for files in found.values()):
            return self._audio_files(source, found, field)
        named = source.split is not None
        return (
            found if named else {split: found[split] for split in self.chosen_splits(list(found))}
        )

    def _audio_files(self, source: Source, found: dict[str, list[str]], field: str) -> Listing:
        """List audio files of the Hub or a URL, named by their places below the folder of the source."""
        rows, pattern = [], re.split(r"[*?\[{]", source.path)[0]
        folder = pattern if pattern == source.path else pattern.rpartition("/")[0]
        for split, files in found.items():
            for file in files:
                place = _place(file, folder)
                row = self.clip_at(PurePosixPath(place), field)
                own = ours(split) if len(found) > 1 or source.split in SPLITS else row["split"]
                rows.append(row | {"path": file, "split": own})
        return Listing(rows=sorted(rows, key=lambda row: row["id"]))


def _place(file: str, folder: str) -> str:
    """Return the path of an audio file below a data set of the Hub, or below a folder, however that is written."""
    if commit := COMMIT.match(file):
        return file[commit.end() :]
    (_, path), (_, root) = fsspec.url_to_fs(file), fsspec.url_to_fs(folder)
    return path.removeprefix(root).strip("/") or PurePosixPath(path).name


def _is_published(source: Source) -> bool:
    """Return whether a source is a local folder as published: it holds audio, or at least no data."""
    path = source.path
    if (
        source.config
        or source.split
        or source.on_hub()
        or "://" in path
        or re.search(r"[*?\[{]", path)
    ):
        return False
    if path.endswith(DATA) or (source.local() / "manifest.json").is_file():
        return False
    for _, _, files in os.walk(source.local()):
        if any(PurePosixPath(file).suffix.lower() in AUDIO_SUFFIXES for file in files):
            return True
        if any(file.endswith(DATA) for file in files):
            return False
    return True


def _config_of(function: Callable) -> type:
    """Return the class of settings of a function that returns streams."""
    _, *settings = inspect.signature(function).parameters.values()
    fields = [(p.name, p.annotation, dataclasses.field(default=p.default)) for p in settings]
    base = (_FromFunction,)
    made = dataclasses.make_dataclass(function.__name__, fields, bases=base, kw_only=True)
    made.FUNCTION, made.__doc__ = staticmethod(function), function.__doc__
    made.__module__ = function.__module__
    return made


@dataclasses.dataclass(kw_only=True)
class _FromFunction:
    """The settings of a function that returns streams: a corpus of a user's own."""

    FUNCTION: ClassVar[Callable[..., IterableDataset | None]]

    def open(self, name: str, seed: int) -> Corpus:
        """Call the function for each split. Raises ValueError where what it returns is no stream, or lacks a column."""
        streams = []
        for split in SPLITS:
            stream = self.FUNCTION(split, **vars(self))
            if stream is not None and not isinstance(stream, IterableDataset):
                raise ValueError(
                    f"corpora.{name}: its function returned a {type(stream).__name__}, not a datasets.IterableDataset"
                )
            if stream is not None:
                columns = Columns.of(stream, {})
                files = StreamFiles.open([f"its stream for {split}"], stream, columns)
                streams.append((0, split, files))
        corpus = make_corpus(name, Listing(rows=[]), streams, seed=seed, labelled=True)
        return dataclasses.replace(corpus, sendable=False)
