"""What a corpus is: rows per split in a Hugging Face `datasets` table, read by name through a registry.

A row is {"id", "audio": {"path", "bytes"}, "label", "split", "corpus", "number" (within the corpus), "source", "block",
"place", and SOUND}; audio stays a path, or lies in the corpus' shards, until a task needs a stretch of it: a block of -1
says that the clip has a file of its own, here or at a URL. A new kind of corpus is a dataclass with a `load` and
@register_corpus("its_name"). Tested by tests/test_corpora.py.
"""

import csv
import dataclasses
import difflib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import datasets
import pyarrow as pa

from mtl_dist.streams.keys import generator
from mtl_dist.streams.shards import Shards

FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": {"path": datasets.Value("string"), "bytes": datasets.Value("binary")},
        "label": datasets.Value("int64"),
        "split": datasets.Value("string"),
        "corpus": datasets.Value("string"),
        "number": datasets.Value("int64"),
        "source": datasets.Value("int64"),
        "block": datasets.Value("int64"),
        "place": datasets.Value("int64"),
        "silence_db": datasets.Value("float64"),
        "sound_start": datasets.Value("int64"),
        "sound_stop": datasets.Value("int64"),
    }
)
SOUND = ("silence_db", "sound_start", "sound_stop")
"""Where the sound of a clip begins and ends, in samples, and the level in dBFS below which it was taken for silence; None
where that is not known."""
SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(kw_only=True)
class Listing:
    """The clips of a folder as published, before any of them are set aside for validation or left out."""

    rows: list[dict]
    """{"id" (without the corpus' name), "path", "label" (a class name or None), "speaker" (or None), "split" (as
    published; None where nothing says)}; of a corpus with `sources` also "source", the number of its source."""
    classes: list[str] = dataclasses.field(default_factory=list)
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """As in Corpus."""
    shards: Shards | None = None
    """As in Corpus; rows in shards have "block" and "place" instead of "path"."""
    in_pieces: bool = False
    """As in Corpus."""
    weights: list[float] | None = None
    """As in Corpus."""

    def corpus(self, name: str, rows: Iterable[dict], classes: list[str] | None = None) -> "Corpus":
        """Return the corpus of these clips: `rows` as listed, with split and full id."""
        made = make_corpus(
            name, rows, classes if classes is not None else self.classes, self.missing
        )
        return dataclasses.replace(
            made, shards=self.shards, in_pieces=self.in_pieces, weights=self.weights
        )


@dataclasses.dataclass(kw_only=True)
class Corpus:
    """Rows per split, the classes that labels index, and the files that were listed but are not there."""

    name: str
    splits: dict[str, datasets.Dataset]
    classes: list[str] = dataclasses.field(default_factory=list)
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """{split, or `any` where a table does not say: paths that are listed and not there}."""
    shards: Shards | None = None
    """What reads the blocks of rows that have no file of their own."""
    in_pieces: bool = False
    """Whether recordings were cut into pieces, of which every split has its own."""
    weights: list[float] | None = None
    """The shares that the sources have of the corpus' clips in a round, by their numbers; None for all clips alike."""

    @property
    def clips(self) -> int:
        """Number of clips of all splits."""
        return sum(map(len, self.splits.values()))

    def describe(self) -> str:
        """One line for the log."""
        sizes = ", ".join(f"{len(rows)} {split}" for split, rows in self.splits.items())
        labels = f", {len(self.classes)} classes" if self.classes else ""
        absent = self.all_missing()
        missing = f", {len(absent)} files missing, such as {absent[0]}" if absent else ""
        return f"{self.name}: {sizes} clips{labels}{missing}"

    def all_missing(self) -> list[str]:
        """Return the paths of all files that are listed and not there."""
        return [path for paths in self.missing.values() for path in paths]


CORPORA: dict[str, type] = {}


def register_corpus(name: str) -> Callable[[type], type]:
    """Class decorator: make a kind of corpus known under `name` in section `corpora`."""

    def register(config: type) -> type:
        if name in CORPORA and CORPORA[name].__qualname__ != config.__qualname__:
            raise ValueError(f"corpus {name!r} is registered twice: {CORPORA[name]} and {config}")
        CORPORA[name] = config
        return config

    return register


