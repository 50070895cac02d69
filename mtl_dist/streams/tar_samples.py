"""Samples of a tar, grouped and named as WebDataset does: consecutive members with one key, a column for each extension.

A column is an extension (flac, cls, txt), the field of a JSON member (json.speaker_id), or __key__.
"""

import json
from collections.abc import Iterable, Iterator
from itertools import groupby

import pyarrow as pa

from mtl_dist.streams.range_file import RangeFile
from mtl_dist.streams.sources import AUDIO_SUFFIXES, Source
from mtl_dist.streams.tar_index import Member, read_member

KEY = "__key__"
ROWS_PER_BLOCK, BLOCK_BYTES = 16, 4 << 20
"""A block is a run of samples that ends with one of these; a longer sample is a block of its own."""
LISTED = pa.schema(
    {
        **dict.fromkeys(("id", "label", "speaker"), pa.string()),
        "seconds": pa.float64(),
        "split": pa.string(),
    }
)
INDEX = pa.schema(
    [*LISTED, ("name", pa.string()), *((n, pa.int64()) for n in ("offset", "size", "block"))]
)


class Columns:
    """What is listed of a sample: our names, the tar's columns for them, and what there was."""

    def __init__(self, source: Source):
        self.mapped = source.columns
        default = {name: f"json.{name}" for name in LISTED.names} | {"id": KEY}
        self.theirs = {name: source.columns.get(name, default[name]) for name in LISTED.names}
        self.found: set[str] = set()

    def read(self, column: str) -> bool:
        """Return whether something that is listed lies in this member."""
        return any(theirs == column or _field(theirs, column) for theirs in self.theirs.values())

    def listed(self, key: str, texts: dict[str, bytes]) -> dict[str, str | float | None]:
        """Return our columns of a sample, None where it has none. Raises ValueError naming the member that is wrong."""
        values: dict[str, object] = {KEY: key}
        for column, text in texts.items():
            try:
                value = text.decode("utf-8").strip()
                if column.endswith("json"):
                    fields = json.loads(value)
                    if not isinstance(fields, dict):
                        raise TypeError(f"it is a {type(fields).__name__}")
                    values |= {f"{column}.{field}": v for field, v in fields.items()}
                else:
                    values[column] = value
            except (ValueError, TypeError) as error:
                kind = "a JSON object" if column.endswith("json") else "text in UTF-8"
                raise ValueError(f"member {key}.{column} is not {kind} ({error})") from error
        self.found |= values.keys()
        return {
            ours: self._typed(ours, values.get(theirs), key) for ours, theirs in self.theirs.items()
        }

    def _typed(self, ours: str, value: object, key: str) -> str | float | None:
        number = ours == "seconds"
        if value is None:
            return None
        allowed = int | float if number else int | str
        if isinstance(value, bool) or not isinstance(value, allowed):
            words = "a number" if number else "a string or a whole number"
            raise ValueError(
                f"sample {key}: column {self.theirs[ours]} is of type {type(value).__name__}, but {ours} must be {words}; "
                f"set columns.{ours} of the source to another"
            )
        return float(value) if number else str(value)

    def refuse_missing(self, columns: set[str]) -> None:
        """Raise ValueError where a column that was named is in no sample; `columns` are the extensions that there are."""
        for ours, theirs in self.mapped.items():
            if theirs not in columns | self.found:
                raise ValueError(
                    f"there is no column {theirs} (found: {', '.join(sorted(columns | self.found))}); set columns.{ours} "
                    "of the source"
                )


def _field(theirs: str, column: str) -> bool:
    return column.endswith("json") and theirs.startswith(f"{column}.")


def list_samples(
    members: Iterable[Member], file: RangeFile, source: Source
) -> tuple[pa.Table, list[str]]:
    """Return the index of a tar (schema INDEX) and a line for each member; small members are read as they come by.

    A sample without audio has offset -1.

    Raises:
        ValueError: no samples, none with audio, or a member that is wrong, by its name.
    """
    columns, wanted = Columns(source), source.columns.get("audio")
    rows, lines, there, keys = [], [], set(), set()
    for key, parts, texts in _grouped(members, file, columns):
        if key in keys:
            raise ValueError(
                f"sample {key} comes twice; its members have to follow each other: pack them with tar --sort=name"
            )
        keys.add(key)
        there |= parts.keys()
        lines += [f"{column} {m.offset} {m.size} {m.name}" for column, m in parts.items()]
        heard = [c for c in parts if c == wanted or (wanted is None and _is_audio(c))]
        if len(heard) > 1:
            raise ValueError(
                f"sample {key}: {' and '.join(heard)} are audio; say which by columns.audio of the source"
            )
        audio = parts[heard[0]] if heard else Member(key, -1, 0)
        rows.append(columns.listed(key, texts) | audio._asdict())
    if not rows:
        raise ValueError("there are no samples in it")
    columns.refuse_missing(there)
    if all(row["offset"] < 0 for row in rows):
        raise ValueError(
            f"there is no audio in it (found: {', '.join(sorted(there))}); set columns.audio of the source"
        )
    for row, block in zip(rows, _blocks(rows), strict=True):
        row["block"] = block
    return pa.Table.from_pylist(rows, INDEX), lines


def _grouped(
    members: Iterable[Member], file: RangeFile, columns: Columns
) -> Iterator[tuple[str, dict[str, Member], dict[str, bytes]]]:
    """Yield (key, {column: member}, {column: bytes of what is listed}) of every sample."""
    named = ((member, where) for member in members if (where := member.key_and_column()))
    for key, group in groupby(named, key=lambda pair: pair[1][0]):
        parts, texts = {}, {}
        for member, (_, column) in group:
            if column in parts:
                raise ValueError(f"member {member.name}: the sample {key} has another {column}")
            parts[column] = member
            if columns.read(column):
                texts[column] = read_member(file, member)
        yield key, parts, texts


def _is_audio(column: str) -> bool:
    return f".{column.rpartition('.')[2]}" in AUDIO_SUFFIXES


def _blocks(rows: list[dict]) -> Iterator[int]:
    """Yield the number of the block of each sample."""
    number, count, first = 0, 0, None
    for row in rows:
        there = row["offset"] >= 0
        too_long = there and first is not None and row["offset"] + row["size"] - first > BLOCK_BYTES
        if count == ROWS_PER_BLOCK or too_long:
            number, count, first = number + 1, 0, None
        if there and first is None:
            first = row["offset"]
        count += 1
        yield number
