"""Columns of a data set: checked against what we need, and brought to our names and types."""

from collections.abc import Callable, Iterable

import datasets
import pyarrow as pa

from mtl_dist.streams.sources import COLUMNS, Source


def _is_bytes(kind: pa.DataType) -> bool:
    return pa.types.is_binary(kind) or pa.types.is_large_binary(kind)


def _is_audio(kind: pa.DataType) -> bool:
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _is_bytes(kind.field("bytes").type)
    return _is_bytes(kind)


def _is_text(kind: pa.DataType) -> bool:
    return any(
        test(kind)
        for test in (
            pa.types.is_string,
            pa.types.is_large_string,
            pa.types.is_integer,
            pa.types.is_null,
        )
    )


def _is_number(kind: pa.DataType) -> bool:
    return pa.types.is_floating(kind) or pa.types.is_integer(kind) or pa.types.is_null(kind)


NAME = (_is_text, "a string or a whole number")
TYPES: dict[str, tuple[Callable[[pa.DataType], bool], str]] = {
    "audio": (_is_audio, "binary, or a struct with a binary field bytes"),
    "id": NAME,
    "label": NAME,
    "speaker": NAME,
    "seconds": (_is_number, "a number"),
}


def check_columns(schema: pa.Schema, source: Source) -> None:
    """Raise ValueError unless there is audio as bytes, and our columns have the types that they should have."""
    for ours in COLUMNS:
        theirs = source.column(ours)
        if theirs in schema.names:
            kind, (allowed, words) = schema.field(theirs).type, TYPES[ours]
            if not allowed(kind):
                raise ValueError(f"column {theirs} is of type {kind}, but {ours} must be {words}")
        elif ours == "audio" or ours in source.columns:
            raise ValueError(
                f"there is no column {theirs} (found: {', '.join(schema.names)}); "
                f"set columns.{ours} of the source"
            )


def listed_columns(schema: pa.Schema, source: Source, others: Iterable[str] | None) -> list[str]:
    """Return the columns of a listing: ours and `others` (the data set's names; None: all), never audio."""
    ours = {source.column(name) for name in COLUMNS}
    wanted = set(schema.names) if others is None else ours | set(others)
    return [name for name in schema.names if name in wanted and name != source.column("audio")]


def with_our_names(table: pa.Table, source: Source) -> pa.Table:
    """Rename our columns; labels become text, by class name where the data set has names, and seconds float64."""
    features = datasets.Features.from_arrow_schema(table.schema)
    others = dict(zip(table.column_names, table.columns, strict=True))
    ours = {}
    for name in COLUMNS[1:]:
        theirs = source.column(name)
        if theirs not in others:
            continue
        column = others.pop(theirs)
        if isinstance(features[theirs], datasets.ClassLabel):
            classes = pa.array([*features[theirs].names])
            column = classes.take(pa.compute.if_else(pa.compute.less(column, 0), None, column))
        ours[name] = column.cast(pa.float64() if name == "seconds" else pa.string())
    return pa.table(ours | {name: column for name, column in others.items() if name not in ours})