def make_corpus(
    name: str,
    rows: Iterable[dict],
    classes: list[str] | None = None,
    missing: dict[str, list[str]] | None = None,
) -> Corpus:
    """Build a Corpus from rows {"id", "path", "label" (a class name or None), "split"}.

    Raises:
        ValueError: a split that a task would train on is empty, or two rows have one id.
    """
    classes = classes or []
    index = {label: i for i, label in enumerate(classes)}
    table: dict[str, list[dict]] = {split: [] for split in SPLITS}
    seen: set[str] = set()
    for row in rows:
        if row["id"] in seen:
            raise ValueError(f"corpora.{name}: two clips have the id {row['id']!r}")
        seen.add(row["id"])
        table[row["split"]].append(
            {
                "id": row["id"],
                "audio": {"path": row.get("path") and str(row["path"]), "bytes": None},
                "label": index[row["label"]] if classes else -1,
                "split": row["split"],
                "corpus": name,
                "number": len(seen) - 1,
                "source": row.get("source", 0),
                "block": row.get("block", -1),
                "place": row.get("place", 0),
                **{column: row.get(column) for column in SOUND},
            }
        )
    schema = FEATURES.arrow_schema  # by Arrow: `datasets` looks at every cell, ten times as long
    splits = {
        split: datasets.Dataset(pa.Table.from_pylist(part, schema)) for split, part in table.items()
    }
    return Corpus(name=name, splits=splits, classes=classes, missing=missing or {})


def require_folder(folder: Path, field: str, remedy: str) -> Path:
    """Return `folder`, or raise ValueError naming the field and what should be there."""
    if not folder.is_dir():
        raise ValueError(f"{field}: the folder {folder} does not exist; {remedy}")
    return folder


def read_table(path: Path, columns: Iterable[str]) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("FILE, line N", {column: text}) of a CSV file in UTF-8, with or without a byte order mark.

    Raises:
        ValueError: no such columns, a line with fewer columns, or not a CSV file in UTF-8; the message names the file.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as lines:
            reader = csv.DictReader(lines)
            found = list(reader.fieldnames or [])
            missing = [column for column in columns if column not in found]
            if missing:
                raise ValueError(f"{path}: column {', '.join(missing)} is missing; found {found}")
            for row in reader:
                where = f"{path}, line {reader.line_num}"
                short = [column for column in found if row[column] is None]
                if short:
                    raise ValueError(f"{where}: the line ends before column {', '.join(short)}")
                yield where, row
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{path}: not a CSV file in UTF-8 ({error})") from error


def alike(classes: list[str]) -> tuple[str, str] | None:
    """Return two classes that differ in case or spaces only, if there are any: most likely a slip."""
    seen: dict[str, str] = {}
    for label in classes:
        other = seen.setdefault(label.strip().casefold(), label)
        if other != label:
            return other, label
    return None


def require_label(label: str | None, classes: list[str], where: str) -> str:
    """Return `label`, or raise ValueError naming the row, the label and the nearest known one."""
    if label in classes:
        return label
    near = difflib.get_close_matches(label or "", classes, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"{where}: unknown label {label!r}{hint} (allowed: {', '.join(classes)})")


def shuffled(items: Iterable, *key: object) -> list:
    """Return the items in an order that depends on the items and the key alone."""
    ordered = sorted(items)
    return [ordered[i] for i in generator(*key).permutation(len(ordered))]


def stratified_share(labels: dict[str, str], share: float, *key: object) -> set[str]:
    """Choose `share` of the ids of every label (rounded, at least one where a label has two or more ids)."""
    by_label: dict[str, list[str]] = {}
    for clip, label in labels.items():
        by_label.setdefault(label, []).append(clip)
    chosen: set[str] = set()
    for label, clips in by_label.items():
        least = 1 if share > 0 and len(clips) > 1 else 0
        count = max(least, round(share * len(clips)))
        chosen.update(shuffled(clips, *key, label)[:count])
    return chosen
