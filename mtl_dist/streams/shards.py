"""Shards of a corpus: Parquet files and tars, read in blocks (row groups, runs of samples), each by one request.

Audio files at URLs, which are clips themselves, are no shards, but listed and fetched alike (streams/audio_files.py).

`datasets` finds the files of a data set (configurations, splits, the commit). The blocks are not read through its
streaming: that opens the file and parses its whole footer for every block (15 ms a block of files of 288 blocks, 0.9 ms
here), asks the server again for what is known, and retries in three layers whose waits multiply (20 times 60 s and more).
Here one rank lists and reads the footers, and sends the object to the others: they never ask for a list or a footer.
Memory: the footers, compressed (110 bytes a block of 8 columns; a tar's index: about 20 bytes a sample), and, of files whose
blocks are not plain (streams/parquet.py), up to 256 parsed. Tested by
tests/test_shards.py, tests/test_hub.py and tests/test_tars.py.
"""

import contextlib
import functools
import hashlib
import logging
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa

from mtl_dist.streams.audio_files import AudioFile, AudioFiles, in_pieces
from mtl_dist.streams.block_cache import BlockCache
from mtl_dist.streams.fetch import list_files, read_range
from mtl_dist.streams.one_table import in_one_table
from mtl_dist.streams.parquet_file import load_parquet
from mtl_dist.streams.retry import HopelessError, Remote, ShardError, persist, speaker
from mtl_dist.streams.shard_file import Audio, ShardFile, SourceFile, names_below
from mtl_dist.streams.sources import Source, index_of
from mtl_dist.streams.tar_file import load_tar

log = logging.getLogger("mtl_dist")

THREADS = 16
"""Requests at a time while footers and listings are read."""
SAY_EVERY_SECONDS = 10.0
"""How often the log says how far this is."""


