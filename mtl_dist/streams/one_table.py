"""One table of the listings of all files of a corpus. Tested by tests/test_shards.py and tests/test_tars.py."""

from collections.abc import Sequence

import pyarrow as pa

from mtl_dist.streams.retry import ShardError
from mtl_dist.streams.shard_file import ShardFile, names_below
from mtl_dist.streams.sources import Source


def in_one_table(
    corpus: str, sources: Sequence[Source], files: Sequence[ShardFile], tables: Sequence[pa.Table]
) -> pa.Table:
    """Put the listing of each file under the one before it.

    Raises:
        ShardError: a column has another type in another file.
    """
    tables = _keys_told_apart(sources, files, tables)
    schema = tables[0].schema
    for file, table in zip(files, tables, strict=True):
        try:
            schema = pa.unify_schemas([schema, table.schema], promote_options="permissive")
        except pa.ArrowException as error:
            raise ShardError(
                f"corpus {corpus}, {file.shown()}: a column has another type than in {files[0].shown()} "
                f"({error}); write both alike"
            ) from error
    return pa.concat_tables(tables, promote_options="permissive")


def _keys_told_apart(
    sources: Sequence[Source], files: Sequence[ShardFile], tables: Sequence[pa.Table]
) -> list[pa.Table]:
    """Put each tar's name before its keys, where keys of one source come in several of its tars."""
    tables = list(tables)
    names = [name.removesuffix(".tar") for name in names_below(files)]
    for number, source in enumerate(sources):
        own = [n for n, f in enumerate(files) if f.source == number and f.named_by_key(source)]
        keys = [set(tables[n]["id"].to_pylist()) for n in own]
        if sum(map(len, keys)) > len(set().union(*keys)):
            for n in own:
                ids = pa.array([f"{names[n]}/{key}" for key in tables[n]["id"].to_pylist()])
                tables[n] = tables[n].set_column(0, "id", ids)
    return tables
