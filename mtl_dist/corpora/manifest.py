"""A CSV manifest: a line for each clip, with the column path, and optionally label, split, speaker and seconds."""

from collections.abc import Mapping
from pathlib import Path

from mtl_dist.corpora.base import SPLITS, Listing, read_table

OPTIONAL = ("label", "speaker", "seconds")


def read_manifest(
    table: Path, root: Path | None, field: str, columns: Mapping[str, str] | None = None
) -> Listing:
    """List the clips of a manifest, named by their paths; relative ones start from `root`, or from the manifest's folder.

    `columns` maps our names (audio, id, label, speaker, seconds) to the manifest's; `field` is what names it in messages.

    Raises:
        ValueError: no such file or column, a clip twice or without a label, or a value that is not allowed, by its line.
    """
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
        clip, path = line[theirs["id"]], folder / line[audio]
        if clip in seen:
            raise ValueError(f"{where}: {clip} stands twice")
        seen.add(clip)
        row = {"id": clip, "path": path, "split": split}
        row |= {name: line.get(theirs[name]) or None for name in OPTIONAL}
        row["seconds"] = row["seconds"] and _number(
            row["seconds"], f"{where}, column {theirs['seconds']}"
        )
        if path.is_file():
            rows.append(row)
        else:
            missing.append(str(path))
    if not rows:
        raise ValueError(f"{field}: no audio files in {table} ({len(missing)} missing)")
    return Listing(rows=rows, missing={"any": missing})


def _number(text: str, where: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise ValueError(f"{where}: {text!r} is not a number of seconds") from error
