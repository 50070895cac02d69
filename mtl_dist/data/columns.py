"""The columns of a stream, brought to our names and types. Tested by tests/test_sources.py."""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import PurePosixPath

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import IterableDataset

COLUMNS = ("audio", "id", "label", "speaker", "seconds")
"""What a source's `columns` may rename."""
AUDIO = {"bytes": datasets.Value("binary"), "path": datasets.Value("string")}
FEATURES = datasets.Features(
    {
        "id": datasets.Value("string"),
        "audio": AUDIO,
        "label": datasets.Value("string"),
        "speaker": datasets.Value("string"),
        "seconds": datasets.Value("float64"),
        "silence_db": datasets.Value("float64"),
        "sound_start": datasets.Value("int64"),
        "sound_stop": datasets.Value("int64"),
    }
)
"""The columns of a corpus' stream. `label` is a class by name. The last three, of prepared shards: where the sound of a clip
begins and ends, in samples, and the level in dBFS below which it was taken for silence. What is not known is null."""
SCHEMA = FEATURES.arrow_schema
NOT_IN_ROWS = ("speaker", "seconds")
"""What lanes do not need of a row."""
ID_COLUMNS = ("id", "__key__")
AUDIO_COLUMNS = ("audio", *"flac wav ogg opus mp3 path file_name".split())
"""Where audio is looked for unless columns.audio says it: struct or binary, or a path relative to the files' folder."""


@dataclasses.dataclass(frozen=True)
class Columns:
    """Brings a stream and its tables to FEATURES.

    Args:
        names: {our name: the data set's}; a member of a struct is named column.member, as of a tar's JSON (json.speaker).
        folder: what paths in the column audio are relative to.
        classes: {column: class names} of its label columns whose values are numbers.
        audio: False for tables that were read without audio.
    """

    names: Mapping[str, str]
    folder: str = ""
    classes: Mapping[str, list[str]] = dataclasses.field(default_factory=dict)
    audio: bool = True

    @classmethod
    def of(
        cls, stream: IterableDataset, names: Mapping[str, str], files: Sequence[str] = ()
    ) -> "Columns":
        """Return those of a stream of files. Raises ValueError for what is named, or needed, and is not there."""
        features = stream.features or datasets.Features({})
        classes = {n: f.names for n, f in features.items() if isinstance(f, datasets.ClassLabel)}
        columns = cls(names, os.path.dirname(files[0]) if files else "", classes)
        for name in ("audio", *names) if features else ():
            columns.find(name, features.arrow_schema)
        return columns

    def stream(self, stream: IterableDataset, rows: int, typed: bool = False) -> IterableDataset:
        """Return a stream with our columns, so many rows at a time; audio as bytes or a path, never decoded.

        It states no features, which `datasets` would work out for every block; Corpus.stream does. Nor does it ask for those
        of a stream that is `typed`: whose tables have them already.
        """
        for name, feature in (stream.features or {}).items():
            if isinstance(feature, datasets.Audio):
                stream = stream.cast_column(name, AUDIO)
        stream = stream.with_format("arrow")
        if typed:
            stream.info.features = None
        return stream.map(self, batched=True, batch_size=rows)

    def __call__(self, table: pa.Table) -> pa.Table:
        """Return the table with our columns. Raises ValueError naming a column that is missing or of another type."""
        if not self.names and table.schema.equals(SCHEMA):  # prepared shards, mostly
            if not pc.struct_field(whole(table["audio"]), "bytes").null_count:
                return table
        arrays = []
        for name, field in zip(SCHEMA.names, SCHEMA, strict=True):
            theirs = self.find(name, table.schema)
            if name == "audio":
                column = self._audio(table, theirs) if self.audio else None
            else:
                column = None if theirs is None else self._cast(table, name, theirs, field.type)
            arrays.append(pa.nulls(len(table), field.type) if column is None else column)
        return pa.table(arrays, schema=SCHEMA)

    def find(self, name: str, schema: pa.Schema) -> str | None:
        """Return the data set's name of our column, if there is one. Raises ValueError for one that was named and is not."""
        if name in self.names:
            if self.names[name].partition(".")[0] in schema.names:
                return self.names[name]
            raise ValueError(
                f"columns.{name}: there is no column {self.names[name]} (found: {', '.join(schema.names)})"
            )
        usual = {"id": ID_COLUMNS, "audio": AUDIO_COLUMNS}.get(name, (name,))
        found = next((column for column in usual if column in schema.names), None)
        if found is None and name == "audio" and self.audio:
            raise ValueError(
                f"there is no column audio (found: {', '.join(schema.names)}); set columns.audio of the source"
            )
        return found

    def _cast(self, table: pa.Table, name: str, theirs: str, kind: pa.DataType):
        column = _member(table, theirs, name)
        if theirs in self.classes:
            names = pa.array([*self.classes[theirs]])
            index = pc.if_else(pc.greater_equal(column, 0), column, None)
            return names.take(whole(index))
        fits = pa.types.is_null(column.type) or pa.types.is_integer(column.type)
        if pa.types.is_string(kind):
            fits = fits or pa.types.is_string(column.type) or pa.types.is_large_string(column.type)
        else:
            fits = fits or pa.types.is_floating(column.type)
        if not fits:
            what = "a string or a whole number" if pa.types.is_string(kind) else "a number"
            raise ValueError(f"column {theirs} is of type {column.type}, but {name} must be {what}")
        return column.cast(kind)

    def _audio(self, table: pa.Table, theirs: str) -> pa.Array:
        """Return a struct of bytes and path; a path without bytes starts from `folder`."""
        column = whole(_member(table, theirs, "audio"))
        kind = column.type
        if kind == SCHEMA.field("audio").type and not pc.struct_field(column, "bytes").null_count:
            return column
        nothing = pa.nulls(len(column), pa.string())
        if pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            data = pc.struct_field(column, "bytes")
            has_path = kind.get_field_index("path") >= 0
            path = pc.struct_field(column, "path") if has_path else nothing
            if data.null_count and has_path:
                path = pc.if_else(data.is_null(), self._from_folder(path), path.cast(pa.string()))
        elif pa.types.is_binary(kind) or pa.types.is_large_binary(kind):
            data, path = column, nothing
        elif pa.types.is_string(kind):
            data, path = pa.nulls(len(column), pa.binary()), self._from_folder(column)
        else:
            raise ValueError(
                f"column {theirs} is of type {kind}, but audio must be binary, a struct with a binary field bytes, or a path"
            )
        if not (pa.types.is_null(data.type) or "binary" in str(data.type)):
            raise ValueError(f"column {theirs} is of type {kind}, but its bytes must be binary")
        return pa.StructArray.from_arrays(
            [data.cast(pa.binary()), path.cast(pa.string())], names=["bytes", "path"]
        )

    def _from_folder(self, paths: pa.Array) -> pa.Array:
        """Return paths; relative ones start from `folder`."""
        return pa.array([path and self._absolute(path) for path in paths.to_pylist()], pa.string())

    def _absolute(self, path: str) -> str:
        absolute = "://" in path or PurePosixPath(path).is_absolute() or not self.folder
        return path if absolute else f"{self.folder}/{path}"


