"""Rows that are listed: folders as published, CSV manifests, labels. Tested by tests/test_corpora.py."""

import csv
import dataclasses
import difflib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from mtl_dist.data.keys import generator
from mtl_dist.data.sources import SPLITS

OPTIONAL = ("label", "speaker", "seconds")


@dataclasses.dataclass(kw_only=True)
class Listing:
    """The clips of a folder as published, before any of them are set aside for validation or left out."""

    rows: list[dict]
    """{"id" (without the corpus' name), "path", "label" (a class name or None), "speaker" (or None), "split" (as
    published; None where nothing says)}."""
    classes: list[str] = dataclasses.field(default_factory=list)
    missing: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    """{split, or `any` where a table does not say: paths that are listed and not there}."""

    def with_more(self, other: "Listing", name: str, classes_grow: bool) -> "Listing":
        """Return both. Raises ValueError where both state their classes, and not the same."""
        differing = sorted({*self.classes} ^ {*other.classes})
        if self.classes and other.classes and differing and not classes_grow:
            raise ValueError(
                f"corpora.{name}.sources: their classes differ in {', '.join(differing)}; a corpus has one list of them"
            )
        missing = {
            k: self.missing.get(k, []) + other.missing.get(k, [])
            for k in {**self.missing, **other.missing}
        }
        return Listing(
            rows=self.rows + other.rows, classes=self.classes or other.classes, missing=missing
        )


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


def read_manifest(
    path: str | Path, root: Path | None, field: str, columns: Mapping[str, str] | None = None
) -> Listing:
    """List the clips of a CSV manifest, named by their paths; relative ones start from `root`, or from its folder.

    `columns` maps our names (audio, id, label, speaker, seconds) to the manifest's; `field` is what names it in messages.

    Raises:
        ValueError: no such file or column, a clip twice or without a label, or a value that is not allowed, by its line.
    """
    table = Path(path).expanduser()
    if not table.is_file():
        raise ValueError(f"{field}: the file {table} does not exist")
    columns = columns or {}
    audio = columns.get("audio", "path")
    theirs = {name: columns.get(name, name) for name in OPTIONAL} | {"id": columns.get("id", audio)}
    folder = table.parent if root is None else root
    rows, missing, seen = [], [], set()
    for where, line in read_table(table, [audio, *columns.values()]):
        if line.get(theirs["label"]) == "":
            raise ValueError(f"{where}, column {theirs['label']}: empty; every clip needs a label")
        split = line.get("split") or None
        if split not in (None, *SPLITS):
            raise ValueError(f"{where}, column split: {split!r} (allowed: {', '.join(SPLITS)})")
        clip, file = line[theirs["id"]], folder / line[audio]
        if clip in seen:
            raise ValueError(f"{where}: {clip} stands twice")
        seen.add(clip)
        row = {"id": clip, "path": file, "split": split}
        row |= {name: line.get(theirs[name]) or None for name in OPTIONAL}
        row["seconds"] = row["seconds"] and _number(
            row["seconds"], f"{where}, column {theirs['seconds']}"
        )
        if file.is_file():
            rows.append(row)
        else:
            missing.append(str(file))
    if not rows:
        raise ValueError(f"{field}: no audio files in {table} ({len(missing)} missing)")
    return Listing(rows=rows, missing={"any": missing})


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{where}: {text!r} is not a number of seconds") from error


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


def require_labels(rows: list[dict], stated: list[str], name: str) -> list[str]:
    """Return the classes: those stated, or those of the training rows. Raises ValueError where a row has another label."""
    classes = stated or sorted({r["label"] for r in rows if r["label"] and r["split"] == "train"})
    for row in rows if classes else ():
        where = row.get("path") or f"corpora.{name}, {row['id']}"
        require_label(row["label"], classes, f"{where}, not among the training labels")
    return classes


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


def check_share(share: float) -> None:
    """Raise ValueError unless there is something to train on."""
    if not 0 < share <= 1:
        raise ValueError(f"train_share: {share} is not allowed; use above 0, up to 1")


def keep_share(rows: list[dict], share: float, seed: int, name: str) -> list[dict]:
    """Leave out training rows but for a `share` of every label's, at least one; a smaller share is part of a larger one."""
    by_label: dict[str | None, dict[str, dict]] = {}
    for row in rows:
        if row["split"] == "train":
            by_label.setdefault(row["label"], {})[row["id"]] = row
    left_out: set[str] = set()
    for label, own in by_label.items() if share < 1 else ():
        kept = max(1, round(share * len(own)))
        left_out.update(shuffled(own, seed, name, "train_share", label)[kept:])
    return [row for row in rows if row["split"] != "train" or row["id"] not in left_out]