class Shards:
    """The blocks of a corpus in a fixed order. Small, and picklable for loader workers and other ranks.

    Attributes:
        rows: rows of each block, int64 (blocks,).
        files: file of each block.
        source: number of the source that each block is of, int64 (blocks,).
        alone: the audio files.
        rank: of the process, for messages; set it where the object is received.
    """

    def __init__(
        self,
        corpus: str,
        sources: list[Source],
        files: list[ShardFile],
        remote: Remote,
        alone: Iterable[AudioFile] = (),
    ):
        self.corpus, self.sources, self.remote = corpus, sources, remote
        self.alone = AudioFiles(alone)
        self.rank: int | None = None
        self.cache = (
            BlockCache(Path(remote.cache), int(remote.cache_gigabytes * 1e9))
            if remote.cache
            else None
        )
        self._files = files
        places, rows = [], []
        for number, file in enumerate(files):
            for block, count in enumerate(file.rows()):
                if count:
                    places.append((number, block))
                    rows.append(count)
        self.files = [files[number].path for number, _ in places]
        self._places = np.array(places, np.int64).reshape(-1, 2)
        self.rows = np.array(rows, np.int64)
        self.source = np.array([files[number].source for number, _ in places], np.int64)

    @classmethod
    def open(
        cls,
        corpus: str,
        sources: Source | str | Sequence[Source | str],
        remote: Remote | None = None,
        rank: int | None = 0,
    ) -> "Shards":
        """List the files and read their footers or indices: on one rank, which sends the object to the others.

        Raises:
            ShardError: a source is not there or has no rows, or a file is cut short or lacks a column.
            ValueError: no sources.
        """
        remote = remote or Remote()
        sources = [sources] if isinstance(sources, Source | str) else sources
        sources = [s if isinstance(s, Source) else Source(path=s) for s in sources]
        if not sources:
            raise ValueError(f"corpora.{corpus}: there are no sources; name at least one")
        files: list[ShardFile] = []
        alone: list[AudioFile] = []
        for number, source in enumerate(sources):
            what = f"corpus {corpus}, source {source.path}"
            listed = persist(functools.partial(list_files, source, remote), remote, rank, what)
            audio = [
                AudioFile(path=path, source=number, **about._asdict())
                for path, about in listed.items()
                if about is not None
            ]
            found = [] if audio else _load(list(listed), number, source, remote, rank, what)
            if not audio and not sum(sum(file.rows()) for file in found):
                raise ShardError(f"{what}: there are no rows in its {len(found)} files")
            files += found
            alone += audio
        shards = cls(corpus, sources, files, remote, alone)
        shards.rank = rank
        return shards

    def __len__(self) -> int:
        return len(self.rows)

    def name(self, block: int) -> str:
        """Return file and row group, or samples, of a block, for messages."""
        number, place = self._places[block].tolist()
        return f"{self._files[number].shown()}, {self._files[number].block_name(place)}"

    def fingerprint(self) -> dict[str, str]:
        """Return {"source 0: FILE": size and digest of its footer or index, or of audio}, FILE as `names_below` has it.

        So it stays the same when the files are copied to another place, at another time.
        """
        files = [*self._files, *self.alone.by_path.values()]
        return {
            f"source {file.source}: {name}": f"{file.size}-{file.digest}"
            for file, name in zip(files, names_below(files), strict=True)
        }

    def refuse_changes(self, saved: dict[str, str]) -> None:
        """Compare with a fingerprint of earlier. Raises ShardError naming the first file that is not the same."""
        now = self.fingerprint()
        for file in sorted({*now, *saved}):
            if now.get(file) != saved.get(file):
                how = "is new" if file not in saved else "is gone" if file not in now else "changed"
                raise ShardError(
                    f"corpus {self.corpus}, {file} {how} since the checkpoint was written, and with it the order of "
                    "clips; put the files back as they were, or start a new run"
                )

    def read(self, block: int) -> list[Audio]:
        """Read the audio of all rows of a block, not decoded: files in memory, or None.

        One request. Raises ShardError naming rank, corpus, file, row group and the reason.
        """
        number, place = self._places[block].tolist()
        file, what = self._files[number], self.name(block)
        source = self.sources[file.source]
        parts = {
            start: self._block_bytes(file, start, end, what)
            for start, end in file.audio_ranges(place, source)
        }
        with self._undamaged(what):
            return file.audio(place, source, parts)

    def clip(self, path: str) -> dict:
        """Return an audio file as `open_clip` takes it; reading raises ShardError naming rank, corpus, file, reason."""
        file = self.alone.by_path[path]
        opener = functools.partial(self.alone.open, path, self._piece)
        return {"path": file.shown(), "bytes": None, "size": file.size, "open": opener}

    def _piece(self, file: SourceFile, first: int, end: int) -> bytes | bytearray:
        if self.cache is None:
            return self._fetch(file, first, end, file.shown())
        pieces = in_pieces(first, end, file.size)
        found = [self._block_bytes(file, *piece, file.shown()) for piece in pieces]
        return b"".join(found)[first - pieces[0][0] : end - pieces[0][0]]

    def listing(self, columns: Iterable[str] | None = None) -> pa.Table:
        """Return all rows in the order of blocks, without audio: our columns by our names, then the others.

        Columns `block` and `place` (row within the block) are added, int64. `columns` limits the others to these of
        the data set's names; of tars there are none. Only the bytes of the columns are read.

        Raises:
            ShardError: as `read` does, and where a column has another type in another file.
        """
        blocks = [
            self._places[self._places[:, 0] == n, 1].tolist() for n in range(len(self._files))
        ]
        spans = [
            (number, *span)
            for number, file in enumerate(self._files)
            for span in file.listing_ranges(blocks[number], self.sources[file.source], columns)
        ]
        fetched = _in_threads(
            lambda span: self._fetch(self._files[span[0]], *span[1:], self._files[span[0]].shown()),
            spans,
            f"corpus {self.corpus}: listings",
        )
        parts: list[dict[int, bytes]] = [{} for _ in self._files]
        for (number, start, _), data in zip(spans, fetched, strict=True):
            parts[number][start] = data
        tables = []
        for number, file in enumerate(self._files):
            source = self.sources[file.source]
            with self._undamaged(file.shown()):
                tables.append(file.listing(blocks[number], source, columns, parts[number]))
        table = in_one_table(self.corpus, self.sources, self._files, tables)
        place = np.concatenate([np.arange(count) for count in self.rows])
        table = table.append_column("block", pa.array(np.repeat(np.arange(len(self)), self.rows)))
        return table.append_column("place", pa.array(place))

    def _fetch(self, file: SourceFile, start: int, end: int, what: str) -> bytes | bytearray:
        received = bytearray()

        def attempt() -> bytes | bytearray:
            data, size = read_range(file.path, start, end, received, self.remote)
            if size not in (None, file.size):
                raise HopelessError(f"the file has {size} bytes and had {file.size}; start again")
            return data

        return persist(attempt, self.remote, self.rank, f"corpus {self.corpus}, {what}")

    def _block_bytes(self, file: SourceFile, start: int, end: int, what: str) -> bytes | bytearray:
        if self.cache is None or "://" not in file.path:
            return self._fetch(file, start, end, what)
        words = f"{file.path} {file.size} {file.digest} {start} {end}"
        key = hashlib.blake2b(words.encode(), digest_size=16).hexdigest()
        data = self.cache.get(key, end - start)
        if data is None:
            data = self._fetch(file, start, end, what)
            self.cache.put(key, data)
        return data

    @contextlib.contextmanager
    def _undamaged(self, what: str) -> Iterator[None]:
        """Raise ShardError where bytes turn out not to be what they were when the file was opened."""
        try:
            yield
        except (pa.ArrowException, OSError, ValueError) as error:
            raise ShardError(
                f"{speaker(self.rank)}, corpus {self.corpus}, {what}: its bytes are damaged, or the file was changed in "
                f"place ({error}); write or fetch it again and start again"
            ) from error


def _load(
    paths: list[str], number: int, source: Source, remote: Remote, rank: int | None, what: str
) -> list[ShardFile]:
    """Read the footers or indices of the files of a source."""

    def load(path: str) -> ShardFile:
        ask = functools.partial(
            persist, remote=remote, rank=rank, what=f"{what.partition(',')[0]}, {path}"
        )
        if path.endswith(".tar"):
            return load_tar(path, number, source, remote, ask, indexed=index_of(path) in paths)
        return load_parquet(path, number, source, remote, ask)

    return _in_threads(load, [path for path in paths if not path.endswith(".idx")], what)


def _in_threads(action, items: Sequence, what: str) -> list:
    """Do it with every item, THREADS at a time; the log says how far this is where it takes long."""
    done, said = [], time.monotonic()
    with ThreadPoolExecutor(THREADS) as pool:
        for result in pool.map(action, items):
            done.append(result)
            if time.monotonic() - said > SAY_EVERY_SECONDS:
                log.info("%s: %d of %d files read", what, len(done), len(items))
                said = time.monotonic()
    return done