def whole(column: pa.ChunkedArray) -> pa.Array:
    """Return a column in one piece; where it is in one, without the copy that combine_chunks makes."""
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


def rows_of(table: pa.Table) -> tuple[list[dict], Callable[[int], dict]]:
    """Return what a lane needs of a table's rows, and at(row) -> its audio, whose bytes are copied once, not twice."""
    column = whole(table["audio"])
    data, paths = pc.struct_field(column, "bytes"), pc.struct_field(column, "path").to_pylist()
    there, (_, offsets, values) = data.is_valid().to_pylist(), data.buffers()
    bounds = np.frombuffer(offsets, np.int32)[data.offset :] if offsets else None

    def at(row: int) -> dict:
        if not there[row]:
            return {"bytes": None, "path": paths[row]}
        inside = memoryview(values or b"")[bounds[row] : bounds[row + 1]]
        return {"bytes": bytes(inside), "path": paths[row]}

    return table.drop_columns(["audio", *NOT_IN_ROWS]).to_pylist(), at


def _member(table: pa.Table, theirs: str, ours: str) -> pa.ChunkedArray:
    """Return a column, or a member of a struct."""
    name, *members = theirs.split(".") if theirs not in table.column_names else [theirs]
    column = table[name]
    for member in members:
        if not pa.types.is_struct(column.type) or column.type.get_field_index(member) < 0:
            raise ValueError(f"columns.{ours}: there is no {theirs}: {name} is {column.type}")
        column = pc.struct_field(column, member)
    return column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column])
